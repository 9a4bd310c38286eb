"""Bad values in a table: counted while rows go by, told when all were seen."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from pipeline.errors import DataError


@dataclass
class InvalidValues:
    """Values that cannot be used, counted while rows go by, so that an error can say how many there are.

    where: the file or table.
    """

    where: str
    num_rows: int = 0
    counts: dict[tuple[str, str, str], list[int]] = field(default_factory=dict)

    def add(self, column: str, what: str, fix: str, wrong: np.ndarray) -> None:
        """`wrong`: bool (n,), of the rows after the first `rows`."""
        count = int(np.count_nonzero(wrong))
        if count:
            first = self.num_rows + int(np.argmax(wrong))
            self.counts.setdefault((column, what, fix), [first, 0])[1] += count

    def raise_if_any(self) -> None:
        """Raise what was found first.

        Raises
        ------
        DataError: with the column, the first row (from 0) and the count.
        """
        for (column, what, fix), (first, count) in self.counts.items():
            raise DataError(
                f"the column {column!r} has {what} in {count:,} of {self.num_rows:,} rows, first in row {first:,} (from 0)",
                where=self.where,
                fix=fix,
            )
