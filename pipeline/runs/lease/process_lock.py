"""A lock that is released when its process ends, so that other processes of this machine can prove that it has."""

from __future__ import annotations

import fcntl
import os
import re
import tempfile
from contextlib import suppress
from pathlib import Path

from pipeline.runs.journal.entries import Claim

_HELD_DESCRIPTORS: dict[str, int] = {}
"""Open files of the locks that this process holds, by path. Closing another descriptor of the file would release it."""


class ProcessLock:
    """A lock file in this machine's temporary folder, held until the process ends or `release`.

    POSIX record locks belong to a process: unlike `flock` locks, they are not inherited by forked loader processes.
    """

    def __init__(self, nonce: str) -> None:
        self.path = os.path.join(tempfile.gettempdir(), f"trainyard-{nonce}.lock")
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _HELD_DESCRIPTORS[self.path] = descriptor

    def release(self, *, remove: bool) -> None:
        """Release the lock. The file is kept as proof unless `remove`, for an attempt whose end is in the journal."""
        descriptor = _HELD_DESCRIPTORS.pop(self.path, None)
        if descriptor is None:
            return
        if remove:
            with suppress(FileNotFoundError):
                os.unlink(self.path)
        os.close(descriptor)


def read_boot_id() -> str:
    """Return the boot ID of this machine; empty if unknown."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def is_held(claim: Claim) -> bool | None:
    """Whether the process of a claim is running: True or False if this machine can prove it, else None.

    It has certainly ended if its boot ID is that of this machine, its lock file still exists, and the lock is free.
    """
    if not claim.boot or claim.boot != read_boot_id() or not _is_lock_path(claim):
        return None
    if claim.lock in _HELD_DESCRIPTORS:
        return True
    try:
        descriptor = os.open(claim.lock, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:  # in another container's folder, deleted, or of another user: no proof
        return None
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: concurrent checks do not block each other
    except (BlockingIOError, PermissionError):  # the errors for a held lock, depending on the platform
        return True
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return False


def delete_stale_lock(claim: Claim) -> None:
    """Remove the lock file of an attempt that is proven dead and was superseded."""
    if is_held(claim) is False:
        with suppress(OSError):
            os.unlink(claim.lock)


def _is_lock_path(claim: Claim) -> bool:
    """Whether `ProcessLock` on this machine would use the path: it comes from storage and must not name other files."""
    folder, name = os.path.split(claim.lock)
    return bool(re.fullmatch(r"trainyard-[0-9a-f]+\.lock", name)) and folder == tempfile.gettempdir()
