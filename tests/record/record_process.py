"""A process that holds a run, for tests that kill, stop or outrun it: `record_process.py URL NAME hold|train`."""

from __future__ import annotations

import os
import sys
import time

from pipeline.errors import TrainyardError
from pipeline.record.attempt import Attempt, claim
from pipeline.record.recorder import Recorder
from pipeline.record.run import Run
from pipeline.storage import Storage
from tests.record.record_parts import block, evaluation, snapshot


def train(attempt: Attempt) -> None:
    """An attempt to its end, that commits as fast as it can."""
    recorder = Recorder(attempt, keep=2)
    step = attempt.base.step if attempt.base is not None else 0
    if step == 0:
        recorder.evaluation(evaluation(0))
    while step < 1000:
        step += 25
        recorder.steps(block(step - 24, step))
        recorder.evaluation(evaluation(step))
        recorder.commit(snapshot(step, best=25, end=step == 1000))
        say(f"handed over {step}")
    recorder.finish()
    recorder.close()
    attempt.close()
    say("finished")


def main(url: str, name: str, command: str) -> None:
    """Claim the run, then hold it until a line comes in, or train."""
    run = Run(Storage.open(url), name)
    try:
        attempt = claim(run, driver=f"{time.monotonic_ns()}", facts={"host": "here", "pid": os.getpid()})
        say(f"claimed {attempt.number}")
        if command == "train":
            train(attempt)
        else:
            sys.stdin.readline()
            attempt.close()
    except TrainyardError as error:
        say(f"{type(error).__name__} {error.exit_code} {error.what}")
        sys.exit(error.exit_code)


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:4])
