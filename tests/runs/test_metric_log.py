"""The metric log: its segments, and reading it with several libraries."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import duckdb
import hypothesis.strategies as st
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings

from pipeline.config import METRICS
from pipeline.config.files import build_job
from pipeline.errors import StorageError
from pipeline.runs.metric_log.segments import MetricSchema, PendingRows, SegmentLayout, encode_table
from tests.runs.factories import SEGMENT_STEPS, make_block, make_evaluation

EXTRA_COLUMNS = MetricSchema(
    steps={"grad_norm": "float64", "clipped": "bool"}, evaluations={"f1": "float64", "note": "string"}
)


def query_duckdb(query: str) -> list[Any]:
    """Return the rows of a DuckDB query."""
    result = duckdb.sql(query)
    assert result is not None
    return result.fetchall()


def make_pending_rows(columns: MetricSchema = EXTRA_COLUMNS) -> PendingRows:
    return PendingRows("mnist-1", 2, SegmentLayout(SEGMENT_STEPS, SEGMENT_STEPS), columns)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Two complete segments and an incomplete one, as stored."""
    rows = make_pending_rows()
    rows.add(
        [make_block(1, 120, grad_norm=1.5, clipped=True), make_block(121, 250, grad_norm=0.5, clipped=False)],
        [
            make_evaluation(0, epoch=0),
            make_evaluation(100, f1=0.8),
            make_evaluation(200, note="late"),
            make_evaluation(200, split="train"),
        ],
    )
    for segment in rows.iter_segments(250, is_final=True):
        for folder, table in (("steps", segment.steps), ("evals", segment.evaluations)):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / segment.file_name).write_bytes(encode_table(table))
    return tmp_path


def test_pyarrow_reads_the_log(log: Path) -> None:
    steps = ds.dataset(log / "steps").to_table()
    assert steps.schema == EXTRA_COLUMNS.step_schema()
    assert steps["step"].to_pylist() == list(range(1, 251))
    assert set(steps["run"].to_pylist()) == {"mnist-1"}
    assert set(steps["attempt"].to_pylist()) == {2}
    assert steps["loss"].to_pylist() == [1.0 / step for step in range(1, 251)]
    assert str(steps["time"][0].as_py()) == "2027-01-15 08:00:00.000100+00:00"
    evaluations = ds.dataset(log / "evals").to_table()
    assert evaluations.schema == EXTRA_COLUMNS.evaluation_schema()
    assert evaluations["f1"].to_pylist() == [None, 0.8, None, None]


def test_duckdb_reads_the_log(log: Path) -> None:
    query = f"""
        select count(*), sum(samples), max(step), avg(grad_norm), count(distinct run), bool_or(clipped)
        from '{log}/steps/*.parquet'
    """
    assert query_duckdb(query) == [(250, 25000, 250, pytest.approx((120 * 1.5 + 130 * 0.5) / 250), 1, True)]
    query = f"select split, step, note from '{log}/evals/*.parquet' where step = 200 order by split"
    assert query_duckdb(query) == [("train", 200, None), ("val", 200, "late")]


def test_pandas_reads_the_log(log: Path) -> None:
    steps = pd.read_parquet(log / "steps")
    assert steps["step"].is_monotonic_increasing
    assert len(steps) == 250
    assert steps["time"].dt.tz is not None
    assert pd.read_parquet(log / "evals").loc[1, "f1"] == 0.8


def test_polars_reads_the_log(log: Path) -> None:
    steps = pl.read_parquet(f"{log}/steps/*.parquet")
    assert steps["step"].to_list() == list(range(1, 251))
    assert steps["clipped"].sum() == 120
    assert pl.read_parquet(f"{log}/evals/*.parquet").filter(pl.col("split") == "val").height == 3


def test_segment_without_evaluations_has_no_rows(log: Path, tmp_path: Path) -> None:
    file = log / "evals" / "000002.parquet"
    assert pq.read_table(file).num_rows == 0
    assert len(pd.read_parquet(file)) == 0
    assert pl.read_parquet(file).height == 0
    assert query_duckdb(f"select count(*) from '{file}'") == [(0,)]


