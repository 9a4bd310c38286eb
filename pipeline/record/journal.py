"""The journal of a run, which is its truth: entries that are created exclusively and never change."""

from __future__ import annotations

import re

from pipeline.errors import StorageError
from pipeline.record import decisions
from pipeline.record.entries import Entry, parse_entry
from pipeline.record.values import from_json
from pipeline.storage import Storage

FOLDER = "journal"


class Journal:
    """The entries of one run. What was read once is kept, for it never changes.

    Parameters
    ----------
    storage: the run's folder.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._entries: list[Entry] = []

    def read(self) -> tuple[Entry, ...]:
        """All entries, up to the first absent number.

        Raises
        ------
        StorageError: an entry that no version of Trainyard known here wrote, or that was deleted.
        """
        # An entry is only ever created after the one before it, so a listed number means that all below it are
        # there: the listing saves waiting for one answer after another, and the end is found by reading.
        names = self._storage.list(FOLDER)
        listed = [int(name[:8]) for name in names if re.fullmatch(r"[0-9]{8}\.json", name)]
        known = len(self._entries)
        for entry in self._storage.each(self._read_one, range(known + 1, len(listed) + 1)):
            if entry is None:
                break
            self._entries.append(entry)
        while entry := self._read_one(len(self._entries) + 1):
            self._entries.append(entry)
        if max(listed, default=0) > len(self._entries):
            raise StorageError(
                "this journal entry is missing, though later ones are there",
                where=f"{self._storage.url}/{_path(len(self._entries) + 1)}",
                fix="restore the file, or use another --name",
            )
        return tuple(self._entries)

    def append(self, entry: Entry) -> bool:
        """Create the entry under its number; False if another's took it."""
        if not self._storage.create(_path(entry.number), entry.to_json().encode()):
            return False
        if entry.number == len(self._entries) + 1:
            self._entries.append(entry)
        return True

    def latest_attempt_of(self, driver: str) -> int | None:
        """Number of the last attempt, if this driver started it."""
        claim = decisions.last_claim(self.read())
        return claim.attempt if claim is not None and claim.driver == driver else None

    def highest_step(self) -> int:
        """The highest step committed so far; 0 without a commit."""
        return decisions.highest_step(self.read())

    def _read_one(self, number: int) -> Entry | None:
        try:
            data = self._storage.read(_path(number))
        except FileNotFoundError:
            return None
        try:
            return parse_entry(from_json(data), number)
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            raise StorageError(
                f"not a journal entry that this version reads ({str(error).partition(chr(10))[0][:200]})",
                where=f"{self._storage.url}/{_path(number)}",
                fix="restore the file, or use another --name",
            ) from None


def _path(number: int) -> str:
    return f"{FOLDER}/{number:08d}.json"
