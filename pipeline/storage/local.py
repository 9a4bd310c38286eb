"""Storage in folders of this machine (or mounted by it)."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from pipeline.errors import StorageError, StorageFullError

_NO_HARD_LINKS_ERRNOS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})
_DISK_FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT})


class LocalBackend:
    """Plain files. fsspec is passed by: its local "create" is a check and then a write, which two racers pass.

    Parameters
    ----------
    top: folder below which no symbolic link is followed: nothing that somebody put there leads out of it. (Who can
        write there at this very moment could still be quicker than the check.)
    """

    is_remote = False
    _root = ""

    def __init__(self, root: str = "") -> None:
        self._root = root

    def read(self, path: str) -> bytes:
        self._raise_if_symlink(path)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would wait for its writer
        except NotADirectoryError as error:  # below a file, as on an object store, nothing is
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from error
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise StorageError("is no plain file", where=path, fix="remove it")
        with open(descriptor, "rb") as file:
            return file.read()

    def replace(self, path: str, data: bytes, temporary: str, sync: bool) -> None:
        self._raise_if_symlink(path, temporary)
        with _translate_disk_full(path, len(data)), _temporary_file(temporary, data, sync) as unfinished:
            _make_folder(os.path.dirname(path))
            os.replace(unfinished, path)
        if sync:
            _sync_folder(os.path.dirname(path))

    def upload(self, path: str, size: int) -> None:
        return None

    def create(self, path: str, data: bytes, temporary: str) -> None:
        self._raise_if_symlink(path, temporary)
        with _translate_disk_full(path, len(data)), _temporary_file(temporary, data, sync=True) as unfinished:
            _make_folder(os.path.dirname(path))
            try:
                os.link(unfinished, path)
            except OSError as error:
                if error.errno in _NO_HARD_LINKS_ERRNOS:
                    raise StorageError(
                        "this file system has no hard links, so no file can be created exclusively",
                        where=path,
                        fix="use a folder on another file system, or an object store",
                    ) from None
                raise
        _sync_folder(os.path.dirname(path))

    def list(self, path: str) -> list[str]:
        self._raise_if_symlink(path)
        return os.listdir(path)

    def exists(self, path: str) -> bool:
        self._raise_if_symlink(path)
        return os.path.exists(path)

    def delete(self, path: str) -> None:
        self._raise_if_symlink(path)
        os.unlink(path)

    def delete_folder(self, path: str) -> None:
        self._raise_if_symlink(path)
        # Late writes of a superseded attempt can put files here meanwhile: they stay, and are harmless.
        shutil.rmtree(path, onerror=_raise_unless_gone_or_refilled)

    def remove_temporary(self, temporary: str) -> None:
        self._raise_if_symlink(temporary)
        with suppress(FileNotFoundError):
            for name in os.listdir(temporary):
                with suppress(FileNotFoundError):
                    os.unlink(os.path.join(temporary, name))

    def _raise_if_symlink(self, *paths: str) -> None:
        """Refuse a path that goes through a symbolic link below the top.

        Raises
        ------
        StorageError: names the link.
        """
        for path in paths if self._root else ():
            while len(path) > len(self._root):
                if os.path.islink(path):
                    raise StorageError(
                        "is a symbolic link, and none is followed in storage",
                        where=path,
                        fix="put the folder itself there, or give the one that it leads to as --storage",
                    )
                path = os.path.dirname(path)

    def has_conditional_writes(self, folder: str) -> bool:
        return True

    def renew_credentials(self) -> None:
        return


@contextmanager
def _translate_disk_full(path: str, size: int) -> Iterator[None]:
    """Say what is wrong where a disk or a quota is full: no waiting cures that, but a person may."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_FULL_ERRNOS:
            raise
        what = "the quota is used up" if error.errno == errno.EDQUOT else "the disk is full"
        raise StorageFullError(
            f"{what}: {size:,} bytes are needed, {_free_bytes(path):,} are free",
            where=path,
            fix="make room there, and run the same command again: it goes on from the last checkpoint",
        ) from None


def _free_bytes(path: str) -> int:
    """Bytes that are free on the disk of a path that may not be there yet."""
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return shutil.disk_usage(path).free


@contextmanager
def _temporary_file(temporary: str, data: bytes, sync: bool) -> Iterator[str]:
    """Path of a temporary file with this content, gone at the end.

    Where it or a folder vanishes (a sweep, a retention) the write raises a BlockingIOError, which the door repeats:
    FileNotFoundError is no answer to a write.
    """
    path = os.path.join(temporary, secrets.token_hex(8))
    try:
        _make_folder(temporary)
        with open(path, "xb") as file:
            file.write(data)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        yield path
    except FileNotFoundError as error:
        raise BlockingIOError(errno.EAGAIN, f"a file or folder vanished during the write ({error})") from error
    finally:
        with suppress(FileNotFoundError, NotADirectoryError):
            os.unlink(path)


def _make_folder(path: str) -> None:
    """Make a folder and those above it, each entered durably into its parent."""
    if os.path.isdir(path):
        return
    parent = os.path.dirname(path)
    _make_folder(parent)
    with suppress(FileExistsError):
        os.mkdir(path)
        _sync_folder(parent)


def _sync_folder(path: str) -> None:
    """Make names in a folder durable; a folder that was removed meanwhile needs nothing."""
    with suppress(FileNotFoundError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _raise_unless_gone_or_refilled(_function: object, _path: str, info: tuple[object, BaseException, object]) -> None:
    error = info[1]
    if not isinstance(error, OSError) or error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
        raise error
