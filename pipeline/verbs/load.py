"""`load`: a trained model, ready to answer."""

from __future__ import annotations

from pipeline import own_code
from pipeline.assembly import check_weights
from pipeline.data.fitted import Fitted
from pipeline.device import Arithmetic, choose, default_settings
from pipeline.errors import InputError
from pipeline.job import Job, OwnModel
from pipeline.job_file import parse_job
from pipeline.learn.flat import take_weights
from pipeline.learn.models import build_model
from pipeline.predictor import Predictor
from pipeline.record.checkpoint import find_checkpoint
from pipeline.record.run import Run, run_and_checkpoint
from pipeline.verbs.places import find_run


def load(model: str, *, storage: str | None = None, device: str = "cpu", trust: bool = False) -> Predictor:
    """A trained model with its preprocessing and class names.

    Parameters
    ----------
    model: RUN[@best|@last|@STEP]: a run's URL, or its name under the storage; best by default.
    storage: URL that holds the runs; else TRAINYARD_STORAGE, else ./runs.
    device: cpu, cuda, mps or auto; `to` moves it later.
    trust: let a run with a model of the user's own import it, from the code stored with the run. Without it nothing
        that lies in storage is ever run.

    Raises
    ------
    InputError: there is no such run or checkpoint, it is damaged, or it needs `trust`.
    """
    name, which = run_and_checkpoint(model)
    run = find_run(name, storage)
    job = parse_job(run.job_yaml(), f"{run.url}/job.yaml")
    custom_modules = [job.model.kind] if isinstance(job.model, OwnModel) else []
    code = trust_code(run, job, custom_modules, trust)
    saved = find_checkpoint(run, which)
    fitted, target_device = Fitted.from_json(saved.preprocess()), choose(device)
    preprocess = fitted.preprocess
    weights = saved.weights()
    check_weights(job, fitted, weights, saved.url)
    with code.in_use(), default_settings():
        net = build_model(job, preprocess.output_shape, fitted.outputs, 0, preprocess.code_sizes)
        net.to(target_device, Arithmetic.of(job.train.precision, target_device).dtype)  # first: fp64 stays what it is
        take_weights(net, weights, "".join(custom_modules))
    return Predictor(net, fitted, job, run.name, saved.step, code)


def trust_code(run: Run, job: Job, names: list[str], trust: bool) -> own_code.UserCode:
    """The code that the modules which a stored job names are imported from: the code stored with it, or what lies where
    they were then if none was stored.

    Raises
    ------
    InputError: they are not trusted.
    """
    if not names:
        return own_code.NO_CODE
    if not trust:
        raise InputError(
            f"this job would import {', '.join(names)}",
            where=f"{run.url}/job.yaml",
            fix="--trust (in Python: trust=True) allows it, if you trust this storage",
        )
    archive = run.code()
    return own_code.stored(archive) if archive is not None else own_code.collect(job)
