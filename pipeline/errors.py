"""The exceptions that Trainyard raises on purpose, each with the exit code of the command that it ends.

TrainyardError                 exit 1    base class: what is wrong, where, and how to fix it
├── InputError                 exit 2    a job file, option, URL or data that cannot be used; found before training
│   ├── JobError               exit 2    a field of a job file
│   ├── DataError              exit 2    rows, labels or files that do not fit the job
│   ├── StorageError           exit 2    a storage URL that cannot be used at all
│   └── ClusterError           exit 2    a cluster that does not respond, or rejects what it receives
├── WorkError                  exit 1    the work itself failed
│   ├── HungError              exit 1    no progress for longer than `scale.hang_s`
│   ├── NotFiniteError         exit 1    a loss, gradient or weight is NaN or infinite; never retried
│   ├── StorageLostError       exit 1    storage was unavailable for longer than its limit
│   │   └── StorageFullError   exit 1    storage has no space left
│   ├── OutOfMemoryError       exit 1    a batch did not fit into memory; never retried
│   ├── RepeatedFailureError   exit 1    the same error at the same step twice: a bug, not a transient fault
│   └── WorkerLostError        exit 1    workers or nodes failed more often than `scale.retries` allows
├── BusyError                  exit 3    not now: another process is writing this run
│   └── SupersededError        exit 3    a later attempt of the same run has taken over
└── Interrupted                exit 130 (SIGINT) or 143 (SIGTERM, SIGHUP); the run can be resumed

All of them survive pickling, because they cross process boundaries.
"""

from __future__ import annotations

import signal
from typing import Any


class TrainyardError(Exception):
    """Base class of all errors that a user can act on.

    Parameters
    ----------
    what: the problem in one sentence, with the invalid value.
    where: the file, field, URL or row concerned.
    fix: how to fix it.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.fix = fix

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        return f"{head}\n  {self.fix}" if self.fix else head

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.what, self.where, self.fix, self.__dict__.copy())


def _rebuild(
    error_type: type[TrainyardError], what: str, where: str, fix: str, state: dict[str, Any]
) -> TrainyardError:
    error = error_type.__new__(error_type)
    TrainyardError.__init__(error, what, where=where, fix=fix)
    error.__dict__.update(state)
    return error


class InputError(TrainyardError):
    """Invalid input, found before any training starts."""

    exit_code = 2


class JobError(InputError):
    """A field of a job file that cannot be used."""


class DataError(InputError):
    """Data that does not match its description in the job."""


class StorageError(InputError):
    """A storage URL that cannot be used."""


class ClusterError(InputError):
    """A Ray cluster that does not respond, or rejects what it receives."""


class WorkError(TrainyardError):
    """The work itself failed."""

    exit_code = 1


class NotFiniteError(WorkError):
    """A loss, gradient or weight is NaN or infinite. Deterministic, so never retried."""


class HungError(WorkError):
    """A process made no progress for longer than `scale.hang_s`."""


class StorageLostError(WorkError):
    """Storage was unavailable for longer than its limit."""


class OutOfMemoryError(WorkError):
    """A worker ran out of host or device memory. Deterministic, so never retried."""


class RepeatedFailureError(WorkError):
    """A worker failed with the same error at the same step as in the previous attempt."""


class StorageFullError(StorageLostError):
    """Storage has no space left for what has to be written."""


class WorkerLostError(WorkError):
    """A worker was lost, and the retries that the job allows are used up."""


class BusyError(TrainyardError):
    """Another process is writing this run."""

    exit_code = 3


class SupersededError(BusyError):
    """A later attempt of the same run has taken over; this one writes nothing more."""


class Interrupted(TrainyardError):
    """Stopped by a signal after saving; the same command resumes."""

    def __init__(self, what: str, *, signal_number: int = signal.SIGINT, fix: str = "") -> None:
        super().__init__(what, fix=fix)
        self.signal_number = int(signal_number)

    @property
    def exit_code(self) -> int:  # type: ignore[override]
        """128 plus the signal number, as in shells: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + self.signal_number
