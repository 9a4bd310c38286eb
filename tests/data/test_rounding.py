"""Rounding: columns with values far from zero are standardized as precisely as in float64, whatever their type."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import load, train
from pipeline.commands.evaluate import evaluate
from pipeline.config import JobConfig
from pipeline.config.files import build_job
from pipeline.data.fitted_transforms import FittedTransforms
from pipeline.setup import PreparedData, prepare_data
from tests.data.parquet_jobs import write_parquet
from tests.data.user_columns import LABELS, SECONDS

NUM_ROWS = 60
CUSTOM_SOURCES = "tests.data.user_columns"


def make_job(source: Any, *, task: Any = "multiclass", precision: str = "fp32", **data: Any) -> JobConfig:
    tree = {"source": "parquet", "url": source, "label": "y"} if isinstance(source, str) else {"source": source}
    training = {"precision": precision, "phases": [{"epochs": 10, "lr": 0.5}]}
    model = {"kind": "mlp", "hidden": [4]}
    return build_job({"name": "t", "task": task, "data": {**tree, **data}, "model": model, "train": training}, "test")


def standardize_all(prepared: PreparedData) -> np.ndarray:
    """Return all rows as the model's inputs, float32."""
    inputs = torch.from_numpy(np.array(prepared.dataset.train.inputs))
    transform = prepared.fitted.input_transform.make_transform_fn(
        torch.device("cpu"), torch.float32, prepared.dataset.schema
    )
    return transform(inputs).numpy()


def standardize_in_float64(values: np.ndarray, prepared: PreparedData) -> np.ndarray:
    """Standardize the same column with NumPy, with the mean in extended precision."""
    exact = values.astype(np.float64).astype(np.longdouble)
    training_values = exact[prepared.splits["train"].indices]
    scaled: np.ndarray = ((exact - training_values.mean()) / training_values.std()).astype(np.float64)
    return scaled


PARQUET_CONVERSIONS: dict[str, Any] = {
    "double": lambda values: values,
    "whole": lambda values: values.astype(np.int64),
    "levels": lambda values: pa.array(values).dictionary_encode(),
    "list": lambda values: pa.FixedSizeListArray.from_arrays(pa.array(np.repeat(values, 2)), 2),
    "decimal": lambda values: pa.array(values).cast(pa.decimal128(38, 10)),
}


