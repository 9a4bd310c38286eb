"""A process that holds a run, for tests that kill, stop or outrun it: `record_process.py URL NAME hold|train`."""

from __future__ import annotations

import os
import sys
import time

from pipeline.errors import TrainyardError
from pipeline.runs.async_writer import AsyncRunWriter
from pipeline.runs.lease.attempt import Attempt, acquire_lease
from pipeline.runs.run import Run
from pipeline.storage import Storage
from tests.runs.parts import make_block, make_evaluation, make_snapshot


def train_attempt(attempt: Attempt) -> None:
    """An attempt to its end, that commits as fast as it can."""
    recorder = AsyncRunWriter(attempt, keep=2)
    step = attempt.resume_checkpoint.step if attempt.resume_checkpoint is not None else 0
    if step == 0:
        recorder.log_evaluation(make_evaluation(0))
    while step < 1000:
        step += 25
        recorder.log_steps(make_block(step - 24, step))
        recorder.log_evaluation(make_evaluation(step))
        recorder.commit(make_snapshot(step, best=25, end=step == 1000))
        print_line(f"handed over {step}")
    recorder.finish()
    recorder.close()
    attempt.close()
    print_line("finished")


def main(url: str, name: str, command: str) -> None:
    """Claim the run, then hold it until a line comes in, or train."""
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
