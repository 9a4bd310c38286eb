"""What failed on a worker, in a form that crosses processes whatever the error was."""

from __future__ import annotations

import traceback
from typing import Any

from pipeline.context import PeerFailure
from pipeline.redaction import scrub


class WorkerFailed(Exception):
    """An error on one worker.

    Parameters
    ----------
    rank: the worker's.
    step: the step it was in; None before the first.
    line: the error's type and first line.
    trace: its traceback, as text.
    is_consequence: whether it only tells that another worker is gone.
    """

    def __init__(self, rank: int, step: int | None, line: str, trace: str, is_consequence: bool) -> None:
        super().__init__(line)
        self.rank = rank
        self.step = step
        self.line = line
        self.trace = trace
        self.is_consequence = is_consequence

    @classmethod
    def of(cls, error: BaseException, rank: int) -> WorkerFailed:
        """An error as it was met on a worker."""
        step = getattr(error, "step", None)
        traceback_text = scrub("".join(traceback.format_exception(error)))  # Ray writes down what is raised
        return cls(rank, step, scrub(head(error)), traceback_text, isinstance(error, PeerFailure))

    def __reduce__(self) -> tuple[Any, ...]:
        return WorkerFailed, (self.rank, self.step, self.line, self.trace, self.is_consequence)


class WorkerHung(Exception):
    """A worker stood still and ended itself. Says who and where in one line; what Ray saw of it is the cause."""


def head(error: BaseException) -> str:
    """An error's type and the first line of what it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[0]}".removesuffix(": ")
