"""What failed on a worker, in a form that crosses processes whatever the error was."""

from __future__ import annotations

import traceback
from typing import Any

from pipeline.context import PeerFailure
from pipeline.redaction import redact


class WorkerFailure(Exception):
    """An error on one worker.

    Parameters
    ----------
    rank: the worker's.
    step: the step it was in; None before the first.
    line: the error's type and first line.
    trace: its traceback, as text.
    is_consequence: whether it only tells that another worker is gone.
    """

    def __init__(self, rank: int, step: int | None, summary: str, traceback_text: str, is_consequence: bool) -> None:
        super().__init__(summary)
        self.rank = rank
        self.step = step
        self.summary = summary
        self.traceback_text = traceback_text
        self.is_consequence = is_consequence

    @classmethod
    def from_error(cls, error: BaseException, rank: int) -> WorkerFailure:
        """An error as it was met on a worker."""
        step = getattr(error, "step", None)
        traceback_text = redact("".join(traceback.format_exception(error)))  # Ray writes down what is raised
        return cls(rank, step, redact(format_error_line(error)), traceback_text, isinstance(error, PeerFailure))

    def __reduce__(self) -> tuple[Any, ...]:
        return WorkerFailure, (self.rank, self.step, self.summary, self.traceback_text, self.is_consequence)


class WorkerHang(Exception):
    """A worker stood still and ended itself. Says who and where in one line; what Ray saw of it is the cause."""


def format_error_line(error: BaseException) -> str:
    """An error's type and the first line of what it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[0]}".removesuffix(": ")
