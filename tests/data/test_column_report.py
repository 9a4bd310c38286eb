"""The report on values in new data that the training rows did not have: counts by column, and warnings."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd
import pytest

from pipeline.config import JobConfig
from pipeline.config.files import build_job
from pipeline.data import statistics
from pipeline.data.sources import Dataset, DatasetPart
from pipeline.data.tabular.encoder import encode_to_matrix, to_arrow_table
from pipeline.data.tabular.schema import Column, Schema
from pipeline.data.transforms import DataReport, TabularTransform, fit_input_transform, input_transform_from_json
from pipeline.errors import DataError
from pipeline.inference.inputs import to_raw_inputs

SCHEMA = Schema(
    (
        Column("age", "number"),
        Column("plan", "category", categories=("basic", "plus", "pro")),
        Column("pair", "number", 2),
        Column("flag", "number"),
    )
)
TRAINING_DATA = {
    "age": [20.0, 40.0, None, 30.0],
    "plan": ["basic", "plus", "basic", None],
    "pair": [[0.0, 10.0], [1.0, 20.0], [0.5, 15.0], [0.0, 11.0]],
    "flag": [1, 1, 1, 1],
}
"""The category `pro` occurs in no training row."""


def make_job(**data: Any) -> JobConfig:
    return build_job({"name": "t", "data": {"source": "parquet", "url": "x", "label": "y", **data}}, "test")


def fit_training_data(**data: Any) -> TabularTransform:
    inputs = encode_to_matrix(to_arrow_table(TRAINING_DATA), SCHEMA, dtype=np.float32, where="training")
    dataset = Dataset(DatasetPart(inputs, np.zeros(4, np.int64)), None, (), "fingerprint", SCHEMA)
    transform = fit_input_transform(make_job(**data), dataset, np.arange(4))
    assert isinstance(transform, TabularTransform)
    return transform


def make_report(transform: TabularTransform, data: Any) -> DataReport:
    report = DataReport(transform)
    to_raw_inputs(data, transform, make_job(), report)
    return report


NEW_DATA = pd.DataFrame(
    {
        "flag": [1, 0, 1, 1, 1],
        "pair": [[0.0, 10.0], [2.5, 10.0], [0.0, -5.0], None, [2.0, 30.0]],
        "plan": ["basic", "pro", " basic", None, "plus"],
        "age": [0.0, 61.0, None, -1e9, 60.0],
    }
)


@pytest.mark.parametrize("block", [1, 1 << 20])
def test_unseen_missing_and_far_values_are_counted_by_column(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(statistics, "BLOCK_VALUES", block)
    report = make_report(fit_training_data(), NEW_DATA).to_json()
    assert report == {
        "age": {"rows": 5, "unseen": 0.0, "filled": 0.2, "outside": 0.4},  # 0 and 60 are at the limits
        "plan": {"rows": 5, "unseen": 0.4, "filled": 0.2, "outside": 0.0},
        "pair": {"rows": 5, "unseen": 0.0, "filled": 0.2, "outside": 0.4},
        "flag": {"rows": 5, "unseen": 0.0, "filled": 0.0, "outside": 0.2},  # all training rows had 1
    }


def test_matrix_of_another_schema_has_the_same_counts() -> None:
    transform = fit_training_data()
    other_schema = Schema(
        (
            Column("flag", "number"),
            Column("pair", "number", 2),
            Column("plan", "category", categories=(" basic", "basic", "plus", "pro")),
            Column("age", "number"),
        )
    )
    raw = encode_to_matrix(to_arrow_table(NEW_DATA), other_schema, dtype=np.float32, where="new")
    report = DataReport(transform)
    report.add(raw, np.array([0, 2]), other_schema)
    report.add(raw, np.array([1, 3, 4]), other_schema)
    assert report.to_json() == make_report(transform, NEW_DATA).to_json()
    assert any("' basic' (training had 'basic')" in text for text in report.format_warnings())


def test_training_rows_are_not_reported() -> None:
    report = make_report(fit_training_data(), pd.DataFrame(TRAINING_DATA))
    assert {column["unseen"] for column in report.to_json().values()} == {0.0}
    assert {column["outside"] for column in report.to_json().values()} == {0.0}
    assert report.to_json()["age"]["filled"] == 0.25
    assert report.format_warnings() == []  # the same fraction is missing as in training
    assert len(report.format_lines()) == 2


def test_warning_names_column_fraction_value_and_treatment() -> None:
    texts = make_report(fit_training_data(), NEW_DATA).format_warnings()
    assert len(texts) == 5
    plan = next(text for text in texts if "'plan'" in text)
    assert "40.0% of 5 values were never seen in training, such as 'pro'" in plan
    age = next(text for text in texts if "'age'" in text)
    assert "40.0% of 5 values are far outside the training range, 20 to 40, such as 61" in age
    empty = make_report(fit_training_data(), NEW_DATA.assign(age=None, plan=None)).format_warnings()
    assert "column 'age': all of 5 rows have no value, in training 25.0%; filled with 30" in empty
    assert any("'plan'" in text and "encoded as a separate category" in text for text in empty)


def test_checkpoint_of_an_earlier_version_lacks_only_ranges() -> None:
    transform = fit_training_data()
    stored = json.loads(json.dumps(transform.to_json()))
    assert input_transform_from_json(stored) == transform
    for column in stored["columns"]:
        for name in ("low", "high", "nulls"):
            column.pop(name, None)
    old = input_transform_from_json(stored)
    assert isinstance(old, TabularTransform)
    assert input_transform_from_json(old.to_json()) == old
    report = make_report(old, NEW_DATA).to_json()
    assert {column["outside"] for column in report.values()} == {None}
    assert report["plan"]["unseen"] == 0.4
    assert report["age"]["filled"] == 0.2
    stored["columns"][0]["low"] = [1.0]
    with pytest.raises(DataError, match="damaged"):
        input_transform_from_json(stored)


@pytest.mark.parametrize(("values", "kind_name"), [([1, 2, None, 4, 5], "numbers"), ([True] * 5, "booleans")])
def test_numbers_in_a_text_column_are_rejected(values: list[Any], kind_name: str) -> None:
    with pytest.raises(DataError, match=rf"'plan' holds .*{kind_name}.* but held text in training, such as 'basic'"):
        make_report(fit_training_data(), NEW_DATA.assign(plan=values))
    empty = NEW_DATA.assign(plan=np.full(5, np.nan))
    assert make_report(fit_training_data(), empty).to_json()["plan"]["filled"] == 1.0


def test_numbers_unlike_training_texts_are_unseen() -> None:
    schema = Schema((Column("zip", "category", categories=("02134", "10001")),))
    inputs = np.array([[0.0], [1.0]], np.float32)
    dataset = Dataset(DatasetPart(inputs, np.zeros(2, np.int64)), None, (), "fingerprint", schema)
    transform = fit_input_transform(make_job(), dataset, np.arange(2))
    assert isinstance(transform, TabularTransform)
    report = make_report(transform, {"zip": [2134, 10001]})
    assert report.to_json()["zip"]["unseen"] == 0.5
    assert "such as '2134' (training had '02134')" in report.format_warnings()[0]


def test_warnings_of_wide_tables_are_short() -> None:
    schema = Schema(tuple(Column(f"c{number}", "number") for number in range(20)))
    inputs = np.random.default_rng(0).normal(size=(50, 20)).astype(np.float32)
    dataset = Dataset(DatasetPart(inputs, np.zeros(50, np.int64)), None, (), "fingerprint", schema)
    transform = fit_input_transform(make_job(), dataset, np.arange(50))
    assert isinstance(transform, TabularTransform)
    report = DataReport(transform)
    report.add(inputs + 100)
    assert len(report.to_json()) == 20
    assert len(report.format_warnings()) == 6
    assert "15 more" in report.format_warnings()[-1]
    assert len(report.format_lines()) == 6
