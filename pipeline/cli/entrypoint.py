"""The entry point of a submitted job on the cluster: runs `train` with the submission's payload and prints plain lines
and records.

It runs as `python -m pipeline.cli.entrypoint NAME`, where NAME is the name of the payload
(pipeline/cluster/submission/payload.py). Exit codes are those of `trainyard train`.
"""

from __future__ import annotations

import os
import sys
from typing import Any, NoReturn

from pipeline.context import command_line_process
from pipeline.errors import TrainyardError


def main() -> NoReturn:
    """Train, print the outcome as text and as a record, and exit with the exit code of `trainyard train`."""
    from pipeline.cluster.submission.log_records import format_record, redact_stdout_and_stderr

    redact_stdout_and_stderr()
    outcome: dict[str, Any]
    try:
        with command_line_process():
            outcome = {"exit_code": 0, "result": _train(sys.argv[1])}
    except TrainyardError as error:
        print(f"error: {error}" if error.exit_code < 128 else f"{error}", flush=True)
        error_fields = {"type": type(error).__name__, "message": str(error)}
        outcome = {"exit_code": error.exit_code, "error": error_fields}
    except Exception as error:  # in the user's code, or a defect of this package: the job's log has the traceback
        import traceback

        traceback.print_exc(file=sys.stdout)
        print(f"error: {type(error).__name__}: {error}", flush=True)
        outcome = {"exit_code": 1, "error": {"type": type(error).__name__, "message": str(error)}}
    print(format_record("end", outcome), flush=True)
    sys.exit(outcome["exit_code"])


def _train(payload_name: str) -> dict[str, Any]:
    from pipeline.cli.terminal import ProgressDisplay, format_run_status
    from pipeline.cluster.submission.log_records import format_record
    from pipeline.cluster.submission.payload import fetch_payload
    from pipeline.commands.train import train
    from pipeline.config.files import parse_job
    from pipeline.events import Event, RunOpened
    from pipeline.storage import credentials

    payload = fetch_payload(payload_name)
    credentials.set_credentials(payload.environment)
    with ProgressDisplay(quiet=False) as progress:

        def on_event(event: Event) -> None:
            if isinstance(event, RunOpened):
                print(format_record("run", {"run": event.run, "url": event.url}), flush=True)
            progress.show(event)

        outcome = train(
            parse_job(payload.job, "the submitted job"),
            name=payload.name,
            storage=payload.storage,
            address=os.environ["RAY_ADDRESS"],
            max_steps=payload.max_steps,
            allow_code_change=payload.allow_code_change,
            on_event=on_event,
            verbose=payload.verbose,
        )
    print("\n".join(format_run_status(outcome)), flush=True)
    return outcome.to_json()


if __name__ == "__main__":
    main()
