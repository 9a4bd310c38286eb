"""What is said of new data that is not like the training rows: counted by column, in blocks, and against pandas."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd
import pytest

from pipeline.data import statistics
from pipeline.data.preprocess import DataReport, TablePreprocess, fit_preprocess, preprocess_from_json
from pipeline.data.raw import raw_samples
from pipeline.data.sources import Arrays, Source
from pipeline.data.tables.encode import encode, to_arrow
from pipeline.data.tables.schema import Column, Schema
from pipeline.errors import DataError
from pipeline.job import Job
from pipeline.job_file import build_job

SCHEMA = Schema(
    (
        Column("age", "number"),
        Column("plan", "category", levels=("basic", "plus", "pro")),
        Column("pair", "number", 2),
        Column("flag", "number"),
    )
)
TRAINING = {
    "age": [20.0, 40.0, None, 30.0],
    "plan": ["basic", "plus", "basic", None],
    "pair": [[0.0, 10.0], [1.0, 20.0], [0.5, 15.0], [0.0, 11.0]],
    "flag": [1, 1, 1, 1],
}
"""Of the levels, `pro` occurs in no training row."""


def job(**data: Any) -> Job:
    return build_job({"name": "t", "data": {"source": "parquet", "url": "x", "label": "y", **data}}, "test")


def fitted(**data: Any) -> TablePreprocess:
    inputs = encode(to_arrow(TRAINING), SCHEMA, dtype=np.float32, where="training")
    source = Source(Arrays(inputs, np.zeros(4, np.int64)), None, (), "fingerprint", SCHEMA)
    found = fit_preprocess(job(**data), source, np.arange(4))
    assert isinstance(found, TablePreprocess)
    return found


def report_of(preprocess: TablePreprocess, data: Any) -> DataReport:
    report = DataReport(preprocess)
    raw_samples(data, preprocess, job(), report)
    return report


NEW = pd.DataFrame(
    {
        "flag": [1, 0, 1, 1, 1],
        "pair": [[0.0, 10.0], [2.5, 10.0], [0.0, -5.0], None, [2.0, 30.0]],
        "plan": ["basic", "pro", " basic", None, "plus"],
        "age": [0.0, 61.0, None, -1e9, 60.0],
    }
)


@pytest.mark.parametrize("block", [1, 1 << 20])
def test_each_column_is_counted(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(statistics, "BLOCK_VALUES", block)
    report = report_of(fitted(), NEW).to_json()
    assert report == {
        "age": {"rows": 5, "unseen": 0.0, "filled": 0.2, "outside": 0.4},  # 0 and 60 are just not far
        "plan": {"rows": 5, "unseen": 0.4, "filled": 0.2, "outside": 0.0},
        "pair": {"rows": 5, "unseen": 0.0, "filled": 0.2, "outside": 0.4},
        "flag": {"rows": 5, "unseen": 0.0, "filled": 0.0, "outside": 0.2},  # all training rows had 1
    }


def test_rows_that_were_encoded_by_another_schema_count_alike() -> None:
    preprocess = fitted()
    theirs = Schema(
        (
            Column("flag", "number"),
            Column("pair", "number", 2),
            Column("plan", "category", levels=(" basic", "basic", "plus", "pro")),
            Column("age", "number"),
        )
    )
    raw = encode(to_arrow(NEW), theirs, dtype=np.float32, where="new")
    report = DataReport(preprocess)
    report.add(raw, np.array([0, 2]), theirs)
    report.add(raw, np.array([1, 3, 4]), theirs)
    assert report.to_json() == report_of(preprocess, NEW).to_json()
    assert any("' basic' (training had 'basic')" in text for text in report.warnings())


def test_training_rows_are_never_outside_nor_warned_of() -> None:
    report = report_of(fitted(), pd.DataFrame(TRAINING))
    assert {column["unseen"] for column in report.to_json().values()} == {0.0}
    assert {column["outside"] for column in report.to_json().values()} == {0.0}
    assert report.to_json()["age"]["filled"] == 0.25
    assert report.warnings() == []  # as many as in training
    assert len(report.lines()) == 2


def test_a_warning_names_column_share_value_and_treatment() -> None:
    texts = report_of(fitted(), NEW).warnings()
    assert len(texts) == 5
    plan = next(text for text in texts if "'plan'" in text)
    assert "40.0% of 5 values were never seen in training, such as 'pro'" in plan
    age = next(text for text in texts if "'age'" in text)
    assert "40.0% of 5 values lie far outside the training range, 20 to 40, such as 61" in age
    empty = report_of(fitted(), NEW.assign(age=None, plan=None)).warnings()
    assert "column 'age': all of 5 rows have no value, in training 25.0%; filled with 30" in empty
    assert any("'plan'" in text and "counted as a value of its own" in text for text in empty)


def test_checkpoints_of_an_earlier_version_lack_the_ranges_alone() -> None:
    preprocess = fitted()
    stored = json.loads(json.dumps(preprocess.to_json()))
    assert preprocess_from_json(stored) == preprocess
    for column in stored["columns"]:
        for name in ("low", "high", "nulls"):
            column.pop(name, None)
    old = preprocess_from_json(stored)
    assert isinstance(old, TablePreprocess)
    assert preprocess_from_json(old.to_json()) == old
    report = report_of(old, NEW).to_json()
    assert {column["outside"] for column in report.values()} == {None}
    assert report["plan"]["unseen"] == 0.4
    assert report["age"]["filled"] == 0.2
    stored["columns"][0]["low"] = [1.0]
    with pytest.raises(DataError, match="damaged"):
        preprocess_from_json(stored)


@pytest.mark.parametrize(("values", "words"), [([1, 2, None, 4, 5], "numbers"), ([True] * 5, "booleans")])
def test_numbers_in_place_of_text_are_refused(values: list[Any], words: str) -> None:
    with pytest.raises(DataError, match=rf"'plan' holds .*{words}.* but held text in training, such as 'basic'"):
        report_of(fitted(), NEW.assign(plan=values))
    nothing = NEW.assign(plan=np.full(5, np.nan))
    assert report_of(fitted(), nothing).to_json()["plan"]["filled"] == 1.0


def test_numbers_that_look_unlike_the_texts_of_training_are_unseen() -> None:
    schema = Schema((Column("zip", "category", levels=("02134", "10001")),))
    inputs = np.array([[0.0], [1.0]], np.float32)
    source = Source(Arrays(inputs, np.zeros(2, np.int64)), None, (), "fingerprint", schema)
    preprocess = fit_preprocess(job(), source, np.arange(2))
    assert isinstance(preprocess, TablePreprocess)
    report = report_of(preprocess, {"zip": [2134, 10001]})
    assert report.to_json()["zip"]["unseen"] == 0.5
    assert "such as '2134' (training had '02134')" in report.warnings()[0]


def test_wide_tables_are_warned_of_in_few_words() -> None:
    schema = Schema(tuple(Column(f"c{number}", "number") for number in range(20)))
    inputs = np.random.default_rng(0).normal(size=(50, 20)).astype(np.float32)
    source = Source(Arrays(inputs, np.zeros(50, np.int64)), None, (), "fingerprint", schema)
    preprocess = fit_preprocess(job(), source, np.arange(50))
    assert isinstance(preprocess, TablePreprocess)
    report = DataReport(preprocess)
    report.add(inputs + 100)
    assert len(report.to_json()) == 20
    assert len(report.warnings()) == 6
    assert "15 more" in report.warnings()[-1]
    assert len(report.lines()) == 6