def test_undefined_values_are_null() -> None:
    rows = make_pending_rows(MetricSchema())
    without, nan = make_block(1, 2), make_block(3, 4)
    del without["correct"]
    nan["correct"] = np.full(2, math.nan)
    rows.add([without, nan], [make_evaluation(4, accuracy=math.nan, correct=None)])
    assert rows.steps["correct"].to_pylist() == [None] * 4
    assert rows.evaluations["accuracy"].to_pylist() == [None]
    assert rows.evaluations["correct"].to_pylist() == [None]
    assert rows.find_nonfinite_row() is None


@pytest.mark.parametrize("kind", METRICS)
def test_log_has_columns_of_task_and_custom_metrics(kind: str) -> None:
    job = build_job({"name": "logged", "task": kind, "metrics": ["mine:cost"]}, "here")
    columns = MetricSchema.from_metadata({"columns": MetricSchema.from_job(job).to_json()})
    schema = columns.evaluation_schema()
    assert {*METRICS[job.task.kind], "cost", "accuracy", "correct", "samples"} <= set(schema.names)
    assert len(schema.names) == len(set(schema.names))
    rows = make_pending_rows(columns)
    rows.add(
        [make_block(1, 2)], [make_evaluation(2, cost=math.nan, loss=math.nan, **{METRICS[job.task.kind][-1]: math.inf})]
    )
    assert rows.evaluations["cost"].to_pylist() == [None], "an undefined metric"
    assert rows.evaluations[METRICS[job.task.kind][-1]].to_pylist() == [math.inf]
    assert rows.find_nonfinite_row() is not None, "a NaN loss is kept"


def test_nonfinite_loss_is_stored_unchanged() -> None:
    rows = make_pending_rows(MetricSchema())
    block = make_block(1, 3)
    block["loss"] = np.array([1.0, math.nan, math.inf])
    rows.add([block], [])
    nonfinite_row = rows.find_nonfinite_row()
    assert nonfinite_row is not None
    assert nonfinite_row["step"] == 2
    assert math.isnan(nonfinite_row["loss"])


@pytest.mark.parametrize("bad", [{"speed": 1.0}, {"run": 1}, {"attempt": 3}])
def test_columns_are_fixed_at_creation(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="fixed when the run was created"):
        make_pending_rows().add([make_block(1, 2, **bad)], [])
    with pytest.raises(ValueError, match="fixed when the run was created"):
        make_pending_rows().add([], [make_evaluation(1, **bad)])


def test_a_column_has_one_type_in_both_tables() -> None:
    with pytest.raises(ValueError, match="one type"):
        MetricSchema(steps={"x": "int64"}, evaluations={"x": "float64"})
    assert MetricSchema.from_metadata({"columns": EXTRA_COLUMNS.to_json()}) == EXTRA_COLUMNS
    assert MetricSchema.from_metadata({}) == MetricSchema()


@pytest.mark.parametrize(
    ("blocks", "evaluations"),
    [
        ([(1, 10), (12, 20)], []),
        ([(1, 10), (10, 20)], []),
        ([(2, 20)], []),
        ([(1, 19)], []),
        ([(11, 20), (1, 10)], []),
        ([(1, 20)], [21]),
        ([(1, 20)], [10, 5]),
    ],
)
def test_commit_needs_each_row_once(blocks: list[tuple[int, int]], evaluations: list[int]) -> None:
    rows = make_pending_rows(MetricSchema())
    rows.add([make_block(*ends) for ends in blocks], [make_evaluation(step) for step in evaluations])
    with pytest.raises(ValueError, match="from step 1"):
        rows.check_contiguous(20)


