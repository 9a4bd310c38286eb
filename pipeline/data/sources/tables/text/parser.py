"""What parsers of text formats have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import pyarrow as pa


class ParsedBlock(NamedTuple):
    """The rows of a block.

    batch: one column per column of the block, with the types inferred for it.
    padded, inexact: columns with such whole numbers, see `types.ColumnEvidence`.
    """

    batch: pa.RecordBatch
    padded: frozenset[str] = frozenset()
    inexact: frozenset[str] = frozenset()


class RecordError(Exception):
    """A record is unusable.

    what, fix: for the message. position: of the record, or of a character in it, in its block.
    """

    def __init__(self, what: str, position: int, fix: str) -> None:
        super().__init__(what, position, fix)
        self.what, self.position, self.fix = what, position, fix


class TextParser(Protocol):
    """Parses the blocks of one file, from any thread.

    header_bytes: size of what comes before the first record.
    stored_names: the columns that the header names; empty if there is no header.
    """

    header_bytes: int

    @property
    def stored_names(self) -> list[str]: ...

    def find_last_end(self, data: bytes) -> int:
        """Return the end of the last complete record, 0 if there is none."""

    def parse(self, data: bytes, known: Mapping[str, pa.DataType]) -> ParsedBlock:
        """Return the rows of a block. `known`: types that values of these columns had before, which only save time.

        Raises
        ------
        RecordError: a record is unusable.
        """

    def parse_as_text(self, data: bytes, columns: Sequence[str]) -> pa.RecordBatch:
        """Return these columns of a block as text."""
