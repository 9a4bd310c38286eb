"""The journal of a run: entries that are created exclusively and never change. It defines the state of the run.

Every entry carries the state after all entries before it (`JournalState`), so the newest entry alone gives the state of
the run, regardless of its length. The carried state is exact:

- An entry is created exclusively under a number, and only if the entry before that number exists; none is changed or
  deleted. So the existing numbers are 1 to some n, and the entry of a number is the same for every reader.
- A claim under number k + 1 carries the state after entry k, which its writer has read: the state that entry k carries,
  and entry k applied to it. By induction that is the state after the entries 1 to k.
- Any other entry is created under the number after its writer's last one, so there is no entry of another writer
  between them: it carries the state in the writer's last entry, with that entry applied to it. If another writer has
  taken the number, nothing is written; if the entry there is the writer's own, it is applied before the next one.

The newest entry is found by probing numbers. Since no number below the newest is missing, an existing number is a lower
bound and an absent one an upper bound: doubling steps upward, then bisection, takes 2 log2(n) requests, and two if the
search begins at the newest (the hint in `run.json`, or the newest entry of the last search).
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
    """The entries of one run. Entries are cached, because they never change.

    Parameters
    ----------
    storage: the run's folder.
    hint: returns the number of an entry that may be the newest, or 0. Called once; a wrong hint only costs requests.

    Raises
    ------
    StorageError: in any method but `read_claims`, for an entry that is not in a format known to this version, or that
        was deleted.
    """

    def __init__(self, storage: Storage, hint: Callable[[], int] = lambda: 0) -> None:
        self._storage = storage
        self._hint = hint
        self._state = JournalState()
        self._claims: dict[int, Claim] = {}
        self._entries: list[JournalEntry] = []

    def with_storage(self, storage: Storage) -> Journal:
        """Return the same journal with another `Storage` of the same folder."""
        journal = copy(self)
        journal._storage = storage
        journal._claims, journal._entries = dict(self._claims), list(self._entries)
        return journal

    def read_state(self) -> JournalState:
        """Return the state after all entries, up to the first absent number."""
        newest = self._find_newest()
        if newest is None:
            return self._state
        if newest.before is None and newest.number > 1:  # written by an earlier version
            first = self._state.number
            self._state = decisions.fold(self._read_up_to(newest.number)[first:], self._state)
        else:
            self._state = decisions.apply_entry(newest.before or JournalState(), newest)
        return self._state

    def read_entry(self, number: int) -> JournalEntry:
        """Return an entry that is known to exist."""
        data = self._read_bytes(number)
        if data is None:
            raise self._missing_error(number)
        return self._parse(number, data)

    def read_claims(self, numbers: Iterable[int]) -> list[Claim | None]:
        """Return the claims under these numbers with all their metadata; None for one that cannot be read any more."""

        def read(number: int) -> JournalEntry | None:
            try:
                return self.read_entry(number)
            except StorageError:  # no decision depends on it
                return None

        requested = list(numbers)
        unknown = [number for number in requested if number not in self._claims]
        for number, entry in zip(unknown, self._storage.map_concurrent(read, unknown), strict=True):
            if isinstance(entry, Claim):
                self._claims[number] = entry
        return [self._claims.get(number) for number in requested]

    def append(self, entry: JournalEntry) -> bool:
        """Create the entry under its number; return False if another entry has the number."""
        if not self._storage.create(_entry_path(entry.number), entry.to_json().encode()):
            return False
        if entry.number == self._state.number + 1:
            self._state = decisions.apply_entry(self._state, entry)
        if isinstance(entry, Claim):
            self._claims[entry.number] = entry
        return True

    def raise_if_gap(self) -> None:
        """Check one number past the end before an entry is created there: a deleted entry is not the end.

        Raises
        ------
        StorageError: the first absent number is not the end.
        """
        number = self._state.number + 1
        if self._read_bytes(number + 1) is not None and self._read_bytes(number) is None:
            raise self._missing_error(number)

    def find_missing_number(self) -> int | None:
        """Return the lowest number that a listing lacks although it contains a higher one: that of a deleted entry."""
        names = self._storage.list(JOURNAL_FOLDER)
        listed = {int(name[:8]) for name in names if re.fullmatch(r"[0-9]{8}\.json", name)}
        missing = next(number for number in range(1, len(listed) + 2) if number not in listed)
        return missing if max(listed, default=0) > missing else None

    def find_latest_attempt(self, driver: str) -> int | None:
        """Return the number of the last attempt if this driver started it."""
        claim = self.read_state().claim
        return claim.attempt if claim is not None and claim.driver == driver else None

    def read_highest_step(self) -> int:
        """Return the highest step committed so far; 0 without a commit."""
        return self.read_state().highest_step

    def _find_newest(self) -> JournalEntry | None:
        """Return the newest entry if it is later than the last known state.

        It was the newest at some moment of the search: the number after it was absent when it was probed.
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
                f"not a journal entry that this version can read ({str(error).partition(chr(10))[0][:200]})",
                where=f"{self._storage.url}/{_entry_path(number)}",
                fix="restore the file, or use another --name",
            ) from None

    def _missing_error(self, number: int) -> StorageError:
        return StorageError(
            "this journal entry is missing, but later entries exist",
            where=f"{self._storage.url}/{_entry_path(number)}",
            fix="restore the file, or use another --name",
        )


def _entry_path(number: int) -> str:
    return f"{JOURNAL_FOLDER}/{number:08d}.json"
