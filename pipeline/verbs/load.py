"""`load`: a trained model, ready to answer."""

from __future__ import annotations

from pathlib import Path

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
    if isinstance(job.model, OwnModel):
        trust_code(run, job, [job.model.kind], trust)
    saved = find_checkpoint(run, which)
    fitted, place = Fitted.from_json(saved.preprocess()), choose(device)
    preprocess = fitted.preprocess
    weights = saved.weights()
    check_weights(job, fitted, weights, saved.url)
    with default_settings():
        net = build_model(job, preprocess.output_shape, fitted.outputs, 0, preprocess.code_sizes)
        net.to(place, Arithmetic.of(job.train.precision, place).dtype)  # first: fp64 stays what it is
        take_weights(net, weights)
    return Predictor(net, fitted, job, run.name, saved.step)


def trust_code(run: Run, job: Job, names: list[str], trust: bool) -> None:
    """Let the modules that a stored job names be imported: from the code stored with it, then from where they were.

    Raises
    ------
    InputError: they are not trusted.
    """
    if not names:
        return
    if not trust:
        raise InputError(
            f"this job would import {', '.join(names)}",
            where=f"{run.url}/job.yaml",
            fix="--trust (in Python: trust=True) allows it, if you trust this storage",
        )
    stored = run.code()
    if stored is not None:
        own_code.look_in(str(own_code.unpacked(stored)))
    if job.code is not None and Path(job.code).is_dir():
        own_code.look_in(job.code)
