"""`load`: a trained model, ready to predict."""

from __future__ import annotations

from pipeline import user_code
from pipeline.config import CustomModelConfig, JobConfig
from pipeline.config.files import parse_job
from pipeline.data.fitted_transforms import FittedTransforms
from pipeline.device import Precision, default_settings, select_device
from pipeline.errors import InputError, StorageError
from pipeline.inference.predictor import Predictor
from pipeline.models import build_model
from pipeline.runs.checkpoints.checkpoint import Checkpoint, find_checkpoint
from pipeline.runs.locate import find_run
from pipeline.runs.run import Run, parse_run_ref
from pipeline.setup import check_state_dict
from pipeline.training.flat_parameters import load_state_dict_strict


def load(model: str, *, storage: str | None = None, device: str = "cpu", trust: bool = False) -> Predictor:
    """Load a trained model with its transforms and class names.

    Parameters
    ----------
    model: RUN[@best|@last|@STEP]: a run's URL, or its name under the storage; best by default.
    storage: URL of the folder of runs; by default TRAINYARD_STORAGE, else ./runs.
    device: cpu, cuda, mps or auto; `to` moves the model later.
    trust: allow a run with a custom model to import it from the code stored with the run. Without it no code from
        storage is ever executed.

    Raises
    ------
    InputError: there is no such run or checkpoint, it is damaged, or it needs `trust`.
    """
    name, which = parse_run_ref(model)
    run = find_run(name, storage)
    job = parse_job(run.read_job_yaml(), f"{run.url}/job.yaml")
    custom_modules = [job.model.kind] if isinstance(job.model, CustomModelConfig) else []
    code = load_trusted_code(run, job, custom_modules, trust)
    saved = find_checkpoint(run, which)
    fitted, target_device = FittedTransforms.from_json(saved.load_preprocess()), select_device(device)
    preprocess = fitted.input_transform
    weights = saved.load_weights()
    check_state_dict(job, fitted, weights, saved.url)
    with code.activated(), default_settings():
        net = build_model(
            *(job, preprocess.output_shape, fitted.num_outputs, 0, preprocess.code_sizes, preprocess.num_numbers)
        )
        # Before the weights are loaded: fp64 weights keep their precision.
        net.to(target_device, Precision.from_name(job.train.precision, target_device).dtype)
        load_state_dict_strict(net, weights, "".join(custom_modules))
    return Predictor(net, fitted, job, run.name, saved.step, code, threshold=read_threshold(job, saved))


def read_threshold(job: JobConfig, checkpoint: Checkpoint) -> float:
    """Return the probability above which a binary task predicts the positive class: the job's, or the one that the
    latest evaluation up to the checkpoint chose. 0.5 for other tasks.

    Raises
    ------
    StorageError: the checkpoint has none.
    """
    if isinstance(job.task.threshold, float):
        return job.task.threshold
    threshold = checkpoint.metrics.get("val/threshold")
    if threshold is None:
        raise StorageError(
            "no threshold was chosen for this checkpoint: the model's outputs were not finite",
            where=checkpoint.url,
            fix="use another checkpoint",
        )
    return threshold


def load_trusted_code(run: Run, job: JobConfig, names: list[str], trust: bool) -> user_code.UserCode:
    """Return the code from which the modules that a stored job names are imported.

    It is the code stored with the run; if none is stored, the code at its original location.

    Parameters
    ----------
    names: the modules; without any, no code is needed.

    Raises
    ------
    InputError: the run is not trusted.
    """
    if not names:
        return user_code.NO_CODE
    if not trust:
        raise InputError(
            f"this job would import {', '.join(names)}",
            where=f"{run.url}/job.yaml",
            fix="--trust (in Python: trust=True) allows it, if you trust this storage",
        )
    archive = run.read_code()
    return user_code.load_stored_code(archive) if archive is not None else user_code.collect_user_code(job)