@given(
    kind=st.sampled_from([*PARQUET_CONVERSIONS, "float64", "int64"]),
    exponent=st.floats(0, 12),
    spread=st.sampled_from([1e-3, 1.0, 250.0]),
    sign=st.sampled_from([-1, 1]),
    missing=st.booleans(),
    in_memory_mb=st.sampled_from([0, 256]),
    seed=st.integers(0, 100),
)
@settings(deadline=None, max_examples=40)
def test_column_with_large_offset_is_standardized_in_float64(
    kind: str, exponent: float, spread: float, sign: int, missing: bool, in_memory_mb: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    spread = 1e3 * spread if kind.startswith(("whole", "int")) else spread
    values = sign * spread * 10**exponent + spread * rng.normal(size=NUM_ROWS)
    with TemporaryDirectory() as folder:
        cache = {"folder": f"{folder}/cache", "in_memory_mb": in_memory_mb}
        if kind in PARQUET_CONVERSIONS:
            column = pa.array(PARQUET_CONVERSIONS[kind](values))
            values = np.asarray(PARQUET_CONVERSIONS[kind](values) if kind == "whole" else values)
            if kind == "decimal":
                values = column.cast(pa.float64()).to_numpy()
            columns = {"x": column, "other": rng.normal(size=NUM_ROWS), "y": np.arange(NUM_ROWS) % 2}
            if missing:
                columns["other"][3] = np.nan
            job = make_job(str(write_parquet(Path(folder) / "t.parquet", columns)), cache=cache)
        else:
            values = values.astype(kind)
            job = make_job({"call": f"{CUSTOM_SOURCES}:returns", "args": {"values": values.tolist(), "kind": kind}})
        prepared = prepare_data(job)
        actual = standardize_all(prepared)[:, 0]
        expected = standardize_in_float64(values, prepared)
    # Beyond 10^10, neighboring float64 values of the mean differ by more than 10^-6 standard deviations.
    max_value, std = np.abs(values.astype(np.float64)).max(), values.astype(np.float64).std()
    resolution = np.spacing(max_value) / std
    if prepared.dataset.schema is None and prepared.dataset.train.inputs.dtype == np.float32:
        resolution += np.spacing(np.float32(max_value)) / std  # float32 arrays are all shifted by one float32
    np.testing.assert_allclose(actual, expected, atol=2e-6 + resolution)


def test_float32_is_used_where_precise_enough(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    columns = {
        "x": rng.normal(5, 1, NUM_ROWS),
        "year": rng.integers(1990, 2026, NUM_ROWS),
        "y": np.arange(NUM_ROWS) % 2,
    }
    columns["seconds"] = (1.7e9 + 1000 * rng.normal(size=NUM_ROWS)).astype(np.float32)
    prepared = prepare_data(make_job(str(write_parquet(tmp_path / "t.parquet", columns))))
    assert prepared.dataset.train.inputs.dtype == np.float32
    assert prepared.dataset.warnings == ()
    assert prepared.dataset.reopen_in_float64 is None, "the source is not kept open without need"


def test_precision_depends_on_the_spread_of_training_rows(tmp_path: Path) -> None:
    """Other rows may have far-away values, such as 0 as a placeholder."""
    seconds = 1.7e9 + np.linspace(0, 10, NUM_ROWS)
    seconds[NUM_ROWS // 2 :] = 0
    columns = {"x": seconds, "y": np.arange(NUM_ROWS) % 2}
    half = NUM_ROWS // 2
    splits = {"by": "range", "train": [0, half], "val": [half, NUM_ROWS]}
    prepared = prepare_data(make_job(str(write_parquet(tmp_path / "t.parquet", columns)), splits=splits))
    np.testing.assert_allclose(
        standardize_all(prepared)[:half, 0], standardize_in_float64(seconds, prepared)[:half], atol=2e-6
    )


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_integers_beyond_float64_are_reported(tmp_path: Path, precision: str) -> None:
    near = 2**60 + np.arange(NUM_ROWS)
    wide = np.random.default_rng(0).integers(-(2**62), 2**62, NUM_ROWS)
    path = write_parquet(tmp_path / "t.parquet", {"near": near, "wide": wide, "y": np.arange(NUM_ROWS) % 2})
    (warning,) = prepare_data(make_job(str(path), precision=precision)).dataset.warnings
    assert "'near'" in warning
    assert "more digits than float64 holds" in warning


@pytest.mark.parametrize("kind", ["parquet", "call"])
def test_mixed_precision_results_match_fp64(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = pd.DataFrame({"x": SECONDS, "y": LABELS})
    frame.to_parquet(tmp_path / "t.parquet")
    source: Any = str(tmp_path / "t.parquet") if kind == "parquet" else {"call": f"{CUSTOM_SOURCES}:seconds"}
    runs = [
        train(make_job(source, precision=precision), storage=str(tmp_path / precision))
        for precision in ("fp32", "fp64")
    ]
    accuracies = [run.metrics["val/accuracy"] for run in runs]
    assert accuracies[0] == pytest.approx(accuracies[1], abs=0.02)
    assert accuracies[0] > 0.95
    model, (prepared, metrics) = (
        load(runs[0].url),
        (prepare_data(make_job(source)), evaluate(runs[0].url, trust=True).metrics),
    )
    rows = prepared.splits["val"].indices
    data = frame if kind == "parquet" else SECONDS[:, None]
    with torch.inference_mode():
        outputs = model.model(torch.from_numpy(standardize_all(prepared)))
    np.testing.assert_array_equal(model.predict_proba(data), outputs.double().softmax(1).numpy())
    assert (model.predict(data)[rows] == LABELS[rows]).mean() == metrics["val/accuracy"]
    if kind == "parquet":  # new data is read in the type that the transform was fitted on
        frame.iloc[:1].to_parquet(tmp_path / "one.parquet")
        (tmp_path / "one").mkdir()
        new_metrics = evaluate(runs[0].url, data=str(tmp_path / "one.parquet")).metrics
        assert new_metrics["data/accuracy"] == (model.predict(frame.iloc[:1]) == LABELS[:1]).mean()


def test_targets_with_large_offset_keep_precision() -> None:
    prepared = prepare_data(make_job({"call": f"{CUSTOM_SOURCES}:far_goals"}, task="regression"))
    expected = standardize_in_float64(SECONDS[:NUM_ROWS], prepared)
    np.testing.assert_allclose(prepared.targets["train"][:, 0], expected, atol=2e-6)


def test_fitted_transforms_of_an_earlier_version_are_read(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "t.parquet", {"x": np.arange(4.0), "y": [0, 1, 0, 1]})
    fitted = prepare_data(make_job(str(path), splits={"val": 0})).fitted
    stored = fitted.to_json()
    inputs = {key: value for key, value in stored["inputs"].items() if key != "dtype"} | {"version": 2}
    targets = {key: value for key, value in stored["targets"].items() if key != "values"} | {"version": 2}
    before = FittedTransforms.from_json({**stored, "version": 2, "inputs": inputs, "targets": targets})
    raw = torch.tensor([[0.5], [3.0]])
    cpu = torch.device("cpu")
    assert before.input_transform.make_transform_fn(cpu, torch.float32)(raw).equal(
        fitted.input_transform.make_transform_fn(cpu, torch.float32)(raw)
    )
    assert before.target_transform.classes == ("0", "1")
