"""The Typer app, the options that commands share, and how a command ends: a result, or one message and an exit code."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from pipeline import __version__
from pipeline.context import own_process
from pipeline.errors import InputError, TrainyardError
from pipeline.redaction import printable, scrubbed

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
RunToBe = Annotated[str | None, typer.Option("--name", metavar="RUN", help="Name of the run instead of JOB-DIGEST.")]
MaxSteps = Annotated[int | None, typer.Option(min=1, metavar="N", help="Stop after N steps.")]
AllowCodeChange = Annotated[
    bool,
    typer.Option(
        "--allow-code-change", help="Go on with --name RUN although your own code was edited since; it is recorded."
    ),
]
StorageUrl = Annotated[
    str | None,
    typer.Option(metavar="URL", help="Where runs lie: a folder or fsspec URL [env: TRAINYARD_STORAGE; else ./runs]."),
]
Trust = Annotated[bool, typer.Option("--trust", help="Let a job read from storage import the modules it names.")]
Json = Annotated[bool, typer.Option("--json", help="Make the last line of standard output one JSON object.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Ray's own lines too, and tracebacks.")]

shown: dict[str, bool] = {"json": False, "verbose": False}
"""How the running command shows its end."""


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
        with own_process():
            app(standalone_mode=True)
    except TrainyardError as error:
        _fail(error, error.exit_code)
    except KeyboardInterrupt:
        _fail(TrainyardError("interrupted; the same command goes on from the last checkpoint"), 130)
    except Exception as error:  # the user's own code, or a defect of ours: one message, the traceback on request
        if shown["verbose"]:
            print(printable(traceback.format_exc()), file=sys.stderr)
        what = f"{type(error).__name__}: {error}"
        _fail(TrainyardError(what, fix="--verbose shows where it comes from"), 1)
    sys.exit(0)


def _fail(error: TrainyardError, exit_code: int) -> NoReturn:
    text = printable(str(error))
    print(f"error: {text}" if exit_code < 128 else text, file=sys.stderr)
    if shown["json"]:
        print(json.dumps({"error": {"type": type(error).__name__, "message": text}, "exit_code": exit_code}))
    sys.exit(exit_code)


def print_result(result: dict[str, Any], lines: list[str], as_json: bool) -> None:
    """Print what a command found: JSON on one line, or lines for people."""
    if as_json:
        print(json.dumps(scrubbed(result)))
    for line in [] if as_json else lines:
        print(printable(line))


def phases(progress: Progress) -> Callable[[str], None]:
    """Takes what a verb says of its long phases."""
    return lambda text: progress.show({"kind": "phase", "text": text})


def with_workers(overrides: list[str] | None, workers: str | None) -> list[str]:
    """The words of --set, and what --workers says as one more.

    Raises
    ------
    InputError: neither a number nor MIN..MAX.
    """
    if workers is None:
        return overrides or []
    low, dots, high = workers.partition("..")
    if not low.isdigit() or (dots and not high.isdigit()):
        raise InputError(f"{workers!r} is neither a number nor MIN..MAX", where="--workers", fix="such as 2 or 1..4")
    return [*(overrides or []), f"scale.workers={{min: {low}, max: {high}}}" if dots else f"scale.workers={low}"]
