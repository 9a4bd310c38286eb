"""Every error that Trainyard raises on purpose, in one tree.

TrainyardError                 what is wrong, where, and what to do about it
├── InputError                 exit 2: a job file, flag, URL or data that cannot be used; found before training
│   ├── JobError               ... a field of a job file
│   ├── DataError              ... rows, labels or files that do not fit
│   ├── StorageError           ... a URL that cannot be used at all
│   └── ClusterError           ... a cluster that does not answer, or does not take what it is sent
├── WorkError                  exit 1: the work itself failed
│   ├── HungError              ... no progress for longer than `scale.hang_s`
│   ├── NotFiniteError         ... a loss or weight became NaN or infinite; never retried
│   ├── StorageLostError       ... storage stayed away for longer than the stated limit
│   │   └── StorageFullError   ... there is no room left in it
│   ├── OutOfMemoryError       ... a batch did not fit into memory; never retried
│   ├── RepeatedFailureError   ... the same error at the same step twice: a bug, not a fault
│   └── WorkerLostError        ... a worker or its node died, more often than `scale.retries` allows
├── BusyError                  exit 3: not now
│   └── SupersededError        ... a later attempt of the same run has taken over
└── Interrupted                exit 130 or 143: stopped by a signal, resumable

All of them survive pickling, because they cross process boundaries.
"""

from __future__ import annotations

import signal
from typing import Any


class TrainyardError(Exception):
    """Something that a person can act on.

    Parameters
    ----------
    what: the problem in one sentence, with the offending value.
    where: the file, field, URL or row that it concerns.
    fix: what to do about it.
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
    """Bad input, found before any training starts."""

    exit_code = 2


class JobError(InputError):
    """A field of a job file that cannot be used."""


class DataError(InputError):
    """Data that does not fit what the job says of it."""


class StorageError(InputError):
    """A storage URL that cannot be used."""


class ClusterError(InputError):
    """A Ray cluster that does not answer, or does not take what it is sent."""


class WorkError(TrainyardError):
    """The work itself failed."""

    exit_code = 1


class NotFiniteError(WorkError):
    """A loss, gradient or weight is NaN or infinite. Deterministic, so never retried."""


class HungError(WorkError):
    """A process made no progress for longer than `scale.hang_s`."""


class StorageLostError(WorkError):
    """Storage stayed away for longer than the stated limit."""


class OutOfMemoryError(WorkError):
    """A worker had not enough memory, of its machine or of its device. It would not have next time either."""


class RepeatedFailureError(WorkError):
    """A worker failed with the same error at the same step as the time before."""


class StorageFullError(StorageLostError):
    """There is no room left for what has to be written."""


class WorkerLostError(WorkError):
    """A worker died, and the retries that the job allows are used up."""


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
        """128 plus the signal's number, as shells count: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + self.signal_number
