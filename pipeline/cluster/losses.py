"""Losses of workers: what was lost, told in one line, and whether to start again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipeline.cluster.context import PeerLost
from pipeline.errors import Interrupted, TrainyardError, WorkerLostError


class Losses:
    """Counts losses in a row, and decides which of them end the run."""

    def __init__(self, run_name: str, retries: int, highest_step: Callable[[], int]) -> None:
        self._run_name = run_name
        self._retries = retries
        self._highest_step = highest_step
        self._reached = highest_step()
        self._in_a_row = 0

    def take(self, error: Exception, signal_number: int) -> None:
        """Count a loss; progress since the one before begins the count anew.

        Raises
        ------
        TrainyardError: what a worker itself said; a signal that asked to stop; or one loss too many.
        """
        found = _find(error, TrainyardError)
        if isinstance(found, TrainyardError):
            raise found from None
        if signal_number:
            what, fix = (
                f"stopped after a loss ({first_line(error)})",
                "the same command goes on from the last checkpoint",
            )
            raise Interrupted(what, signal_number=signal_number, fix=fix) from error
        reached = self._highest_step()
        self._in_a_row = self._in_a_row + 1 if reached <= self._reached else 1
        self._reached = reached
        if self._in_a_row > self._retries:
            raise WorkerLostError(
                f"{first_line(error)} ({self._in_a_row} times without a new checkpoint)",
                where=self._run_name,
                fix="the same command goes on from the last checkpoint; scale.retries sets the limit",
            ) from error

    def words(self, error: Exception) -> str:
        again = f"starting again from step {self._reached} ({self._in_a_row} of {self._retries})"
        return f"{first_line(error)}; {again}"


def _find(error: BaseException, kind: type[BaseException], depth: int = 0) -> BaseException | None:
    """The first error of a kind among the workers' failures and causes that Ray wrapped around each other."""
    if isinstance(error, kind):
        return error
    inside: list[Any] = list(getattr(error, "worker_failures", {}).values())
    inside += [getattr(error, name, None) for name in ("_base_exc", "cause", "controller_failure", "__cause__")]
    for inner in inside if depth < 8 else ():
        if isinstance(inner, BaseException):
            found = _find(inner, kind, depth + 1)
            if found is not None:
                return found
    return None


def first_line(error: BaseException) -> str:
    """What went wrong in one line: the failing worker's own error where Ray tells it."""
    failures = getattr(error, "worker_failures", None) or {}
    own = {rank: getattr(failure, "_base_exc", failure) for rank, failure in failures.items()}
    # The one that failed first makes the others fail, and Ray may find them all at the same look.
    for rank, inner in sorted(own.items(), key=lambda pair: isinstance(pair[1], PeerLost)):
        return f"worker {rank}: {_head(inner)}"
    return _head(error)


def _head(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[0]}".removesuffix(": ")
