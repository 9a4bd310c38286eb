"""The policy for worker failures: describe a failure in one line, and decide whether to start another attempt."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from pipeline.cluster.ray_internals import unwrap_user_exception
from pipeline.context import PeerFailure
from pipeline.errors import Interrupted, OutOfMemoryError, RepeatedFailureError, TrainyardError, WorkerLostError
from pipeline.redaction import redact

RESUME_HINT = "the same command resumes from the last checkpoint"
OOM_HINT = "lower train.batch_size, or set train.micro_batch: the same result from smaller micro-batches"

_REASON_PATTERNS = (
    (r"running low on memory|OutOfMemory|memory usage threshold", "its machine ran out of memory, and Ray killed it"),
    (r"node (has )?died|node was terminated|node is dead|node failure|DRAIN|preempt", "its node was lost"),
    (r"SIGKILL|connection error code|unexpectedly|died|killed", "its process was killed"),
    (r"health check|timed out|unavailable|RpcError", "it did not respond"),
)
"""Patterns in Ray's error messages, and the reason that each stands for. The first that matches counts."""


class WorkerFailure(Exception):
    """An error on one worker. It can be pickled, whatever the error was.

    Parameters
    ----------
    rank: of the worker.
    step: the step in which it failed; None before the first.
    summary: the error's type and the first line of its message.
    traceback_text: its traceback.
    is_consequence: True if the error was only caused by the failure of another worker.
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
        """Describe an error that was raised on this worker."""
        step = getattr(error, "step", None)
        traceback_text = redact("".join(traceback.format_exception(error)))  # Ray logs what is raised
        return cls(rank, step, redact(format_error_line(error)), traceback_text, isinstance(error, PeerFailure))

    def __reduce__(self) -> tuple[Any, ...]:
        return WorkerFailure, (self.rank, self.step, self.summary, self.traceback_text, self.is_consequence)


class WorkerHang(Exception):
    """A worker made no progress and ended itself. The message names the worker and the line of code; the cause is the
    error that Ray reported."""


class FailurePolicy:
    """Counts consecutive failures, and decides which of them end the run.

    Parameters
    ----------
    run_name: for messages.
    retries: how many consecutive failures lead to another attempt. A new checkpoint resets the count.
    highest_step: returns the latest committed step.
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
        """Whether there was a failure or a preemption."""

    def decide(self, error: BaseException, signal_number: int) -> None:
        """Count a failure. Returns if another attempt is to be started.

        Parameters
        ----------
        signal_number: the signal that asked the run to stop, or 0.

        Raises
        ------
        TrainyardError: the run ends: with the TrainyardError that a worker raised; because of the signal; because the
            same error occurred at the same step twice; because memory ran out twice; or because there were too many
            failures.
        """
        trainyard_error = next((cause for cause in _iter_causes(error) if isinstance(cause, TrainyardError)), None)
        if trainyard_error is not None:
            raise trainyard_error from None
        summary = summary_line(error)
        if signal_number:
            raise Interrupted(
                f"stopped after a failure ({summary})", signal_number=signal_number, fix=RESUME_HINT
            ) from error
        failure = _failing_worker(error)
        self._check_memory(error, summary)
        if failure is not None and self._last_failure is not None and _is_same_failure(failure, self._last_failure):
            raise RepeatedFailureError(
                f"{summary}, twice with the same error{_format_step(failure)}: a bug, not a "
                f"fault\n{failure.traceback_text.rstrip()}",
                where=self._run_name,
                fix=f"fix the error; then {RESUME_HINT}",
            ) from None
        self._last_failure = failure
        self._count_failure(summary, f"\n{failure.traceback_text.rstrip()}" if failure is not None else "")

    def decide_preemption(self) -> None:
        """Count a preemption: the workers saved and stopped because a node will be removed. This is not a failure,
        unless it happens again and again without progress.

        Raises
        ------
        WorkerLostError: too many preemptions without progress.
        """
        self._count_failure("the workers were preempted", "")

    def describe(self, error: BaseException) -> str:
        """Return a line on a failure after `decide`: what failed, and at which step training continues."""
        restart = (
            f"starting again from step {self._last_committed_step} ({self._consecutive_failures} of {self._retries})"
        )
        return f"{summary_line(error)}; {restart}"

    def _count_failure(self, summary: str, traceback_text: str) -> None:
        self.has_failed = True
        highest_step = self._highest_step()
        has_progress = highest_step > self._last_committed_step
        self._consecutive_failures = 1 if has_progress else self._consecutive_failures + 1
        self._last_committed_step = highest_step
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
        """Ray kills the worker that uses the most memory on a machine that runs out of it. Once, that may be the fault
        of another process."""
        if any(type(cause).__name__ == "OutOfMemoryError" for cause in _iter_causes(error)):
            self._num_out_of_memory += 1
            if self._num_out_of_memory > 1:
                raise OutOfMemoryError(f"{summary}, for the second time", where=self._run_name, fix=OOM_HINT)


