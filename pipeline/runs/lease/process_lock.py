"""A lock that dies with its process, by which another process of this machine can prove that death."""

from __future__ import annotations

import fcntl
import os
import re
import tempfile
from contextlib import suppress
from pathlib import Path

from pipeline.runs.journal.entries import Claim

_HELD_DESCRIPTORS: dict[str, int] = {}
"""Open files of the locks that this process holds, by path. A second opening and closing here would lose one."""


class ProcessLock:
    """A lock file in this machine's temporary folder, held until the process ends or `release`.

    POSIX record locks belong to a process: unlike those of `flock`, they do not live on in loader processes that were
    forked from it.
    """

    def __init__(self, nonce: str) -> None:
        self.path = os.path.join(tempfile.gettempdir(), f"trainyard-{nonce}.lock")
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _HELD_DESCRIPTORS[self.path] = descriptor

    def release(self, *, remove: bool) -> None:
        """Let go. The file stays as proof unless `remove`, which is for an attempt that has said it is over."""
        descriptor = _HELD_DESCRIPTORS.pop(self.path, None)
        if descriptor is None:
            return
        if remove:
            with suppress(FileNotFoundError):
                os.unlink(self.path)
        os.close(descriptor)


def read_boot_id() -> str:
    """Identifies this life of this machine; empty where that cannot be known."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def is_held(claim: Claim) -> bool | None:
    """Whether the process of a claim lives: True or False where that can be proven from here, else None.

    The proof of death: it ran in this life of this machine, its very lock file is still here, and its lock is free.
    """
    if not claim.boot or claim.boot != read_boot_id() or not _is_lock_path(claim):
        return None
    if claim.lock in _HELD_DESCRIPTORS:
        return True
    try:
        descriptor = os.open(claim.lock, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:  # another container's folder, swept away, or another user's: no proof
        return None
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two who look do not see each other
    except (BlockingIOError, PermissionError):  # what a held lock gives, by platform
        return True
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return False


def delete_stale_lock(claim: Claim) -> None:
    """Remove the lock file of an attempt that is proven dead and was followed by another."""
    if is_held(claim) is False:
        with suppress(OSError):
            os.unlink(claim.lock)


def _is_lock_path(claim: Claim) -> bool:
    """Whether the path is one that `ProcessLock` gives here: it comes from storage and must not name other files."""
    folder, name = os.path.split(claim.lock)
    return bool(re.fullmatch(r"trainyard-[0-9a-f]+\.lock", name)) and folder == tempfile.gettempdir()
