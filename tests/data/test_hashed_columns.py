"""Hashed columns: stable buckets, no list of values, and new values that fall into the buckets of training."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.sources.tables import decode
from pipeline.data.tabular.hashing import bucket_of
from pipeline.data.transforms import DataReport, TabularTransform, fit_input_transform, input_transform_from_json
from pipeline.errors import DataError
from pipeline.inference.inputs import to_raw_inputs
from tests.data.parquet_jobs import make_parquet_job, open_parquet, write_parquet

CPU = torch.device("cpu")


def test_buckets_never_change() -> None:
    texts = ["", "a", "Aachen", "Köln", "日本", "1"]
    expected = [bucket_of(text, 1_000) for text in texts]
    assert expected == [756, 928, 395, 889, 160, 710]
    code = f"from pipeline.data.tabular.hashing import bucket_of; print([bucket_of(t, 1000) for t in {texts!r}])"
    for seed in ("0", "1"):
        out = subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True, text=True
        )
        assert json.loads(out.stdout) == expected


@given(texts=st.lists(st.text(), min_size=1, max_size=30), buckets=st.integers(2, 50))
def test_buckets_are_in_range(texts: list[str], buckets: int) -> None:
    assert all(0 <= bucket_of(text, buckets) < buckets for text in texts)


def fit(url: Path, **data: Any) -> TabularTransform:
    dataset = open_parquet(url, **data)
    transform = fit_input_transform(make_parquet_job(url, **data), dataset, np.arange(len(dataset.train)))
    assert isinstance(transform, TabularTransform)
    return transform


def codes(transform: TabularTransform, data: Any, report: DataReport | None = None) -> list[int]:
    job = make_parquet_job("x")
    raw = to_raw_inputs(data, transform, job, report or DataReport(transform))
    rows = transform.make_transform_fn(CPU, torch.float32)(torch.from_numpy(raw))
    return [int(code) for code in rows[:, -1].tolist()]


def test_hashed_codes_in_training_and_prediction(tmp_path: Path) -> None:
    users = [f"user{number % 300}" for number in range(900)]
    url = write_parquet(tmp_path / "t.parquet", {"user": users, "y": [0, 1, 0] * 300})
    dataset = open_parquet(url, hashed={"us*": 64})
    assert dataset.schema is not None
    assert dataset.train.inputs[:, 0].tolist() == [bucket_of(user, 64) for user in users]
    transform = fit(url, hashed={"us*": 64})
    assert len(transform.schema.columns[0].categories) <= 64
    assert input_transform_from_json(json.loads(json.dumps(transform.to_json()))) == transform
    assert transform.to_json()["version"] == 4
    function = transform.make_transform_fn(CPU, torch.float32, dataset.schema)
    trained = function(torch.from_numpy(dataset.train.inputs))[:, -1].long().tolist()
    assert codes(transform, {"user": users}) == trained
    new = [f"other{number}" for number in range(200)]
    new_codes = codes(transform, {"user": new})
    present = {bucket_of(user, 64) for user in users}
    assert [code > 0 for code in new_codes] == [bucket_of(user, 64) in present for user in new]
    for first, second in zip(new, new_codes, strict=True):
        same = [code for user, code in zip(users, trained, strict=True) if bucket_of(user, 64) == bucket_of(first, 64)]
        assert set(same) <= {second}


def test_missing_values_and_buckets_without_rows(tmp_path: Path) -> None:
    url = write_parquet(tmp_path / "t.parquet", {"x": ["a", "b", None, "a"], "y": [0, 1, 0, 1]})
    transform = fit(url, hashed={"x": 1000}, one_hot_up_to=0)
    assert transform.code_sizes == (4,)  # two buckets, missing values, and any other
    report = DataReport(transform)
    assert codes(transform, {"x": ["never seen", None, "a"]}, report)[:2] == [0, 3]
    assert report.to_json()["x"]["unseen"] == pytest.approx(1 / 3)
    assert "in a bucket that no training row was in, such as 'never seen'" in report.format_warnings()[0]
    replaced = fit(url, hashed={"x": 1000}, one_hot_up_to=0, missing={"categorical": "b"})
    assert len(set(codes(replaced, {"x": [None, "b"]}))) == 1
    with pytest.raises(DataError, match="have no value in column 'x'"):
        fit(url, hashed={"x": 1000}, missing={"categorical": "fail"})


def test_numbers_and_dictionaries_are_hashed_as_text(tmp_path: Path) -> None:
    columns = {"zip": [52062, 10115, 52062], "y": [0, 1, 0], "city": pa.array(["a", "b", "a"]).dictionary_encode()}
    url = write_parquet(tmp_path / "t.parquet", columns)
    dataset = open_parquet(url, hashed={"*": 50}, categorical=["zip"])
    expected = [[bucket_of(text, 50) for text in row] for row in (("52062", "a"), ("10115", "b"), ("52062", "a"))]
    assert dataset.train.inputs.tolist() == expected


def test_no_list_of_values_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = write_parquet(tmp_path / "t.parquet", {"x": [str(number) for number in range(100)], "y": [0, 1] * 50})
    monkeypatch.setattr(decode, "MAX_CATEGORIES", 50)
    with pytest.raises(DataError, match=r"more than 50 categories") as error:
        open_parquet(url)
    assert "data.hashed" in error.value.fix
    assert open_parquet(url, hashed={"x": 8}).train.inputs.max() < 8
