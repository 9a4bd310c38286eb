"""The protocol of a storage backend. `local` and `remote` implement it; a test may bring its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Upload(Protocol):
    """A multipart upload of one file. Readers see nothing of it before `complete`.

    Every method raises FileNotFoundError if the store has no such upload, or no longer has it.
    """

    part_bytes: int
    """Size of all parts but the last."""

    def put(self, number: int, data: bytes) -> str:
        """Send a part and return the store's tag for it. Parts count from 1; one that is sent again is replaced."""

    def complete(self, tags: Sequence[str]) -> None:
        """Assemble the file from the parts with these tags, in one step."""

    def abort(self) -> None:
        """Abort the upload, so that the store keeps no parts of it."""


class Backend(Protocol):
    """Plain operations on whole paths, each tried once. `Storage` retries them and classifies their errors.

    A path is a path of the backend's file system, "/"-separated. `temporary` is a folder on the same file system for
    unfinished files; object stores ignore it.
    """

    is_remote: bool
    """Whether requests take long enough for concurrent requests to pay off."""

    def read(self, path: str) -> bytes:
        """Return the whole content, never from a cache. FileNotFoundError if absent."""

    def replace(self, path: str, data: bytes, temporary: str, sync: bool) -> None:
        """Write the content in one step and make missing folders. `sync`: it survives a power loss."""

    def upload(self, path: str, size: int) -> Upload | None:
        """Begin to replace a file of `size` bytes in parts; None where the size is not worth it."""

    def create(self, path: str, data: bytes, temporary: str) -> None:
        """Write the whole content in one step, synced. FileExistsError if the path exists."""

    def list(self, path: str) -> list[str]:
        """Return the names of the files and folders in a folder, in any order. FileNotFoundError if absent."""

    def exists(self, path: str) -> bool:
        """Return whether there is a file or a folder."""

    def delete(self, path: str) -> None:
        """Remove a file. FileNotFoundError if absent."""

    def delete_folder(self, path: str) -> None:
        """Remove a folder with all its content. Files that others write to it meanwhile may stay."""

    def remove_temporary(self, temporary: str) -> None:
        """Remove what killed writers left in `temporary`. A live writer whose file is removed writes it again."""

    def has_conditional_writes(self, folder: str) -> bool:
        """Return whether `create` is exclusive, after a trial with a key of its own."""

    def renew_credentials(self) -> None:
        """Look up the credentials again, because those in use have expired."""
