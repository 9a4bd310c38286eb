"""`draft_job`: any table gives a job that `check` accepts, or one message."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.commands.check import check
from pipeline.commands.job_from_data import choose_task, draft_job, find_or_write_job, split_notes
from pipeline.config.files import load_job
from pipeline.data.tabular.arrow_types import arrow_kind
from pipeline.data.tabular.profile import ColumnProfile, profile_columns
from pipeline.errors import DataError, InputError

NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8) | st.sampled_from(
    [
        "id",
        "user_id",
        "a: b",
        "{x}",
        "'",
        '"',
        "#",
        "\n",
        "\x85",
        "\u2028",
        "*",
        "null",
        "~",
        "[",
        "- x",
        "%",
        "@",
        "&a",
    ]
)

COLUMNS: list[tuple[pa.DataType, st.SearchStrategy[Any]]] = [
    (pa.int64(), st.integers(-3, 40) | st.integers(-(2**40), 2**40)),
    (pa.float64(), st.floats(-1e6, 1e6) | st.sampled_from([0.0, 1.0])),
    (pa.bool_(), st.booleans()),
    (pa.string(), st.sampled_from(["a", "b", "c"]) | st.text(max_size=4)),
    (pa.date32(), st.integers(0, 20_000)),
    (pa.list_(pa.float32()), st.lists(st.floats(-1, 1, width=32), min_size=2, max_size=2)),
    (pa.null(), st.none()),
]


@st.composite
def tables(draw: st.DrawFn) -> tuple[pa.Table, list[str]]:
    """A table, and the names of its label."""
    rows = draw(st.integers(1, 40))
    names = draw(st.lists(NAMES, min_size=2, max_size=5, unique=True))
    arrays = []
    for name in names:
        kind, values = draw(st.sampled_from(COLUMNS))
        few = st.sampled_from(draw(st.lists(values, min_size=1, max_size=3)))
        gaps = st.none() if name != names[-1] and draw(st.booleans()) else st.nothing()
        column = draw(st.lists((values if draw(st.booleans()) else few) | gaps, min_size=rows, max_size=rows))
        arrays.append(pa.array(column, pa.int32()).cast(kind) if pa.types.is_date(kind) else pa.array(column, kind))
    return pa.table(arrays, names=names), [names[-1]]


@settings(deadline=None, max_examples=60)
@given(tables())
def test_any_table_gives_a_job_that_check_accepts_or_one_message(case: tuple[pa.Table, list[str]]) -> None:
    table, labels = case
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            pq.write_table(table, "t.parquet")
            with suppress(InputError):  # such as a label that cannot be predicted
                written = find_or_write_job("t.parquet", labels)
                assert load_job(written.path).data.labels == labels
                assert (error_of_check(written.path) or "no column").startswith(("no column", "features: auto leaves"))
                assert find_or_write_job("t.parquet", labels).is_new is False
                return
            assert not list(Path(folder).glob("*.yaml"))
        finally:
            os.chdir(before)


def error_of_check(path: str) -> str:
    """The error of `check`, or an empty text."""
    try:
        check(path)
    except DataError as error:
        return error.what
    return ""


def profile_of(name: str, values: list[Any]) -> ColumnProfile:
    array = pa.array(values)
    return profile_columns({name: arrow_kind(array.type)}, pa.table({name: array}).to_batches())[name]


@pytest.mark.parametrize(
    ("values", "kind", "reason"),
    [
        ([0, 1] * 50, "binary", "'y' has 2 different whole numbers (0, 1); 1 counts as positive"),
        (["n", "y"] * 50, "binary", "'y' counts as positive"),
        ([True, False] * 50, "binary", "true counts as positive"),
        ([*range(20)] * 5, "multiclass", "20 different whole numbers (0, 1, 2, 3, 4, ...)"),
        ([*range(20)] * 4, "regression", "20 different whole numbers"),
        ([*range(21)] * 100, "regression", "21 different whole numbers"),
        ([1.0, 2.0, 3.0] * 9, "multiclass", "(1, 2, 3)"),
        ([1.0, 2.5, 3.0] * 9, "regression", "3 different numbers"),
        ([f"class {i}" for i in range(50)] * 2, "multiclass", "50 different texts"),
    ],
)
def test_the_rule_for_classes_or_a_number(values: list[Any], kind: str, reason: str) -> None:
    task, text = choose_task([profile_of("y", values)], "t.csv")
    assert (task["kind"], reason in text) == (kind, True), text


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("user_id", [i // 3 for i in range(90)], True),
        ("userId", [i // 3 for i in range(90)], True),
        ("patient", [i // 3 for i in range(90)], True),
        ("street", [f"s{i // 3}" for i in range(90)], True),
        ("age", [i // 3 for i in range(90)], False),
        ("user_id", list(range(90)), False),
        ("city", [f"c{i % 10}" for i in range(90)], False),
        ("valid", [i // 3 for i in range(90)], False),
        ("paid", [i // 3 for i in range(90)], False),
    ],
)
def test_identifiers_that_repeat_are_told(name: str, values: list[Any], expected: bool) -> None:
    assert bool(split_notes([profile_of(name, values)])) == expected


def test_a_url_with_a_secret_and_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds a secret"):
        draft_job("a", "s3://key:secretsecret@bucket/x.csv", ["y"])
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(InputError, match="an image, not a table"):
        draft_job("a", str(tmp_path / "x.png"), ["y"])


@pytest.mark.parametrize("rows", [1, 9])
def test_a_table_of_few_rows_is_refused(tmp_path: Path, rows: int) -> None:
    pq.write_table(pa.table({"x": range(rows), "y": [i % 2 for i in range(rows)]}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match="too few to train and to validate"):
        draft_job("a", str(tmp_path / "t.parquet"), ["y"])
