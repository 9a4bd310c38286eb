"""Storage in local or mounted folders."""

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
    """Local files, without fsspec: its local "create" checks first and then writes, so that two racing processes can
    both succeed.

    Parameters
    ----------
    root: folder below which no symbolic link is followed, so that a planted link cannot lead out of it. (A process
        that can write to the folder could still replace a file between the check and the access.)
    """

    is_remote = False
    _root = ""

    def __init__(self, root: str = "") -> None:
        self._root = root

    def read(self, path: str) -> bytes:
        self._raise_if_symlink(path)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # opening a pipe must not block
        except NotADirectoryError as error:  # as on an object store, a path below a file does not exist
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from error
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise StorageError("is not a regular file", where=path, fix="remove it")
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
        # Late writes of a superseded attempt can add files meanwhile. They stay, and are harmless.
        shutil.rmtree(path, onerror=_raise_unless_gone_or_refilled)

    def remove_temporary(self, temporary: str) -> None:
        self._raise_if_symlink(temporary)
        with suppress(FileNotFoundError):
            for name in os.listdir(temporary):
                with suppress(FileNotFoundError):
                    os.unlink(os.path.join(temporary, name))

    def _raise_if_symlink(self, *paths: str) -> None:
        """Refuse paths with a symbolic link below the root.

        Raises
        ------
        StorageError: with the path of the link.
        """
        for path in paths if self._root else ():
            while len(path) > len(self._root):
                if os.path.islink(path):
                    raise StorageError(
                        "is a symbolic link; links inside storage are not followed",
                        where=path,
                        fix="replace it by the folder itself, or give its target as --storage",
                    )
                path = os.path.dirname(path)

    def has_conditional_writes(self, folder: str) -> bool:
        return True

    def renew_credentials(self) -> None:
        return


@contextmanager
def _translate_disk_full(path: str, size: int) -> Iterator[None]:
    """Raise StorageFullError for a full disk or quota: retrying does not help, but the user can free space."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_FULL_ERRNOS:
            raise
        what = "the quota is used up" if error.errno == errno.EDQUOT else "the disk is full"
        raise StorageFullError(
            f"{what}: {size:,} bytes are needed, {_free_bytes(path):,} are free",
            where=path,
            fix="free some space, and run the same command again: it continues from the last checkpoint",
        ) from None


def _free_bytes(path: str) -> int:
    """Return the free bytes on the disk of a path, which need not exist yet."""
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return shutil.disk_usage(path).free


@contextmanager
def _temporary_file(temporary: str, data: bytes, sync: bool) -> Iterator[str]:
    """Yield the path of a temporary file with this content, removed at the end.

    If the file or a folder is removed meanwhile (by `remove_temporary` or by retention), the write raises a
    BlockingIOError, which `Storage` retries: callers do not expect FileNotFoundError from a write.
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
    """Make a folder and its missing parents, and sync the entry of each in its parent."""
    if os.path.isdir(path):
        return
    parent = os.path.dirname(path)
    _make_folder(parent)
    with suppress(FileExistsError):
        os.mkdir(path)
        _sync_folder(parent)


def _sync_folder(path: str) -> None:
    """Make the names in a folder durable. A folder that was removed meanwhile is ignored."""
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
