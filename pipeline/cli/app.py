"""The Typer app, the options that commands share, and how a command ends: a result, or one message and an exit code."""

from __future__ import annotations

import errno
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from pipeline.context import command_line_process
from pipeline.cpus import let_waiting_threads_sleep
from pipeline.errors import InputError, TrainyardError
from pipeline.redaction import redact_tree, sanitize_for_terminal
from pipeline.streams import guarded_standard_streams
from pipeline.version import __version__

if TYPE_CHECKING:
    from pipeline.cli.terminal import ProgressDisplay

app = typer.Typer(
    name="trainyard",
    help="Train small and medium neural networks from one job file: on this machine or on Ray workers.",
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
NewRunName = Annotated[str | None, typer.Option("--name", metavar="RUN", help="Name of the run; default: JOB-DIGEST.")]
MaxSteps = Annotated[int | None, typer.Option(min=1, metavar="N", help="Stop after N steps.")]
AllowCodeChange = Annotated[
    bool,
    typer.Option(
        "--allow-code-change", help="Resume --name RUN although your code was edited since; the change is recorded."
    ),
]
StorageUrl = Annotated[
    str | None,
    typer.Option(metavar="URL", help="Folder or fsspec URL of the runs [env: TRAINYARD_STORAGE; default: ./runs]."),
]
Trust = Annotated[bool, typer.Option("--trust", help="Allow a stored job to import the modules it names.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON, in the last line of standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show Ray's log lines and tracebacks too.")]

output_mode: dict[str, bool] = {"json": False, "verbose": False, "has_effects": False}
"""How the running command prints its result and its errors. has_effects: it does more than print, such as writing a
run."""

UsageError: Any = typer.BadParameter.__mro__[1]
"""The exception that typer raises for invalid arguments; it has no public name that all versions of typer share."""


def _print_version(is_requested: bool) -> None:
    if is_requested:
        print(f"trainyard {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Train small and medium neural networks from one job file: on this machine or on Ray workers."""


def main() -> NoReturn:
    """Run the command line. An error becomes one message and an exit code."""
    let_waiting_threads_sleep()
    arguments = sys.argv[1:]
    output_mode.update(json="--json" in arguments, verbose=False, has_effects=False)  # until the command sets them
    with guarded_standard_streams() as (output, _):
        exit_code = _run_command(arguments)
        output.flush()
        exit_code = _exit_code_after_output_error(output.error, exit_code)
    sys.exit(exit_code)


def _run_command(arguments: list[str]) -> int:
    """Run a command and return its exit code."""
    if sys.platform == "win32":
        return _report_error(
            InputError("Windows is not supported", fix="use Linux, or the Windows Subsystem for Linux"), 2
        )
    if "_TRAINYARD_COMPLETE" in os.environ:  # the shell requests completions
        app()
    command = typer.main.get_command(app)
    try:
        with command_line_process(), command.make_context("trainyard", arguments) as context:
            command.invoke(context)
    except typer.Exit as exit_request:
        return int(exit_request.exit_code)
    except UsageError as error:  # in the arguments: the command did not start
        error.show()
        if output_mode["json"]:
            _print_error("UsageError", error.format_message() or "no command", error.exit_code)
        return int(error.exit_code)
    except TrainyardError as error:
        return _report_error(error, error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return _report_error(TrainyardError("interrupted; the same command resumes from the last checkpoint"), 130)
    except Exception as error:  # in the user's code, or a defect of this package: the traceback only with --verbose
        if output_mode["verbose"]:
            print(sanitize_for_terminal(traceback.format_exc()), file=sys.stderr)
        what = f"{type(error).__name__}: {error}"
        return _report_error(TrainyardError(what, fix="--verbose shows the traceback"), 1)
    return 0


def _report_error(error: TrainyardError, exit_code: int) -> int:
    text = sanitize_for_terminal(str(error))
    print(f"error: {text}" if exit_code < 128 else text, file=sys.stderr)
    if output_mode["json"]:
        _print_error(type(error).__name__, text, exit_code)
    return exit_code


def _print_error(kind: str, message: str, exit_code: int) -> None:
    print_json({"error": {"type": kind, "message": message}, "exit_code": exit_code})


def _exit_code_after_output_error(error: OSError | None, exit_code: int) -> int:
    """Return the exit code of a command whose output may have failed: 1 if all that it does is to print, else the
    exit code of its work. A closed pipe, as with `| head`, is no error."""
    if error is None or error.errno == errno.EPIPE:
        return exit_code
    is_work_done = output_mode["has_effects"] or exit_code != 0
    consequence = (
        "the command did its work, and only its result could not be printed"
        if output_mode["has_effects"]
        else "nothing is printed"
    )
    print(
        f"{'warning' if is_work_done else 'error'}: standard output: {error.strerror}: {consequence}", file=sys.stderr
    )
    return exit_code if is_work_done else 1


def print_result(result: dict[str, Any], lines: list[str], as_json: bool) -> None:
    """Print a command's result: JSON on one line, or lines of text."""
    if as_json:
        print_json(result)
    for line in [] if as_json else lines:
        print(sanitize_for_terminal(line))


def print_json(tree: dict[str, Any]) -> None:
    """Print strict JSON on one line, with secrets redacted and null for numbers that are not finite."""
    print(json.dumps(_replace_nonfinite(redact_tree(tree)), allow_nan=False))


def _replace_nonfinite(tree: Any) -> Any:
    if isinstance(tree, float):
        return tree if math.isfinite(tree) else None
    if isinstance(tree, dict):
        return {key: _replace_nonfinite(value) for key, value in tree.items()}
    return [_replace_nonfinite(value) for value in tree] if isinstance(tree, list) else tree


def progress_callback(progress: ProgressDisplay) -> Callable[[str], None]:
    """Return a callback that shows a command's long phases."""
    from pipeline.events import PhaseStarted

    return lambda text: progress.show(PhaseStarted(text))


def print_warnings(progress: ProgressDisplay, texts: Iterable[str]) -> None:
    """Print warnings on standard error; --quiet does not silence them."""
    from pipeline.events import WarningMessage

    for text in texts:
        progress.show(WarningMessage(text))


def show_lines(progress: ProgressDisplay, lines: Iterable[str]) -> None:
    """Print lines on standard error."""
    from pipeline.events import Message

    for line in lines:
        progress.show(Message(line))


def add_workers_override(overrides: list[str] | None, workers: str | None) -> list[str]:
    """Return the overrides of --set, and --workers as one more.

    Raises
    ------
    InputError: `workers` is neither a number nor MIN..MAX.
    """
    if workers is None:
        return overrides or []
    low, dots, high = workers.partition("..")
    if not low.isdigit() or (dots and not high.isdigit()):
        raise InputError(f"{workers!r} is neither a number nor MIN..MAX", where="--workers", fix="such as 2 or 1..4")
    return [*(overrides or []), f"scale.workers={{min: {low}, max: {high}}}" if dots else f"scale.workers={low}"]