@settings(max_examples=60, deadline=None)
@given(
    commit_steps=st.sets(st.integers(1, 60), min_size=1),
    layout=st.tuples(st.integers(1, 25), st.integers(1, 25)).map(sorted).map(lambda sizes: SegmentLayout(*sizes)),
    resumes=st.sets(st.integers(1, 60)),
    evaluated=st.sets(st.integers(0, 60)),
)
def test_segments_depend_only_on_the_steps(
    commit_steps: set[int], layout: SegmentLayout, resumes: set[int], evaluated: set[int]
) -> None:
    """They are the same for any commits, and for any resumes from the rows of a checkpoint."""
    published: dict[int, tuple[list[int], list[int]]] = {}
    rows = PendingRows("run", 1, layout, MetricSchema())
    before, last = 0, max(commit_steps)
    for step in sorted(commit_steps):
        expected = sorted(at for at in evaluated if before < at <= step or (at == 0 and before == 0))
        rows.add([make_block(before + 1, step)], [make_evaluation(at) for at in expected])
        rows.check_contiguous(step)
        data, first = rows.to_parquet(), rows.first_segment
        for segment in rows.iter_segments(step, is_final=step == last):
            published[segment.index] = (segment.steps["step"].to_pylist(), segment.evaluations["step"].to_pylist())
        if step in resumes:
            rows = PendingRows("run", 2, layout, MetricSchema())
            rows.load(data, first)
            after_resume = {
                segment.index: segment.steps["step"].to_pylist()
                for segment in rows.iter_segments(step, is_final=step == last)
            }
            assert after_resume == {index: published[index][0] for index in after_resume}
        rows.drop_published(step)
        before = step
    assert sorted(published) == list(range(layout.segment_of(last) + 1))
    for index, (steps, evaluations) in published.items():
        assert steps == list(range(layout.first_step(index), min(layout.last_step(index), last) + 1))
        assert evaluations == [at for at in sorted(evaluated) if at <= last and layout.segment_of(at) == index]


@given(first=st.integers(1, 60), more=st.integers(0, 500))
def test_segments_are_consecutive_and_double_up_to_full_size(first: int, more: int) -> None:
    layout = SegmentLayout(first, first + more)
    end = 0
    for index in range(40):
        size = first if index == 0 else min(end, first + more)
        assert (layout.first_step(index), layout.last_step(index)) == (end + 1, end + size)
        end += size
        assert {layout.segment_of(step) for step in range(end - size + 1, end + 1)} == {index}
        assert (layout.count_complete(end - 1), layout.count_complete(end)) == (index, index + 1)
    assert layout.segment_of(0) == layout.count_complete(0) == 0


def test_run_of_an_earlier_version_has_fixed_size_segments() -> None:
    layout = SegmentLayout.from_metadata({"cell_steps": 7})
    assert [layout.last_step(index) for index in range(5)] == [7, 14, 21, 28, 35]
    assert SegmentLayout.from_metadata({"cell_steps": 7, "first_cell_steps": 2}) == SegmentLayout(2, 7)
    with pytest.raises(StorageError, match="8 to 7"):
        SegmentLayout.from_metadata({"cell_steps": 7, "first_cell_steps": 8})


def test_rows_keep_their_attempt() -> None:
    first = PendingRows("run", 1, SegmentLayout(SEGMENT_STEPS, SEGMENT_STEPS), EXTRA_COLUMNS)
    first.add([make_block(1, 50)], [make_evaluation(50, note="a")])
    second = PendingRows("run", 2, SegmentLayout(SEGMENT_STEPS, SEGMENT_STEPS), EXTRA_COLUMNS)
    second.load(first.to_parquet(), 0)
    second.add([make_block(51, 60)], [make_evaluation(60)])
    assert second.steps["attempt"].to_pylist() == [1] * 50 + [2] * 10
    assert second.evaluations["attempt"].to_pylist() == [1, 2]
    assert second.evaluations["note"].to_pylist() == ["a", None]


def test_same_rows_give_the_same_small_files() -> None:
    rows = make_pending_rows(MetricSchema())
    rows.add([make_block(first, first + 499) for first in range(1, 20_000, 500)], [])
    data = encode_table(rows.steps)
    assert data == encode_table(pa.concat_tables([rows.steps.slice(0, 7), rows.steps.slice(7)]).combine_chunks())
    assert len(data) < 12 * 20_000
    assert pq.read_table(io.BytesIO(data)).equals(rows.steps.combine_chunks())
