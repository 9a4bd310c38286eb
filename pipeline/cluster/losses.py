"""Losses of workers: what was lost, told in one line, and whether to start again."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from pipeline.cluster.failure import WorkerFailed, WorkerHung, head
from pipeline.cluster.ray_internals import unwrap_user_exception
from pipeline.errors import Interrupted, OutOfMemoryError, RepeatedFailureError, TrainyardError, WorkerLostError

AGAIN = "the same command goes on from the last checkpoint"
SMALLER = "lower train.batch_size, or set train.micro_batch: the same result from smaller pieces"


class Losses:
    """Counts losses in a row, and decides which of them end the run.

    Parameters
    ----------
    retries: losses in a row that a new start makes good; progress in between starts the count anew.
    highest_step: the latest committed step.
    """

    def __init__(self, run_name: str, retries: int, highest_step: Callable[[], int]) -> None:
        self._run_name = run_name
        self._retries = retries
        self._highest_step = highest_step
        self._reached = highest_step()
        self._in_a_row = 0
        self._out_of_memory = 0
        self._last_failed: WorkerFailed | None = None
        self.any = False
        """Whether there was a loss, or a notice of one."""

    def take_notice(self) -> None:
        """The workers saved and left, for a part of the cluster will be gone. That is no loss, unless they never get
        any further.

        Raises
        ------
        WorkerLostError: one time too many.
        """
        self._count("the workers were told to leave", "")

    def take(self, error: BaseException, signal_number: int) -> None:
        """Count a loss; progress since the one before begins the count anew.

        Raises
        ------
        TrainyardError: what a worker itself said; a signal that asked to stop; a failure that repeats itself; memory
            that ran out twice; or one loss too many.
        """
        trainyard_error = next((cause for cause in _inside(error) if isinstance(cause, TrainyardError)), None)
        if trainyard_error is not None:
            raise trainyard_error from None
        summary = first_line(error)
        if signal_number:
            raise Interrupted(f"stopped after a loss ({summary})", signal_number=signal_number, fix=AGAIN) from error
        failure = _culprit(error)
        self._check_memory(error, summary)
        if failure is not None and self._last_failed is not None and _same(failure, self._last_failed):
            raise RepeatedFailureError(
                f"{summary}, twice with the same error{_at(failure)}: a bug, not a fault\n{failure.trace.rstrip()}",
                where=self._run_name,
                fix=f"mend it; {AGAIN}",
            ) from None
        self._last_failed = failure
        self._count(summary, f"\n{failure.trace.rstrip()}" if failure is not None else "")

    def words(self, error: BaseException) -> str:
        """What was lost, and where it goes on."""
        again = f"starting again from step {self._reached} ({self._in_a_row} of {self._retries})"
        return f"{first_line(error)}; {again}"

    def _count(self, line: str, trace: str) -> None:
        self.any = True
        reached = self._highest_step()
        self._in_a_row = self._in_a_row + 1 if reached <= self._reached else 1
        self._reached = reached
        if self._in_a_row > self._retries:
            times = f"{self._in_a_row} times without a new checkpoint" if self._retries else "scale.retries is 0"
            raise WorkerLostError(
                f"{line} ({times}){trace}", where=self._run_name, fix=f"{AGAIN}; scale.retries sets the limit"
            )

    def _check_memory(self, error: BaseException, line: str) -> None:
        """Ray ends the hungriest worker of a machine that runs out of memory: that may be another's fault once."""
        if any(type(cause).__name__ == "OutOfMemoryError" for cause in _inside(error)):
            self._out_of_memory += 1
            if self._out_of_memory > 1:
                raise OutOfMemoryError(f"{line}, for the second time", where=self._run_name, fix=SMALLER)


def _same(one: WorkerFailed, other: WorkerFailed) -> bool:
    return (one.line, one.step) == (other.line, other.step)


def _at(failed: WorkerFailed) -> str:
    return f" at step {failed.step}" if failed.step is not None else ""


def first_line(error: BaseException) -> str:
    """What went wrong in one line: the failing worker's own error where Ray tells it."""
    if isinstance(error, WorkerHung):
        return str(error)
    worker_failure = _culprit(error)
    if worker_failure is not None:
        return f"worker {worker_failure.rank} failed{_at(worker_failure)}: {worker_failure.line}"
    for rank, failure in _failures(error).items():
        if not isinstance(failure, WorkerFailed):
            return f"worker {rank} was lost ({_why(failure)})"
    if _failures(error):
        return "a worker was lost"
    return f"{_lost_actor(error)} was lost ({_why(error)})" if _is_dead_actor(error) else _why(error)


def _culprit(error: BaseException) -> WorkerFailed | None:
    """The worker whose own error it was. It makes the others fail, and Ray may find them all at the same look."""
    failures = [failure for failure in _failures(error).values() if isinstance(failure, WorkerFailed) and not failure.is_consequence]
    return failures[0] if failures else None


def _failures(error: BaseException) -> dict[int, BaseException]:
    """By rank, what Ray Train says of its workers."""
    for cause in _inside(error):
        failures = getattr(cause, "worker_failures", None)
        if failures:
            return {rank: unwrap_user_exception(failure) or failure for rank, failure in sorted(failures.items())}
    return {}


def _inside(error: BaseException, depth: int = 0) -> Iterator[BaseException]:
    """An error, and those that Ray wrapped around each other in it."""
    yield error
    causes: list[Any] = list(getattr(error, "worker_failures", {}).values())
    names = ("cause", "controller_failure", "health_check_failure", "__cause__")
    causes += [unwrap_user_exception(error), *(getattr(error, name, None) for name in names)]
    for cause in causes if depth < 8 else ():
        if isinstance(cause, BaseException):
            yield from _inside(cause, depth + 1)


_REASONS = (
    (r"running low on memory|OutOfMemory|memory usage threshold", "its machine ran out of memory, and Ray ended it"),
    (r"node (has )?died|node was terminated|node is dead|node failure|DRAIN|preempt", "its node is gone"),
    (r"SIGKILL|connection error code|unexpectedly|died|killed", "its process was ended from outside"),
    (r"health check|timed out|unavailable|RpcError", "it did not answer"),
)


def _is_dead_actor(error: BaseException) -> bool:
    return type(error).__name__.startswith("Actor")  # ActorDiedError, ActorUnavailableError, ...


def _lost_actor(error: BaseException) -> str:
    return "Ray Train's controller" if "TrainController" in _text(error) else "a helper process of Ray's"


def _why(error: BaseException) -> str:
    """Ray's many words for a loss, in a few where they are known."""
    if getattr(error, "actor_init_failed", False):  # what it raised when it began stands last
        return str(error).strip().splitlines()[-1].strip()
    return reason_in(_text(error)) or head(error)


def _text(error: BaseException) -> str:
    return " ".join(f"{type(cause).__name__}: {cause}" for cause in _inside(error))


def reason_in(text: str) -> str:
    """What Ray's words for a loss come to, such as a paragraph on the common causes of a `connection error code 2`;
    empty where they are none that is known."""
    return next((reason for pattern, reason in _REASONS if re.search(pattern, text, re.IGNORECASE)), "")
