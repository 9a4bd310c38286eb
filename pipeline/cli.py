"""The command line: parse, call a verb, print. No logic, and no import that `--help` would wait for."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from pipeline import __version__
from pipeline.errors import InputError, TrainyardError

if TYPE_CHECKING:
    from pipeline.terminal import Progress

app = typer.Typer(
    name="trainyard",
    help="Train small and medium neural networks with one job file: here, on Ray workers, on a schedule.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

JobFile = Annotated[str, typer.Argument(metavar="JOB", help="A job file; `trainyard init` writes one.")]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="A run's name under --storage, or its URL.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a field, such as train.batch_size=256.")
]
StorageUrl = Annotated[
    str | None,
    typer.Option(metavar="URL", help="Where runs lie: a folder or fsspec URL [env: TRAINYARD_STORAGE; else ./runs]."),
]
Trust = Annotated[bool, typer.Option("--trust", help="Let a job read from storage import the modules it names.")]
Json = Annotated[bool, typer.Option("--json", help="Make the last line of standard output one JSON object.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Ray's own lines too, and tracebacks.")]

_shown: dict[str, bool] = {"json": False, "verbose": False}


@app.command(epilog="Example: trainyard train jobs/mnist.yaml --set data.root=~/data --workers 2")
def train(
    job: JobFile,
    overrides: Overrides = None,
    workers: Annotated[
        str | None, typer.Option(metavar="N|MIN..MAX", help="Ray Train workers; 0: in this process.")
    ] = None,
    name: Annotated[str | None, typer.Option(metavar="RUN", help="Name of the run instead of JOB-DIGEST.")] = None,
    address: Annotated[
        str | None, typer.Option(metavar="RAY", help="A Ray cluster to run on [env: RAY_ADDRESS].")
    ] = None,
    max_steps: Annotated[int | None, typer.Option(min=1, metavar="N", help="Stop after N steps.")] = None,
    storage: StorageUrl = None,
    trust: Trust = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Run a job. The same command again resumes an interrupted run, and does nothing for a finished one."""
    _shown.update(json=as_json, verbose=verbose)
    from pipeline.terminal import Progress, result_lines

    words = [*(overrides or []), *([f"scale.workers={_worker_range(workers)}"] if workers is not None else [])]
    with Progress(quiet=quiet) as progress:
        progress.show({"kind": "phase", "text": "loading"})
        from pipeline.verbs.train import train as verb

        outcome = verb(
            job,
            set=words,
            name=name,
            storage=storage,
            address=address,
            max_steps=max_steps,
            tell=progress.show,
            verbose=verbose,
        )
    _print(outcome.to_json(), result_lines(outcome), as_json)


