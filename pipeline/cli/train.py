"""Commands that train, check and use models."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from pipeline.cli.app import (
    AllowCodeChange,
    AsJson,
    JobFile,
    MaxSteps,
    NewRunName,
    Overrides,
    Quiet,
    RunName,
    StorageUrl,
    Trust,
    Verbose,
    add_workers_override,
    app,
    output_mode,
    print_result,
    print_warnings,
    progress_callback,
    show_lines,
)
from pipeline.errors import InputError

TABLE_NAME = re.compile(r"\.(parquet|pq|csv|tsv|arrow|feather|npy|npz|jsonl|ndjson)(\.gz)?/?$|[*?]", re.IGNORECASE)
"""Arguments of `train` that are no job files."""

Labels = Annotated[
    list[str] | None,
    typer.Option("--label", metavar="COLUMN", help="The column of a table to predict; several for several numbers."),
]


@app.command(epilog="Example: trainyard train jobs/mnist.yaml --workers 2; trainyard train churn.csv --label churned")
def train(
    job: Annotated[
        str, typer.Argument(metavar="JOB|DATA", help="A job file; or, with --label, a table: a file, glob or folder.")
    ],
    label: Labels = None,
    overrides: Overrides = None,
    workers: Annotated[
        str | None, typer.Option(metavar="N|MIN..MAX", help="Number of Ray Train workers; 0: this process.")
    ] = None,
    name: NewRunName = None,
    address: Annotated[
        str | None, typer.Option(metavar="RAY", help="The Ray cluster to run on [env: RAY_ADDRESS].")
    ] = None,
    max_steps: MaxSteps = None,
    allow_code_change: AllowCodeChange = False,
    storage: StorageUrl = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Run a job. The same command again resumes an interrupted run, and does nothing for a finished one.

    With a table and --label, first write a job file for them.
    """
    output_mode.update(json=as_json, verbose=verbose, has_effects=True)
    from pipeline.cli.terminal import ProgressDisplay, format_run_status
    from pipeline.events import PhaseStarted

    with ProgressDisplay(quiet=quiet) as progress:
        progress.show(PhaseStarted("loading"))
        if label:
            from pipeline.commands.job_from_data import find_or_write_job

            written = find_or_write_job(job, label, on_progress=progress_callback(progress))
            show_lines(progress, written.lines)
            job = written.path
        elif TABLE_NAME.search(job):
            raise InputError("is a table, not a job file", where=job, fix="--label COLUMN says what to predict")
        from pipeline.commands.train import train as run_command

        outcome = run_command(
            job,
            set=add_workers_override(overrides, workers),
            name=name,
            storage=storage,
            address=address,
            max_steps=max_steps,
            allow_code_change=allow_code_change,
            on_event=progress.show,
            verbose=verbose,
        )
    print_result(outcome.to_json(), format_run_status(outcome), as_json)


@app.command(epilog="Example: trainyard check jobs/mnist.yaml --batch")
def check(
    job: JobFile,
    overrides: Overrides = None,
    batch: Annotated[
        bool,
        typer.Option("--batch", help="Build everything: shapes, parameters, device, loss before and after a step."),
    ] = False,
    overfit: Annotated[
        bool, typer.Option("--overfit", help="Overfit one batch: fail if its loss does not get near zero.")
    ] = False,
    storage: StorageUrl = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Validate a job file. Prints it with every default, and how each column of a table is read."""
    output_mode.update(json=as_json, verbose=verbose)
    from pipeline.cli.terminal import ProgressDisplay
    from pipeline.commands.check import check as run_command

    with ProgressDisplay(quiet=False) as progress:
        result = run_command(
            job,
            overrides or [],
            storage=storage,
            batch=batch,
            overfit=overfit,
            on_progress=progress_callback(progress),
        )
    print_result(result.to_json(), result.format_lines(), as_json)


@app.command(epilog="Example: trainyard init churn --data churn.csv --label churned && trainyard check churn.yaml")
def init(
    name: Annotated[str, typer.Argument(metavar="[NAME]", help="Name of the job; writes NAME.yaml.")] = "job",
    data: Annotated[
        str | None, typer.Option(metavar="URL", help="A table, for which the job is written: a file, glob or folder.")
    ] = None,
    label: Labels = None,
    as_json: AsJson = False,
) -> None:
    """Write a commented job file, ready to run and to edit. With --data and --label, one that fits the table."""
    output_mode.update(json=as_json, verbose=False, has_effects=True)
    from pipeline.cli.terminal import ProgressDisplay
    from pipeline.commands.init import init as run_command

    with ProgressDisplay(quiet=False) as progress:
        written = run_command(name, data=data, label=label or [], on_progress=progress_callback(progress))
        show_lines(progress, written.lines)
    path = written.path
    print_result({"path": path}, [f"wrote {path}", f"next: trainyard check {path} --batch"], as_json)


@app.command(epilog="Example: trainyard evaluate mnist-mlp-1a2b3c4d --split test --checkpoint best")
def evaluate(
    run: RunName,
    split: Annotated[str, typer.Option(help="train, val or test. Each read of test is recorded in the run.")] = "val",
    data: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Evaluate other labeled data instead of a split of the run's data."),
    ] = None,
    checkpoint: Annotated[str, typer.Option(metavar="best|last|STEP", help="The checkpoint to evaluate.")] = "best",
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Override where and how to run: data.root, data.loader, scale."
        ),
    ] = None,
    storage: StorageUrl = None,
    trust: Trust = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Compute the metrics of a saved checkpoint. They are exact: each sample of the split counts once."""
    output_mode.update(json=as_json, verbose=verbose)
    from pipeline.cli.terminal import ProgressDisplay
    from pipeline.commands.evaluate import evaluate as run_command

    with ProgressDisplay(quiet=quiet) as progress:
        result = run_command(
            run,
            split=split,
            data=data,
            checkpoint=checkpoint,
            set=overrides or [],
            storage=storage,
            trust=trust,
            on_progress=progress_callback(progress),
        )
        print_warnings(progress, result.warnings)
    print_result(result.to_json(), result.format_lines(), as_json)


@app.command(epilog="Example: trainyard predict churn-1a2b3c4d --input s3://bucket/new/ --output new.parquet")
def predict(
    model: Annotated[str, typer.Argument(metavar="RUN", help="RUN[@best|@last|@STEP]; best by default.")],
    input_url: Annotated[str, typer.Option("--input", metavar="URL", help="Tables or images: a file, glob or folder.")],
    output_url: Annotated[
        str, typer.Option("--output", metavar="URL", help="The file to write: .parquet, .csv, .tsv or .arrow.")
    ],
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    storage: StorageUrl = None,
    trust: Trust = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write the predictions of a saved checkpoint. Each input row gets keys, prediction and probabilities, in order."""
    output_mode.update(json=as_json, verbose=verbose, has_effects=True)
    from pipeline.cli.terminal import ProgressDisplay
    from pipeline.commands.predict import predict as run_command

    with ProgressDisplay(quiet=quiet) as progress:
        result = run_command(
            model,
            input=input_url,
            output=output_url,
            storage=storage,
            device=device,
            trust=trust,
            on_progress=progress_callback(progress),
            on_warning=lambda text: print_warnings(progress, [text]),
        )
    print_result(result.to_json(), result.format_lines(), as_json)
