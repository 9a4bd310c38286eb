"""The journal of a run, which is its truth: entries that are created exclusively and never change.

Every entry carries what all entries before it amount to (`JournalState`), so that the newest alone tells how the run
stands, however long it is. What it carries is exact:

- An entry is only ever created under a number, exclusively, when the entry before that number is there; none is changed
  or deleted. So the numbers that are there are 1 to some n, and what a number holds is the same for every reader.
- A claim under number k + 1 carries the state after entry k, which its writer has read: the state that entry k carries,
  and entry k applied to it. By induction that is the state after the entries 1 to k.
- Any other entry is created under the number after its writer's own last one, so no entry of another lies between them:
  what it carries is the state that the writer's last entry carries, and that entry applied to it. Where the number is
  taken by another writer, nothing is written; where an own entry turns out to be there, it is applied before the next.

The newest entry is found by trying numbers. Since no number is missing below the newest, one that is there is a lower
bound and one that is absent an upper one: doubling steps upward, then halving, takes 2 log2(n) requests, and two where
the search begins at the newest (a number that `run.json` hints at, or that was the newest before).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from copy import copy

from pipeline.errors import StorageError
from pipeline.runs.journal import decisions
from pipeline.runs.journal.entries import Claim, JournalEntry, JournalState, parse_entry
from pipeline.runs.serialization import from_json
from pipeline.storage import Storage

JOURNAL_FOLDER = "journal"


class Journal:
    """The entries of one run. What was read once is kept, for it never changes.

    Parameters
    ----------
    storage: the run's folder.
    hint: gives the number of an entry that may be the newest, or 0. Asked once; a wrong one costs requests only.

    Raises
    ------
    StorageError: in any method but `claims`, for an entry that no version of Trainyard known here wrote, or that was
        deleted.
    """

    def __init__(self, storage: Storage, hint: Callable[[], int] = lambda: 0) -> None:
        self._storage = storage
        self._hint = hint
        self._state = JournalState()
        self._claims: dict[int, Claim] = {}
        self._entries: list[JournalEntry] = []

    def with_storage(self, storage: Storage) -> Journal:
        """The same journal through another `Storage` of the same folder."""
        journal = copy(self)
        journal._storage = storage
        journal._claims, journal._entries = dict(self._claims), list(self._entries)
        return journal

    def read_state(self) -> JournalState:
        """What all entries amount to, up to the first absent number."""
        newest = self._find_newest()
        if newest is None:
            return self._state
        if newest.before is None and newest.number > 1:  # as earlier versions wrote them
            first = self._state.number
            self._state = decisions.fold(self._read_up_to(newest.number)[first:], self._state)
        else:
            self._state = decisions.apply_entry(newest.before or JournalState(), newest)
        return self._state

    def read_entry(self, number: int) -> JournalEntry:
        """An entry that is known to be there."""
        data = self._read_bytes(number)
        if data is None:
            raise self._missing_error(number)
        return self._parse(number, data)

    def read_claims(self, numbers: Iterable[int]) -> list[Claim | None]:
        """The claims under these numbers, with all their facts; None for one that cannot be read any more."""

        def read(number: int) -> JournalEntry | None:
            try:
                return self.read_entry(number)
            except StorageError:  # no decision rests on it
                return None

        requested = list(numbers)
        unknown = [number for number in requested if number not in self._claims]
        for number, entry in zip(unknown, self._storage.map_concurrent(read, unknown), strict=True):
            if isinstance(entry, Claim):
                self._claims[number] = entry
        return [self._claims.get(number) for number in requested]

    def append(self, entry: JournalEntry) -> bool:
        """Create the entry under its number; False if another's took it."""
        if not self._storage.create(_entry_path(entry.number), entry.to_json().encode()):
            return False
        if entry.number == self._state.number + 1:
            self._state = decisions.apply_entry(self._state, entry)
        if isinstance(entry, Claim):
            self._claims[entry.number] = entry
        return True

    def raise_if_gap(self) -> None:
        """Look once past the end, before something is created there: an entry that was deleted is no end.

        Raises
        ------
        StorageError: the first absent number is not the end.
        """
        number = self._state.number + 1
        if self._read_bytes(number + 1) is not None and self._read_bytes(number) is None:
            raise self._missing_error(number)

    def find_missing_number(self) -> int | None:
        """The lowest number that a listing lacks though it holds a higher one: of an entry that was deleted."""
        names = self._storage.list(JOURNAL_FOLDER)
        listed = {int(name[:8]) for name in names if re.fullmatch(r"[0-9]{8}\.json", name)}
        missing = next(number for number in range(1, len(listed) + 2) if number not in listed)
        return missing if max(listed, default=0) > missing else None

    def find_latest_attempt(self, driver: str) -> int | None:
        """Number of the last attempt, if this driver started it."""
        claim = self.read_state().claim
        return claim.attempt if claim is not None and claim.driver == driver else None

    def read_highest_step(self) -> int:
        """The highest step committed so far; 0 without a commit."""
        return self.read_state().highest_step

    def _find_newest(self) -> JournalEntry | None:
        """The newest entry, if it is a later one than that of the state known so far.

        At some moment of the search it was the newest: the number after it was absent when it was tried.
        """
        lower_bound, data, upper_bound = self._state.number, None, None
        if not lower_bound and (hint := self._hint()):
            data = self._read_bytes(hint)
            lower_bound, upper_bound = (0, hint) if data is None else (hint, None)
        step = 1
        while upper_bound is None or upper_bound - lower_bound > 1:
            number = lower_bound + step if upper_bound is None else (lower_bound + upper_bound) // 2
            number_data = self._read_bytes(number)
            if number_data is None:
                upper_bound = number
            else:
                lower_bound, data, step = number, number_data, 2 * step
        return self._parse(lower_bound, data) if data is not None else None

    def _read_up_to(self, number: int) -> tuple[JournalEntry, ...]:
        unread = range(len(self._entries) + 1, number + 1)
        self._entries += self._storage.map_concurrent(self.read_entry, unread)
        return tuple(self._entries[:number])

    def _read_bytes(self, number: int) -> bytes | None:
        try:
            return self._storage.read(_entry_path(number))
        except FileNotFoundError:
            return None

    def _parse(self, number: int, data: bytes) -> JournalEntry:
        try:
            return parse_entry(from_json(data), number)
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            raise StorageError(
                f"not a journal entry that this version reads ({str(error).partition(chr(10))[0][:200]})",
                where=f"{self._storage.url}/{_entry_path(number)}",
                fix="restore the file, or use another --name",
            ) from None

    def _missing_error(self, number: int) -> StorageError:
        return StorageError(
            "this journal entry is missing, though later ones are there",
            where=f"{self._storage.url}/{_entry_path(number)}",
            fix="restore the file, or use another --name",
        )


def _entry_path(number: int) -> str:
    return f"{JOURNAL_FOLDER}/{number:08d}.json"
