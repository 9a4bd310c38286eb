"""Dates, times and durations as features: their numbers, compared with pandas, in training and in prediction."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import load, train
from pipeline.commands.evaluate import evaluate
from pipeline.commands.predict import predict
from pipeline.data.fitted_transforms import check_layout, find_rounded_columns, fit_transforms
from pipeline.data.splits import make_splits
from pipeline.data.tabular.encoder import encode_to_matrix, to_arrow_table
from pipeline.data.tabular.schema import Column, Schema
from pipeline.data.tabular.times import CLOCK_WIDTH, DATE_WIDTH, TIMESTAMP_WIDTH, format_number, times_to_numbers
from pipeline.data.transforms import DataReport, TabularTransform, fit_input_transform, input_transform_from_json
from pipeline.errors import DataError
from pipeline.inference.inputs import to_raw_inputs
from tests.data.parquet_jobs import make_parquet_job, open_parquet, write_parquet

NAN = float("nan")
DATES = st.dates(datetime.date(1800, 1, 1), datetime.date(2500, 12, 31))
TIMES = st.datetimes(datetime.datetime(1800, 1, 1), datetime.datetime(2500, 12, 31))


def circle(turns: Any) -> np.ndarray:
    angle = 2 * np.pi * np.asarray(turns, np.float64)
    return np.stack([np.sin(angle), np.cos(angle)], 1)


def expected_numbers(times: list[datetime.datetime]) -> np.ndarray:
    """Return the numbers of points in time by the calendar of Python."""
    midnights = [datetime.datetime(time.year, time.month, time.day) for time in times]
    fractions = [
        (time - midnight) / datetime.timedelta(days=1) for time, midnight in zip(times, midnights, strict=True)
    ]
    days = [(midnight - datetime.datetime(1970, 1, 1)).days for midnight in midnights]
    lengths = [datetime.date(time.year, 12, 31).timetuple().tm_yday for time in times]
    in_year = [(time.timetuple().tm_yday - 1) / length for time, length in zip(times, lengths, strict=True)]
    in_week = [time.weekday() / 7 for time in times]
    elapsed = np.array(days, np.float64) + fractions
    return np.hstack([elapsed[:, None], circle(in_year), circle(in_week), circle(fractions)])


@given(times=st.lists(TIMES, min_size=1, max_size=8), unit=st.sampled_from(["s", "ms", "us"]), data=st.data())
@settings(deadline=None, max_examples=100)
def test_timestamps_of_any_unit(times: list[datetime.datetime], unit: str, data: st.DataObject) -> None:
    zone = data.draw(st.sampled_from([None, "UTC", "Europe/Rome"]))
    array = pa.array(times, pa.timestamp("us")).cast(pa.timestamp(unit), safe=False)
    cut = [time.replace(tzinfo=None) for time in array.to_pylist()]
    zoned = array if zone is None else array.cast(pa.timestamp(unit, zone))  # the same instants in UTC
    numbers = times_to_numbers(zoned, TIMESTAMP_WIDTH)
    np.testing.assert_allclose(numbers, expected_numbers(cut), rtol=1e-12, atol=1e-9)
    assert np.array_equal(numbers[:, :DATE_WIDTH], times_to_numbers(zoned, DATE_WIDTH))
    texts = pa.array([time.isoformat() + ("Z" if zone else "") for time in cut])
    np.testing.assert_allclose(times_to_numbers(texts, TIMESTAMP_WIDTH), numbers, rtol=1e-14, atol=1e-12)


@given(dates=st.lists(DATES, min_size=1, max_size=8))
@settings(deadline=None, max_examples=60)
def test_dates_of_any_type(dates: list[datetime.date]) -> None:
    expected = expected_numbers([datetime.datetime(date.year, date.month, date.day) for date in dates])
    for kind in (pa.date32(), pa.date64(), pa.timestamp("s"), pa.timestamp("us")):
        numbers = times_to_numbers(pa.array(dates, pa.date32()).cast(kind), DATE_WIDTH)
        np.testing.assert_allclose(numbers, expected[:, :DATE_WIDTH], rtol=1e-14, atol=1e-12)


def test_nanoseconds_nulls_and_far_years() -> None:
    array = pa.array([0, 1_700_000_000_123_456_789, None, -1], pa.timestamp("ns"))
    numbers = times_to_numbers(array, TIMESTAMP_WIDTH)
    assert numbers[:, 0] == pytest.approx([0, 1_700_000_000_123_456_789 / 86_400e9, NAN, 0], nan_ok=True)
    assert np.isnan(numbers[2]).all()
    assert not np.isnan(numbers[[0, 1, 3]]).any()
    far = times_to_numbers(pa.array([2**55, -(2**55)], pa.timestamp("s")), TIMESTAMP_WIDTH)
    assert np.isfinite(far).all()


@pytest.mark.parametrize("kind", [pa.time32("s"), pa.time32("ms"), pa.time64("us"), pa.time64("ns")])
def test_times_of_day(kind: pa.DataType) -> None:
    array = pa.array([datetime.time(0), datetime.time(6), datetime.time(18, 30), None], pa.time64("ns")).cast(kind)
    numbers = times_to_numbers(array, CLOCK_WIDTH)
    fractions = [0, 0.25, 18.5 / 24]
    np.testing.assert_allclose(numbers[:3], np.hstack([np.array(fractions)[:, None], circle(fractions)]), atol=1e-15)
    assert np.isnan(numbers[3]).all()


def test_numbers_as_text() -> None:
    assert format_number(19_874.0, DATE_WIDTH) == "2024-05-31"
    assert format_number(19_874.5, TIMESTAMP_WIDTH) == "2024-05-31 12:00:00"
    assert format_number(0.75, CLOCK_WIDTH) == "18:00:00"


TABLE = {
    "day": [datetime.date(2024, 1, 1), datetime.date(2024, 7, 1), None, datetime.date(2025, 1, 1)],
    "at": pa.array([0, 10**15, 2 * 10**15, None], pa.timestamp("us", "Asia/Tokyo")),
    "clock": [datetime.time(1), datetime.time(13), None, datetime.time(23)],
    "took": pa.array([1_500, None, 60_000, 0], pa.duration("ms")),
    "text": ["2024-02-29T10:00:00", "2020-01-01", None, "1999-12-31"],
    "plan": ["a", "b", "a", None],
    "y": [0, 1, 0, 1],
}


def test_a_table_of_dates_times_and_durations(tmp_path: Path) -> None:
    url = write_parquet(tmp_path / "t.parquet", TABLE)
    dataset = open_parquet(url, dates=["te*"])
    assert dataset.schema is not None
    assert [(column.name, column.kind, column.width) for column in dataset.schema.columns] == [
        ("day", "time", DATE_WIDTH),
        ("at", "time", TIMESTAMP_WIDTH),
        ("clock", "time", CLOCK_WIDTH),
        ("took", "number", 1),
        ("text", "time", TIMESTAMP_WIDTH),
        ("plan", "category", 1),
    ]
    took = dataset.schema.offsets[3]
    assert dataset.train.inputs[:, took].tolist() == pytest.approx([1.5, NAN, 60, 0], nan_ok=True)
    as_text = open_parquet(url)
    assert as_text.schema is not None
    assert as_text.schema.columns[4].kind == "category", "text is only parsed where the job says so"


@pytest.mark.parametrize(
    "to_input", [pa.table, pd.DataFrame, pl.DataFrame, dict], ids=["arrow", "pandas", "polars", "dict"]
)
def test_prediction_reads_the_same_numbers(tmp_path: Path, to_input: Any) -> None:
    dataset = open_parquet(write_parquet(tmp_path / "t.parquet", TABLE), dates=["text"])
    job = make_parquet_job("x", dates=["text"])
    transform = fit_input_transform(job, dataset, np.arange(4))
    assert isinstance(transform, TabularTransform)
    stored = json.loads(json.dumps(transform.to_json()))
    assert stored["version"] == 4, "earlier versions of the program must refuse it"
    assert input_transform_from_json(stored) == transform
    plain = {name: pa.array(values).to_pylist() for name, values in TABLE.items()}
    data = pa.table(TABLE) if to_input is pa.table else to_input(plain)
    rows = to_raw_inputs(data, transform, job, DataReport(transform))
    np.testing.assert_array_equal(rows, dataset.train.inputs)


def test_files_with_dates_and_with_timestamps(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", {"x": [datetime.date(2024, 5, 31)], "y": [0]})
    write_parquet(tmp_path / "b.parquet", {"x": [datetime.datetime(2024, 5, 31, 12)], "y": [1]})
    dataset = open_parquet(tmp_path)
    assert dataset.schema == Schema((Column("x", "time", TIMESTAMP_WIDTH),))
    assert dataset.train.inputs[:, 0].tolist() == [19_874, 19_874.5]


def test_missing_dates_are_filled_and_reported(tmp_path: Path) -> None:
    days = [datetime.date(2024, 1, 1) + datetime.timedelta(days=7 * day) for day in range(40)]
    dataset = open_parquet(write_parquet(tmp_path / "t.parquet", {"day": days, "y": [0, 1] * 20}))
    job = make_parquet_job("x")
    transform = fit_input_transform(job, dataset, np.arange(40))
    assert isinstance(transform, TabularTransform)
    assert transform.fill[0] == np.median(dataset.train.inputs[:, 0])
    report = DataReport(transform)
    late = datetime.date(2030, 5, 31)
    to_raw_inputs({"day": [late, late, days[3], None]}, transform, job, report)
    warnings = report.format_warnings()
    assert "2024-01-01 to 2024-09-30, such as 2030-05-31" in warnings[0]
    assert "25.0% of 4 rows have no value" in warnings[1]
    assert report.to_json()["day"] == {"rows": 4, "unseen": 0.0, "filled": 0.25, "outside": 0.5}
    with pytest.raises(DataError, match=r"'day' holds whole numbers .*; expected: dates or times"):
        to_raw_inputs({"day": [1, 2]}, transform, job, DataReport(transform))
    with pytest.raises(DataError, match="'day' has text that is not a date"):
        to_raw_inputs({"day": ["soon"]}, transform, job, DataReport(transform))
    text = to_raw_inputs({"day": ["2030-05-31"]}, transform, job, DataReport(transform))
    assert text[0, 0] == (late - datetime.date(1970, 1, 1)).days


def test_seconds_within_a_day_are_kept_in_float64(tmp_path: Path) -> None:
    start = datetime.datetime(2024, 5, 31)
    times = [start + datetime.timedelta(seconds=second) for second in range(100)]
    url = write_parquet(tmp_path / "t.parquet", {"at": times, "y": [0, 1] * 50})
    dataset, job = open_parquet(url), make_parquet_job(url)
    fitted = fit_transforms(job, dataset, make_splits(job, dataset))
    assert find_rounded_columns(job, dataset, fitted) == ["at"]
    dates = open_parquet(
        write_parquet(
            tmp_path / "d.parquet", {"at": [start.date()] * 50 + [datetime.date(1970, 1, 1)] * 50, "y": [0, 1] * 50}
        )
    )
    assert find_rounded_columns(job, dates, fit_transforms(job, dates, make_splits(job, dates))) == []
    with pytest.raises(DataError, match="'at' holds dates, in training holds dates with times of day"):
        check_layout(fitted, dates)


def test_empty_and_null_columns() -> None:
    schema = Schema((Column("x", "time", TIMESTAMP_WIDTH), Column("z", "number")))
    for data in (
        {"x": pa.nulls(2), "z": pa.nulls(2)},
        {"x": pa.array([None] * 2, pa.date32()), "z": pa.array([None] * 2, pa.duration("s"))},
    ):
        encoded = encode_to_matrix(to_arrow_table(data), schema, dtype=np.float32, where="new")
        assert encoded.shape == (2, 8)
        assert np.isnan(encoded).all()


@pytest.mark.parametrize(
    "model", [{}, {"numeric_embedding": "piecewise"}, {"numeric_embedding": "periodic", "ensemble": 2}]
)
def test_a_run_learns_from_a_weekday(tmp_path: Path, model: dict[str, Any]) -> None:
    days = [datetime.date(2022, 1, 1) + datetime.timedelta(days=day) for day in range(600)]
    weekend = [day.weekday() >= 5 for day in days]
    url = write_parquet(tmp_path / "t.parquet", {"day": days, "y": weekend})
    job = {
        "name": "weekend",
        "data": {"source": "parquet", "url": str(url), "label": "y", "splits": {"val": 0.2}},
        "task": "binary",
        "model": {"kind": "mlp", "hidden": [32], **model},
        "train": {"batch_size": 32, "optimizer": {"kind": "adam"}, "phases": [{"epochs": 15, "lr": 0.01}]},
        "best": {"metric": "val/loss"},
    }
    run = train(job, storage=str(tmp_path / "runs"))
    assert run.metrics["val/accuracy"] > 0.97
    predictor = load(run.url)
    new = [datetime.date(2022, 8, 6), datetime.date(2022, 8, 8)]  # Saturday, Monday
    assert predictor.predict({"day": new}).tolist() == [True, False]
    predict(run.url, input=str(url), output=str(tmp_path / "out.parquet"))
    assert evaluate(run.url, data=str(url)).metrics["data/accuracy"] > 0.97
