"""What failed on a worker, in a form that crosses processes whatever the error was.

Losses of workers: what was lost, told in one line, and whether to start again.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from pipeline.cluster.ray_internals import unwrap_user_exception
from pipeline.context import PeerFailure
from pipeline.errors import Interrupted, OutOfMemoryError, RepeatedFailureError, TrainyardError, WorkerLostError
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


RESUME_HINT = "the same command goes on from the last checkpoint"
OOM_HINT = "lower train.batch_size, or set train.micro_batch: the same result from smaller pieces"


class FailurePolicy:
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
        self._last_committed_step = highest_step()
        self._consecutive_failures = 0
        self._num_out_of_memory = 0
        self._last_failure: WorkerFailure | None = None
        self.has_failed = False
        """Whether there was a loss, or a notice of one."""

    def decide_preemption(self) -> None:
        """The workers saved and left, for a part of the cluster will be gone. That is no loss, unless they never get
        any further.

        Raises
        ------
        WorkerLostError: one time too many.
        """
        self._count_failure("the workers were told to leave", "")

    def decide(self, error: BaseException, signal_number: int) -> None:
        """Count a loss; progress since the one before begins the count anew.

        Raises
        ------
        TrainyardError: what a worker itself said; a signal that asked to stop; a failure that repeats itself; memory
            that ran out twice; or one loss too many.
        """
        trainyard_error = next((cause for cause in _iter_causes(error) if isinstance(cause, TrainyardError)), None)
        if trainyard_error is not None:
            raise trainyard_error from None
        summary = summary_line(error)
        if signal_number:
            raise Interrupted(
                f"stopped after a loss ({summary})", signal_number=signal_number, fix=RESUME_HINT
            ) from error
        failure = _failing_worker(error)
        self._check_memory(error, summary)
        if failure is not None and self._last_failure is not None and _is_same_failure(failure, self._last_failure):
            raise RepeatedFailureError(
                f"{summary}, twice with the same error{_format_step(failure)}: a bug, not a "
                f"fault\n{failure.traceback_text.rstrip()}",
                where=self._run_name,
                fix=f"mend it; {RESUME_HINT}",
            ) from None
        self._last_failure = failure
        self._count_failure(summary, f"\n{failure.traceback_text.rstrip()}" if failure is not None else "")

    def describe(self, error: BaseException) -> str:
        """What was lost, and where it goes on."""
        again = (
            f"starting again from step {self._last_committed_step} ({self._consecutive_failures} of {self._retries})"
        )
        return f"{summary_line(error)}; {again}"

    def _count_failure(self, summary: str, traceback_text: str) -> None:
        self.has_failed = True
        reached = self._highest_step()
        self._consecutive_failures = self._consecutive_failures + 1 if reached <= self._last_committed_step else 1
        self._last_committed_step = reached
        if self._consecutive_failures > self._retries:
            times = (
                f"{self._consecutive_failures} times without a new checkpoint"
                if self._retries
                else "scale.retries is 0"
            )
            raise WorkerLostError(
                f"{summary} ({times}){traceback_text}",
                where=self._run_name,
                fix=f"{RESUME_HINT}; scale.retries sets the limit",
            )

    def _check_memory(self, error: BaseException, summary: str) -> None:
        """Ray ends the hungriest worker of a machine that runs out of memory: that may be another's fault once."""
        if any(type(cause).__name__ == "OutOfMemoryError" for cause in _iter_causes(error)):
            self._num_out_of_memory += 1
            if self._num_out_of_memory > 1:
                raise OutOfMemoryError(f"{summary}, for the second time", where=self._run_name, fix=OOM_HINT)


def _is_same_failure(failure: WorkerFailure, other: WorkerFailure) -> bool:
    return (failure.summary, failure.step) == (other.summary, other.step)


def _format_step(failure: WorkerFailure) -> str:
    return f" at step {failure.step}" if failure.step is not None else ""


def summary_line(error: BaseException) -> str:
    """What went wrong in one line: the failing worker's own error where Ray tells it."""
    if isinstance(error, WorkerHang):
        return str(error)
    worker_failure = _failing_worker(error)
    if worker_failure is not None:
        return f"worker {worker_failure.rank} failed{_format_step(worker_failure)}: {worker_failure.summary}"
    for rank, failure in _worker_failures(error).items():
        if not isinstance(failure, WorkerFailure):
            return f"worker {rank} was lost ({_describe_cause(failure)})"
    if _worker_failures(error):
        return "a worker was lost"
    return (
        f"{_lost_actor_name(error)} was lost ({_describe_cause(error)})"
        if _is_actor_error(error)
        else _describe_cause(error)
    )


def _failing_worker(error: BaseException) -> WorkerFailure | None:
    """The worker whose own error it was. It makes the others fail, and Ray may find them all at the same look."""
    failures = [
        failure
        for failure in _worker_failures(error).values()
        if isinstance(failure, WorkerFailure) and not failure.is_consequence
    ]
    return failures[0] if failures else None


def _worker_failures(error: BaseException) -> dict[int, BaseException]:
    """By rank, what Ray Train says of its workers."""
    for cause in _iter_causes(error):
        failures = getattr(cause, "worker_failures", None)
        if failures:
            return {rank: unwrap_user_exception(failure) or failure for rank, failure in sorted(failures.items())}
    return {}


def _iter_causes(error: BaseException, depth: int = 0) -> Iterator[BaseException]:
    """An error, and those that Ray wrapped around each other in it."""
    yield error
    causes: list[Any] = list(getattr(error, "worker_failures", {}).values())
    names = ("cause", "controller_failure", "health_check_failure", "__cause__")
    causes += [unwrap_user_exception(error), *(getattr(error, name, None) for name in names)]
    for cause in causes if depth < 8 else ():
        if isinstance(cause, BaseException):
            yield from _iter_causes(cause, depth + 1)


_REASON_PATTERNS = (
    (r"running low on memory|OutOfMemory|memory usage threshold", "its machine ran out of memory, and Ray ended it"),
    (r"node (has )?died|node was terminated|node is dead|node failure|DRAIN|preempt", "its node is gone"),
    (r"SIGKILL|connection error code|unexpectedly|died|killed", "its process was ended from outside"),
    (r"health check|timed out|unavailable|RpcError", "it did not answer"),
)


def _is_actor_error(error: BaseException) -> bool:
    return type(error).__name__.startswith("Actor")  # ActorDiedError, ActorUnavailableError, ...


def _lost_actor_name(error: BaseException) -> str:
    return "Ray Train's controller" if "TrainController" in _causes_text(error) else "a helper process of Ray's"


def _describe_cause(error: BaseException) -> str:
    """Ray's many words for a loss, in a few where they are known."""
    if getattr(error, "actor_init_failed", False):  # what it raised when it began stands last
        return str(error).strip().splitlines()[-1].strip()
    return match_reason(_causes_text(error)) or format_error_line(error)


def _causes_text(error: BaseException) -> str:
    return " ".join(f"{type(cause).__name__}: {cause}" for cause in _iter_causes(error))


def match_reason(text: str) -> str:
    """What Ray's words for a loss come to, such as a paragraph on the common causes of a `connection error code 2`;
    empty where they are none that is known."""
    return next((reason for pattern, reason in _REASON_PATTERNS if re.search(pattern, text, re.IGNORECASE)), "")
