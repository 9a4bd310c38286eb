"""What a kind of storage must be able to do. `local` and `remote` do it; a test may bring its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Upload(Protocol):
    """One file on its way in parts. Nothing is seen of it before `complete`.

    Every method raises FileNotFoundError where the store knows of no such upload (any more).
    """

    part_bytes: int
    """Size of all parts but the last."""

    def put(self, number: int, data: bytes) -> str:
        """Send a part, counted from 1; sent again, it takes the place of the first. Returns the store's tag of it."""

    def complete(self, tags: Sequence[str]) -> None:
        """Put the file in place in one step, from the parts with these tags."""

    def abort(self) -> None:
        """Give the upload up, so that the store keeps no parts of it."""


class Backend(Protocol):
    """Plain operations on whole paths, tried once: no retries and no judgement of errors, which are the door's.

    A path is that of the backend's own file system, "/"-separated. `temporary` is a folder on the same file system
    where unfinished files may lie; an object store has no use for it.
    """

    is_remote: bool
    """Whether requests take long enough that several at once pay."""

    def read(self, path: str) -> bytes:
        """The whole content, never from a cache. FileNotFoundError where absent."""

    def replace(self, path: str, data: bytes, temporary: str, sync: bool) -> None:
        """Put the content in place in one step, missing folders included. `sync`: it survives a power loss."""

    def upload(self, path: str, size: int) -> Upload | None:
        """Begin to replace a file in parts, where that pays for so many bytes; else None."""

    def create(self, path: str, data: bytes, temporary: str) -> None:
        """Put the whole content there in one step, unless something is there: then FileExistsError. Synced."""

    def list(self, path: str) -> list[str]:
        """Names of files and folders in a folder, in any order. FileNotFoundError where absent."""

    def exists(self, path: str) -> bool:
        """Whether there is a file or a folder."""

    def delete(self, path: str) -> None:
        """Remove a file. FileNotFoundError where absent."""

    def delete_folder(self, path: str) -> None:
        """Remove a folder with all in it. What others write there meanwhile may stay."""

    def remove_temporary(self, temporary: str) -> None:
        """Remove what killed writers left in `temporary`. A live writer that loses its file writes it again."""

    def has_conditional_writes(self, folder: str) -> bool:
        """Whether `create` excludes, tried out on a key of its own."""

    def renew_credentials(self) -> None:
        """Look for credentials anew: those in use have expired."""
