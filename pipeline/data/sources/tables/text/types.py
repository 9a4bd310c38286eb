"""The type of a column of a text file, from the types that Arrow infers for each of its blocks.

The type depends on all values of the column, not on how they are divided into blocks: it is a function of the set of
the blocks' types, and of whether any block has numbers that must stay text. Whole numbers become float64 if any value
of the column has a fraction, and a column with values of other kinds is text.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.types as pt

TIME_UNITS = ("s", "ms", "us", "ns")


@dataclass
class ColumnEvidence:
    """What the blocks say about a column.

    types: the types inferred for the blocks, without nulls and dictionaries.
    has_padded: whether a block has whole numbers with leading zeros, which may be codes such as 00501.
    has_inexact: whether a block has whole numbers that no number type here represents: more than 64 bits, or
        hexadecimal.
    has_many_texts: whether a block had too many distinct texts to encode them as a dictionary.
    """

    types: set[pa.DataType] = field(default_factory=set)
    has_padded: bool = False
    has_inexact: bool = False
    has_many_texts: bool = False

    def add(self, arrow_type: pa.DataType) -> None:
        """Add the type of a block."""
        self.has_many_texts |= arrow_type == pa.string()
        if pt.is_dictionary(arrow_type):
            arrow_type = arrow_type.value_type
        if not pt.is_null(arrow_type):
            self.types.add(arrow_type)

    @property
    def type(self) -> pa.DataType:
        """The type that holds all blocks."""
        common = merge_types(self.types)
        is_code = (self.has_padded and common == pa.int64()) or (
            self.has_inexact and common in (pa.int64(), pa.float64())
        )
        return pa.string() if is_code else common


def merge_types(types: Iterable[pa.DataType]) -> pa.DataType:
    """Return the narrowest type that represents values of all these types; text if no other one does."""
    distinct = set(types)
    if not distinct:
        return pa.null()
    if len(distinct) == 1:
        return next(iter(distinct))
    if distinct == {pa.int64(), pa.float64()}:
        return pa.float64()
    stamps = [one for one in distinct if pt.is_timestamp(one)]
    zones = {one.tz for one in stamps} | ({None} if pa.date32() in distinct else set())
    if len(stamps) + (pa.date32() in distinct) == len(distinct) and len(zones) == 1:
        return pa.timestamp(max((one.unit for one in stamps), key=TIME_UNITS.index), tz=zones.pop())
    return pa.string()
