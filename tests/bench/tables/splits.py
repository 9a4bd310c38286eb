"""From a built table to the files that a method gets: training rows with their label, test rows without it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.model_selection import train_test_split

from tests.bench.tables.sources import PublicTable, build_table

TEST_SHARE = 0.2
"""The other rows are for training and, as each method decides, validation."""


@dataclass(frozen=True)
class SplitFiles:
    """The files of one (table, split): `train` has the label, `test` has not; `labels` holds the labels of the test
    rows, in their order, and only the scorer reads it."""

    train: Path
    test: Path
    labels: Path


def write_split(table: PublicTable, split: int, folder: Path) -> SplitFiles:
    """Draw 20 % of the rows for the test with `split` as seed, in proportion to the classes; write what is not there.

    The table itself is built once, into FOLDER/tables.
    """
    files = SplitFiles(*(folder / "splits" / f"{table.name}-{split}-{part}.parquet" for part in _PARTS))
    if not files.labels.exists():
        rows, label = read_table(table, folder), table.clean_label
        classes = None if table.task == "regression" else rows[label]
        train, test = train_test_split(rows, test_size=TEST_SHARE, random_state=split, stratify=classes)
        files.train.parent.mkdir(parents=True, exist_ok=True)
        train.to_parquet(files.train, index=False)
        test.drop(columns=label).to_parquet(files.test, index=False)
        test[[label]].to_parquet(files.labels, index=False)
    return files


_PARTS = ("train", "test", "labels")


def read_table(table: PublicTable, folder: Path) -> pd.DataFrame:
    """Return a table from FOLDER/tables, where it is built at its first use."""
    path = folder / "tables" / f"{table.name}.parquet"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        (folder / "wheels").mkdir(exist_ok=True)
        build_table(table, folder / "wheels").to_parquet(path, index=False)
    return pd.read_parquet(path)


def count_columns(rows: pd.DataFrame) -> dict[str, int]:
    """Return how many columns (label included) are numbers and text, and the counts that make a table hard."""
    text = [name for name in rows if not pd.api.types.is_numeric_dtype(rows[name])]
    return {
        "rows": len(rows),
        "numbers": rows.shape[1] - len(text),
        "text": len(text),
        "levels": max((int(rows[name].nunique()) for name in text), default=0),
        "missing": int(np.sum(rows.isna().to_numpy())),
    }
