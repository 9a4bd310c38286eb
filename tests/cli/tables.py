"""Tables for the tests of the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


def customers(rows: int = 400, seed: int = 0) -> dict[str, Any]:
    """Columns of a table whose text label `churned` depends on a number and on a category."""
    draw = np.random.default_rng(seed)
    months, plan = draw.normal(size=rows), draw.choice(["basic", "plus", "team"], rows)
    score = months + (plan == "basic") + draw.normal(size=rows) / 2
    return {
        "months": months,
        "calls": draw.poisson(3, rows),
        "plan": plan,
        "churned": np.where(score > 0.5, "yes", "no"),
    }


def write_table(path: Path, columns: dict[str, Any]) -> str:
    """Write columns as Parquet, and return the path."""
    pq.write_table(pa.table(columns), path)
    return str(path)
