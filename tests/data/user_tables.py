"""Functions of a user that return tables, for `test_user_table.py`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa

ROWS = 160


def customers(rows: int = ROWS, seed: int = 0) -> pd.DataFrame:
    """Text, categories, missing values, and a label of text."""
    rng = np.random.default_rng(seed)
    age, plan = rng.normal(40, 10, rows), rng.choice(np.array(["basic", "pro", None]), rows)
    return pd.DataFrame(
        {
            "customer": np.arange(rows),
            "age": np.where(rng.random(rows) < 0.1, np.nan, age),
            "plan": plan,
            "zip": pd.Categorical(rng.integers(1, 4, rows)),
            "churned": np.where((age > 40) ^ (plan == "pro"), "yes", "no"),
        }
    )


def as_polars() -> pl.DataFrame:
    return pl.from_pandas(customers().astype({"zip": str}))


def as_arrow() -> pa.Table:
    return pa.Table.from_pandas(customers(), preserve_index=False)


def as_columns() -> dict[str, Any]:
    frame = customers().astype({"zip": str})
    return {str(name): [None if pd.isna(value) else value for value in frame[name]] for name in frame}


def as_pair() -> tuple[pd.DataFrame, pd.Series]:
    frame = customers()
    return frame.drop(columns="churned"), frame["churned"]


def with_test() -> dict[str, pd.DataFrame]:
    return {"train": customers(), "test": customers(60, seed=1)}


def with_other_columns() -> dict[str, pd.DataFrame]:
    return {"train": customers(), "test": customers(60).drop(columns="plan")}


def sales() -> pd.DataFrame:
    rng = np.random.default_rng(2)
    size = rng.normal(size=ROWS)
    frame = pd.DataFrame({"size": size, "price": 3 * size + 100, "rent": -size})
    return frame.assign(day=pd.date_range("2024-01-01", periods=ROWS))


def mixed() -> pd.DataFrame:
    return customers().assign(plan=[1, *["x"] * (ROWS - 1)])


def no_table() -> int:
    return 5