@app.command(epilog="Example: trainyard check jobs/mnist.yaml --batch")
def check(
    job: JobFile,
    overrides: Overrides = None,
    batch: Annotated[
        bool, typer.Option("--batch", help="Build everything: shapes, parameters, device, the loss around one update.")
    ] = False,
    overfit: Annotated[
        bool, typer.Option("--overfit", help="Drive one batch to zero loss, or say that it cannot.")
    ] = False,
    storage: StorageUrl = None,
    trust: Trust = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Validate a job file and print it as resolved, every default spelled out."""
    _shown.update(json=as_json, verbose=verbose)
    from pipeline.verbs.check import check as verb

    found = verb(job, overrides or [], storage=storage, batch=batch, overfit=overfit)
    _print(found.to_json(), found.lines(), as_json)


@app.command(epilog="Example: trainyard init churn && trainyard check churn.yaml")
def init(
    name: Annotated[str, typer.Argument(metavar="[NAME]", help="Name of the job; the file is NAME.yaml.")] = "job",
    as_json: Json = False,
) -> None:
    """Write a commented job file, ready to run and to change."""
    _shown.update(json=as_json, verbose=False)
    from pipeline.verbs.init import init as verb

    path = verb(name)
    _print({"path": path}, [f"wrote {path}", f"next: trainyard check {path} --batch"], as_json)


@app.command(epilog="Example: trainyard evaluate mnist-mlp-1a2b3c4d --split test --checkpoint best")
def evaluate(
    run: RunName,
    split: Annotated[str, typer.Option(help="train, val or test. Every read of test is recorded in the run.")] = "val",
    data: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Other rows with labels, instead of a split of the run's own data."),
    ] = None,
    checkpoint: Annotated[str, typer.Option(metavar="best|last|STEP", help="Which checkpoint.")] = "best",
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Where and how: data.root, data.loader, scale."),
    ] = None,
    storage: StorageUrl = None,
    trust: Trust = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Exact metrics of a saved checkpoint: every row of the split once."""
    _shown.update(json=as_json, verbose=verbose)
    from pipeline.terminal import Progress
    from pipeline.verbs.evaluate import evaluate as verb

    with Progress(quiet=quiet) as progress:
        found = verb(
            run,
            split=split,
            data=data,
            checkpoint=checkpoint,
            set=overrides or [],
            storage=storage,
            trust=trust,
            say=_phases(progress),
        )
    _print(found.to_json(), found.lines(), as_json)


@app.command(epilog="Example: trainyard predict churn-1a2b3c4d --input s3://bucket/new/ --output new.parquet")
def predict(
    model: Annotated[str, typer.Argument(metavar="RUN", help="RUN[@best|@last|@STEP]; best by default.")],
    input_url: Annotated[
        str, typer.Option("--input", metavar="URL", help="Parquet: a file, glob or folder; or a folder of pictures.")
    ],
    output_url: Annotated[str, typer.Option("--output", metavar="URL", help="The Parquet file to write.")],
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    storage: StorageUrl = None,
    trust: Trust = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Predictions of a saved checkpoint: keys, prediction and probabilities, a row for each row, in order."""
    _shown.update(json=as_json, verbose=verbose)
    from pipeline.terminal import Progress
    from pipeline.verbs.predict import predict as verb

    with Progress(quiet=quiet) as progress:
        found = verb(
            model,
            input=input_url,
            output=output_url,
            storage=storage,
            device=device,
            trust=trust,
            say=_phases(progress),
        )
    _print(found.to_json(), found.lines(), as_json)


@app.command(epilog="Example: trainyard runs --storage s3://bucket/runs")
def runs(storage: StorageUrl = None, as_json: Json = False) -> None:
    """List the runs in storage, and how each stands."""
    _shown.update(json=as_json, verbose=False)
    from pipeline.verbs.show import runs as verb

    url, found = verb(storage)
    from pipeline.terminal import runs_lines

    _print({"storage": url, "runs": [standing.to_json() for standing in found]}, runs_lines(url, found), as_json)


@app.command(epilog="Example: trainyard show mnist-mlp-1a2b3c4d")
def show(run: RunName, storage: StorageUrl = None, as_json: Json = False) -> None:
    """How a run stands, from storage alone: running, stalled, interrupted, failed or finished."""
    _shown.update(json=as_json, verbose=False)
    from pipeline.terminal import result_lines
    from pipeline.verbs.show import show as verb

    found = verb(run, storage)
    _print(found.to_json(), result_lines(found), as_json)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"trainyard {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Train small and medium neural networks with one job file: here, on Ray workers, on a schedule."""


def main() -> NoReturn:
    """Run the command line; errors become one message and an exit code."""
    if sys.platform == "win32":
        _fail(InputError("Windows is not supported", fix="use Linux, or the Windows Subsystem for Linux"), 2)
    try:
        app(standalone_mode=True)
    except TrainyardError as error:
        _fail(error, error.exit_code)
    except KeyboardInterrupt:
        _fail(TrainyardError("interrupted; the same command goes on from the last checkpoint"), 130)
    except Exception as error:  # the user's own code, or a defect of ours: one message, the traceback on request
        if _shown["verbose"]:
            raise
        what = f"{type(error).__name__}: {error}"
        _fail(TrainyardError(what, fix="--verbose shows where it comes from"), 1)
    sys.exit(0)


def _fail(error: TrainyardError, exit_code: int) -> NoReturn:
    print(f"error: {error}" if exit_code < 128 else f"{error}", file=sys.stderr)
    if _shown["json"]:
        print(json.dumps({"error": {"type": type(error).__name__, "message": str(error)}, "exit_code": exit_code}))
    sys.exit(exit_code)


def _print(result: dict[str, Any], lines: list[str], as_json: bool) -> None:
    for line in [json.dumps(result)] if as_json else lines:
        print(line)


def _phases(progress: Progress) -> Callable[[str], None]:
    return lambda text: progress.show({"kind": "phase", "text": text})


def _worker_range(words: str) -> str:
    low, dots, high = words.partition("..")
    if not low.isdigit() or (dots and not high.isdigit()):
        raise InputError(f"{words!r} is neither a number nor MIN..MAX", where="--workers", fix="such as 2 or 1..4")
    return f"{{min: {low}, max: {high}}}" if dots else low
