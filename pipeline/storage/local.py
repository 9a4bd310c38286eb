"""Storage in folders of this machine (or mounted by it)."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from pipeline.errors import StorageError

_NO_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})


class LocalBackend:
    """Plain files. fsspec is passed by: its local "create" is a check and then a write, which two racers pass."""

    far = False

    def read(self, path: str) -> bytes:
        with open(path, "rb") as file:
            return file.read()

    def replace(self, path: str, data: bytes, temporary: str, sync: bool) -> None:
        with _written(temporary, data, sync) as unfinished:
            _make_folder(os.path.dirname(path))
            os.replace(unfinished, path)
        if sync:
            _sync_folder(os.path.dirname(path))

    def create(self, path: str, data: bytes, temporary: str) -> None:
        with _written(temporary, data, sync=True) as unfinished:
            _make_folder(os.path.dirname(path))
            try:
                os.link(unfinished, path)
            except OSError as error:
                if error.errno in _NO_LINKS:
                    raise StorageError(
                        "this file system has no hard links, so no file can be created exclusively",
                        where=path,
                        fix="use a folder on another file system, or an object store",
                    ) from None
                raise
        _sync_folder(os.path.dirname(path))

    def list(self, path: str) -> list[str]:
        return os.listdir(path)

    def exists(self, path: str) -> bool:
        return os.path.exists(path)

    def delete(self, path: str) -> None:
        os.unlink(path)

    def delete_folder(self, path: str) -> None:
        # Late writes of a superseded attempt can put files here meanwhile: they stay, and are harmless.
        shutil.rmtree(path, onerror=_unless_gone_or_refilled)

    def sweep(self, temporary: str) -> None:
        with suppress(FileNotFoundError):
            for name in os.listdir(temporary):
                with suppress(FileNotFoundError):
                    os.unlink(os.path.join(temporary, name))

    def conditional_writes(self, folder: str) -> bool:
        return True


@contextmanager
def _written(temporary: str, data: bytes, sync: bool) -> Iterator[str]:
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


def _unless_gone_or_refilled(_function: object, _path: str, info: tuple[object, BaseException, object]) -> None:
    error = info[1]
    if not isinstance(error, OSError) or error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
        raise error