def summary_line(error: BaseException) -> str:
    """Describe a failure in one line, by the failing worker's own error if Ray reports it."""
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


def format_error_line(error: BaseException) -> str:
    """Return an error's type and the first line of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[0]}".removesuffix(": ")


def match_reason(text: str) -> str:
    """Return the reason that one of Ray's error messages gives, in a few words; empty if it is not a known one.

    Ray's own text can be a paragraph, such as the one on the common causes of a `connection error code 2`.
    """
    return next((reason for pattern, reason in _REASON_PATTERNS if re.search(pattern, text, re.IGNORECASE)), "")


def _is_same_failure(failure: WorkerFailure, other: WorkerFailure) -> bool:
    return (failure.summary, failure.step) == (other.summary, other.step)


def _format_step(failure: WorkerFailure) -> str:
    return f" at step {failure.step}" if failure.step is not None else ""


def _failing_worker(error: BaseException) -> WorkerFailure | None:
    """Return the failure that is no consequence of another one. The other workers fail because of it, and Ray may
    report all of them at once."""
    failures = [
        failure
        for failure in _worker_failures(error).values()
        if isinstance(failure, WorkerFailure) and not failure.is_consequence
    ]
    return failures[0] if failures else None


def _worker_failures(error: BaseException) -> dict[int, BaseException]:
    """Return the errors that Ray Train reports for its workers, by rank."""
    for cause in _iter_causes(error):
        failures = getattr(cause, "worker_failures", None)
        if failures:
            return {rank: unwrap_user_exception(failure) or failure for rank, failure in sorted(failures.items())}
    return {}


def _iter_causes(error: BaseException, depth: int = 0) -> Iterator[BaseException]:
    """Iterate over an error and those that Ray wrapped in it."""
    yield error
    causes: list[Any] = list(getattr(error, "worker_failures", {}).values())
    names = ("cause", "controller_failure", "health_check_failure", "__cause__")
    causes += [unwrap_user_exception(error), *(getattr(error, name, None) for name in names)]
    for cause in causes if depth < 8 else ():
        if isinstance(cause, BaseException):
            yield from _iter_causes(cause, depth + 1)


def _is_actor_error(error: BaseException) -> bool:
    return type(error).__name__.startswith("Actor")  # ActorDiedError, ActorUnavailableError, ...


def _lost_actor_name(error: BaseException) -> str:
    return "Ray Train's controller" if "TrainController" in _causes_text(error) else "a helper process of Ray"


def _describe_cause(error: BaseException) -> str:
    if getattr(error, "actor_init_failed", False):  # the error of the actor's constructor is the last line
        return str(error).strip().splitlines()[-1].strip()
    return match_reason(_causes_text(error)) or format_error_line(error)


def _causes_text(error: BaseException) -> str:
    return " ".join(f"{type(cause).__name__}: {cause}" for cause in _iter_causes(error))
