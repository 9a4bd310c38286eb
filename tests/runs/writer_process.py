"""A process that claims a run, for tests that kill, stop or overtake it: `writer_process.py URL NAME hold|train`."""

from __future__ import annotations

import os
import sys
import time

from pipeline.errors import TrainyardError
from pipeline.runs.async_writer import AsyncRunWriter
from pipeline.runs.lease.attempt import Attempt, acquire_lease
from pipeline.runs.run import Run
from pipeline.storage import Storage
from tests.runs.factories import make_block, make_evaluation, make_snapshot


def train_attempt(attempt: Attempt) -> None:
    """Train an attempt to the end, and commit as fast as possible."""
    writer = AsyncRunWriter(attempt, keep=2)
    step = attempt.resume_checkpoint.step if attempt.resume_checkpoint is not None else 0
    if step == 0:
        writer.log_evaluation(make_evaluation(0))
    while step < 1000:
        step += 25
        writer.log_steps(make_block(step - 24, step))
        writer.log_evaluation(make_evaluation(step))
        writer.commit(make_snapshot(step, best=25, is_final=step == 1000))
        print_line(f"submitted {step}")
    writer.finish()
    writer.close()
    attempt.close()
    print_line("finished")


def main(url: str, name: str, command: str) -> None:
    """Claim the run, then hold it until a line is received on stdin, or train."""
    run = Run(Storage.open(url), name)
    try:
        attempt = acquire_lease(run, driver=f"{time.monotonic_ns()}", metadata={"host": "here", "pid": os.getpid()})
        print_line(f"claimed {attempt.number}")
        if command == "train":
            train_attempt(attempt)
        else:
            sys.stdin.readline()
            attempt.close()
    except TrainyardError as error:
        print_line(f"{type(error).__name__} {error.exit_code} {error.what}")
        sys.exit(error.exit_code)


def print_line(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:4])
