"""Commands that read runs from storage."""

from __future__ import annotations

import shutil
import sys
from contextlib import redirect_stdout
from typing import Annotated

import typer

from pipeline.cli.app import AsJson, Quiet, RunName, StorageUrl, app, output_mode, print_result


@app.command(epilog="Example: trainyard runs --storage s3://bucket/runs")
def runs(storage: StorageUrl = None, as_json: AsJson = False) -> None:
    """List the runs in storage, oldest first. Shows their status and how each differs from others of its job."""
    output_mode.update(json=as_json, verbose=False)
    from pipeline.commands.show import runs as run_command

    url, listed_runs, unreadable = run_command(storage)
    from pipeline.cli.terminal import format_runs

    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    lines = [
        *format_runs(url, listed_runs, width),
        *(f"{name}: cannot be read: {reason}" for name, reason in unreadable.items()),
    ]
    print_result(
        {"storage": url, "runs": [run.to_json() for run in listed_runs], "unreadable": unreadable}, lines, as_json
    )


@app.command(epilog="Example: trainyard show mnist-mlp-1a2b3c4d")
def show(
    run: RunName,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check every file of the metric log and of the checkpoints for damage.")
    ] = False,
    storage: StorageUrl = None,
    as_json: AsJson = False,
) -> None:
    """Show the status of a run. Read from storage alone: running, stalled, interrupted, failed or finished."""
    output_mode.update(json=as_json, verbose=False)
    from pipeline.cli.terminal import format_run_status
    from pipeline.commands.show import show as run_command

    status = run_command(run, storage, verify=verify)
    print_result(status.to_json(), format_run_status(status), as_json)


@app.command(epilog="Example: trainyard follow mnist-mlp-1a2b3c4d --to tensorboard")
def follow(
    run: RunName,
    to: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="tensorboard or mlflow, or both; default: the trackers in the job's `follow:`."
        ),
    ] = None,
    once: Annotated[
        bool, typer.Option("--once/--wait", help="Send what is there now, or follow the run until it is over.")
    ] = False,
    attached: Annotated[bool, typer.Option("--attached", hidden=True)] = False,
    storage: StorageUrl = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Send the metrics of a run to TensorBoard or MLflow. While it runs or afterwards; each metric is sent once.

    tensorboard: event files in the run's folder. mlflow: the server that MLFLOW_TRACKING_URI names, and the experiment
    of MLFLOW_EXPERIMENT_NAME, or else one with the job's name; needs pip install 'trainyard[mlflow]'.
    """
    output_mode.update(json=as_json, verbose=False, has_effects=True)
    from pipeline.commands.follow import follow as run_command

    if attached:
        from pipeline.trackers.sidecar import make_driver_emitter, watch_driver

        on_event = make_driver_emitter(sys.stdout)
        with redirect_stdout(sys.stderr):  # only events go to the driver, whatever a tracker's library prints
            run_command(run, to=to or [], storage=storage, driver_done=watch_driver(), on_event=on_event)
        return
    from pipeline.cli.terminal import ProgressDisplay

    with ProgressDisplay(quiet=quiet) as progress:
        result = run_command(run, to=to or [], storage=storage, once=once, on_event=progress.show)
    print_result(result.to_json(), result.format_lines(), as_json)
