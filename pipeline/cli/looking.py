"""Commands that look at what is in storage."""

from __future__ import annotations

import shutil
import sys
from contextlib import redirect_stdout
from typing import Annotated

import typer

from pipeline.cli.app import Json, Quiet, RunName, StorageUrl, app, print_result, shown


@app.command(epilog="Example: trainyard runs --storage s3://bucket/runs")
def runs(storage: StorageUrl = None, as_json: Json = False) -> None:
    """List the runs in storage, oldest first: how each stands, and what tells it from the other runs of its job."""
    shown.update(json=as_json, verbose=False)
    from pipeline.verbs.show import runs as verb

    url, listed_runs, unreadable = verb(storage)
    from pipeline.terminal import runs_lines

    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    lines = [*runs_lines(url, listed_runs, width), *(f"{name}: cannot be read: {reason}" for name, reason in unreadable.items())]
    print_result({"storage": url, "runs": [run.to_json() for run in listed_runs], "unreadable": unreadable}, lines, as_json)


@app.command(epilog="Example: trainyard show mnist-mlp-1a2b3c4d")
def show(
    run: RunName,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every file of the metric log and of the checkpoints for damage.")
    ] = False,
    storage: StorageUrl = None,
    as_json: Json = False,
) -> None:
    """How a run stands, from storage alone: running, stalled, interrupted, failed or finished."""
    shown.update(json=as_json, verbose=False)
    from pipeline.terminal import result_lines
    from pipeline.verbs.show import show as verb

    status = verb(run, storage, verify=verify)
    print_result(status.to_json(), result_lines(status), as_json)


@app.command(epilog="Example: trainyard follow mnist-mlp-1a2b3c4d --to tensorboard")
def follow(
    run: RunName,
    to: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="tensorboard or mlflow, or both; else those of the job's `follow:`."),
    ] = None,
    once: Annotated[
        bool, typer.Option("--once/--wait", help="Tell what is there now, or go on until the run is over.")
    ] = False,
    attached: Annotated[bool, typer.Option("--attached", hidden=True)] = False,
    storage: StorageUrl = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Tell TensorBoard or MLflow of a run that goes on, or of one that is over. What they know already is not repeated.

    tensorboard: event files in the run's own folder. mlflow: the server of MLFLOW_TRACKING_URI, and the experiment of
    MLFLOW_EXPERIMENT_NAME or else of the job's name; needs pip install 'trainyard[mlflow]'.
    """
    shown.update(json=as_json, verbose=False, kept=True)
    from pipeline.verbs.follow import follow as verb

    if attached:
        from pipeline.followers.attached import driver_gone, tell_driver

        on_event = tell_driver(sys.stdout)
        with redirect_stdout(sys.stderr):  # only events go to the driver, whatever a tracker's library prints
            verb(run, to=to or [], storage=storage, driven=driver_gone(), on_event=on_event)
        return
    from pipeline.terminal import Progress

    with Progress(quiet=quiet) as progress:
        result = verb(run, to=to or [], storage=storage, once=once, on_event=progress.show)
    print_result(result.to_json(), result.lines(), as_json)
