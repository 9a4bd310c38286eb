"""Commands that use the Jobs API of a Ray cluster."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.app import (
    AllowCodeChange,
    AsJson,
    JobFile,
    MaxSteps,
    NewRunName,
    Overrides,
    Quiet,
    StorageUrl,
    Verbose,
    add_workers_override,
    app,
    output_mode,
    print_json,
    print_result,
)
from pipeline.redaction import sanitize_for_terminal

if TYPE_CHECKING:
    from pipeline.cluster.submission.job_status import JobStatus

Address = Annotated[
    str | None,
    typer.Option(metavar="URL", help="The cluster's dashboard, http://HEAD:8265 [env: RAY_API_SERVER_ADDRESS]."),
]
TokenFile = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="File with the cluster's token [else RAY_AUTH_TOKEN, or Ray's token file]."),
]
JobOrRun = Annotated[
    str, typer.Argument(metavar="JOB_OR_RUN", help="A job's id on the cluster, or the name of its run.")
]


@app.command(
    epilog="Example: trainyard submit jobs/mnist.yaml --address http://head:8265 --workers 2 --env AWS_PROFILE"
)
def submit(
    job: JobFile,
    address: Address = None,
    overrides: Overrides = None,
    workers: Annotated[
        str | None,
        typer.Option(metavar="N|MIN..MAX", help="Number of Ray Train workers; 0: one process on the head node."),
    ] = None,
    name: NewRunName = None,
    max_steps: MaxSteps = None,
    allow_code_change: AllowCodeChange = False,
    storage: StorageUrl = None,
    env: Annotated[
        list[str] | None,
        typer.Option(
            "--env", metavar="KEY", help="Pass this environment variable to the job. Its value is never shown."
        ),
    ] = None,
    env_file: Annotated[
        list[str] | None,
        typer.Option("--env-file", metavar="FILE", help="Pass the variables of a file with lines KEY=VALUE."),
    ] = None,
    token_file: TokenFile = None,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Follow the job to its end; Ctrl-C leaves it running.")
    ] = True,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Run a job on a Ray cluster. The same command again attaches to it, resumes it, or finds it finished."""
    output_mode.update(json=as_json, verbose=verbose, has_effects=True)
    from pipeline.commands.submit import submit as run_command

    job_ids: list[str] = []

    def on_job(job_id: str) -> None:
        job_ids.append(job_id)
        if wait or as_json:
            _progress_printer(quiet)(f"job {job_id}")
        else:
            print(job_id, flush=True)

    with _detach_on_interrupt(job_ids, address, as_json):
        job_status = run_command(
            job,
            address=address,
            set=add_workers_override(overrides, workers),
            name=name,
            storage=storage,
            max_steps=max_steps,
            allow_code_change=allow_code_change,
            env=env or [],
            env_files=env_file or [],
            token_file=token_file,
            wait=wait,
            verbose=verbose,
            on_progress=_progress_printer(quiet),
            on_log_line=_progress_printer(quiet),
            on_job=on_job,
        )
        _exit_with_job(job_status, as_json, is_followed=wait)


@app.command(epilog="Example: trainyard status --address http://head:8265")
def status(
    job_or_run: Annotated[
        str | None, typer.Argument(metavar="[JOB_OR_RUN]", help="A job's id, or its run's name; default: all jobs.")
    ] = None,
    address: Address = None,
    token_file: TokenFile = None,
    as_json: AsJson = False,
) -> None:
    """Show the status of one or all jobs submitted to a cluster."""
    output_mode.update(json=as_json, verbose=False)
    from pipeline.cli.terminal import format_jobs
    from pipeline.commands.submitted_jobs import format_outcome
    from pipeline.commands.submitted_jobs import status as run_command

    url, statuses = run_command(job_or_run, address=address, token_file=token_file)
    trees = [job_status.to_json() for job_status in statuses]
    lines = format_jobs(url, trees)
    if job_or_run is not None and statuses[0].is_over:
        lines.append(format_outcome(statuses[0]))
    print_result(trees[0] if job_or_run is not None else {"url": url, "jobs": trees}, lines, as_json)


@app.command(epilog="Example: trainyard logs mnist-1a2b3c4d-1 --follow --address http://head:8265")
def logs(
    job_or_run: JobOrRun,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Follow until the job ends, and exit with its exit code.")
    ] = False,
    address: Address = None,
    token_file: TokenFile = None,
    as_json: AsJson = False,
) -> None:
    """Print the log of a job. Ctrl-C stops following; the job keeps running."""
    output_mode.update(json=as_json, verbose=False)
    from pipeline.commands.submitted_jobs import logs as run_command

    job_ids: list[str] = []
    with _detach_on_interrupt(job_ids, address, as_json):
        job_status = run_command(
            job_or_run,
            address=address,
            token_file=token_file,
            until_end=follow,
            on_line=_progress_printer(False)
            if as_json
            else lambda line: print(sanitize_for_terminal(line), flush=True),
            on_progress=_progress_printer(False),
            on_job=job_ids.append,
        )
        _exit_with_job(job_status, as_json, is_followed=follow)


@app.command(epilog="Example: trainyard stop mnist-1a2b3c4d-1 --address http://head:8265")
def stop(
    job_or_run: JobOrRun,
    address: Address = None,
    token_file: TokenFile = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Stop a job after it has saved a checkpoint. The same submit resumes from there."""
    output_mode.update(json=as_json, verbose=False, has_effects=True)
    from pipeline.commands.submitted_jobs import format_outcome
    from pipeline.commands.submitted_jobs import stop as run_command

    job_status = run_command(job_or_run, address=address, token_file=token_file, on_progress=_progress_printer(quiet))
    print_result(job_status.to_json(), [format_outcome(job_status)], as_json)


def _progress_printer(quiet: bool) -> Callable[[str], None]:
    return (
        (lambda text: None) if quiet else (lambda text: print(sanitize_for_terminal(text), file=sys.stderr, flush=True))
    )


@contextmanager
def _detach_on_interrupt(job_ids: list[str], address: str | None, as_json: bool) -> Iterator[None]:
    """While entered, Ctrl-C ends the following and not the job, and is no failure.

    job_ids: holds the job's id as soon as there is one; before, Ctrl-C is raised as usual.
    """
    try:
        yield
        return
    except KeyboardInterrupt:
        if not job_ids:
            raise
    job_id = job_ids[-1]
    where = sanitize_for_terminal(f" --address {address}") if address else ""
    print(
        f"\ndetached: {job_id} keeps running"
        f"\n  follow it: trainyard logs {job_id} --follow{where}"
        f"\n  stop it:   trainyard stop {job_id}{where}",
        file=sys.stderr,
    )
    if as_json:
        print_json({"job": job_id, "run": None, "url": None, "status": "running", "exit_code": None})


def _exit_with_job(job_status: JobStatus, as_json: bool, *, is_followed: bool) -> None:
    """Exit with the exit code of a job that was followed to its end. Its log has the error already, unless its entry
    point could not write it."""
    from pipeline.commands.submitted_jobs import format_outcome

    if is_followed and job_status.outcome is None:
        print(sanitize_for_terminal(f"error: {format_outcome(job_status)}"), file=sys.stderr)
    if as_json:
        print_json(job_status.to_json())
    if is_followed:
        raise typer.Exit(job_status.exit_code or 0)
