"""A model whose `call` source returned a data frame takes its columns by name."""

from __future__ import annotations

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

from pipeline import load, train
from pipeline.errors import DataError
from pipeline.job_file import build_job
from pipeline.predictor import Predictor

MODULE = "frames_of_a_user"
BODY = """
import numpy as np, pandas as pd

def frame():
    draw = np.random.default_rng(0)
    x = pd.DataFrame({"size": draw.normal(5.0, 1.0, 200), "age": draw.normal(-2.0, 3.0, 200)})
    x["rooms"] = draw.integers(1, 9, 200)
    return x, (x["size"] > 5).to_numpy().astype(int)

def array():
    x, y = frame()
    return x.to_numpy(), y
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Predictor]:
    """Trained on a frame, and on the array of the same numbers."""
    folder = tmp_path_factory.mktemp("frames")
    (folder / f"{MODULE}.py").write_text(BODY)
    predictors_by_kind = {}
    for name in ("frame", "array"):
        tree = {
            "name": name,
            "code": str(folder),
            "data": {"source": {"call": f"{MODULE}:{name}"}},
            "train": {"phases": [{"epochs": 1, "lr": 0.5}]},
        }
        predictors_by_kind[name] = load(train(build_job(tree, "test"), storage=str(folder / "runs")).url, trust=True)
    return predictors_by_kind


NEW = pd.DataFrame({"size": [4.0, 6.0, 5.5], "age": [-1.0, 0.0, 1.0], "rooms": [1, 2, 3]})


def test_columns_are_found_by_name(models: dict[str, Predictor]) -> None:
    model = models["frame"]
    wanted = model.predict_proba(NEW.to_numpy())
    mixed = NEW[["rooms", "age", "size"]]
    for same in (
        NEW,
        mixed,
        NEW.assign(name="x")[["name", "rooms", "size", "age"]],
        pl.from_pandas(mixed),
        pa.Table.from_pandas(mixed),
        mixed.to_dict("list"),
        mixed.to_dict("records"),
        mixed.set_index(pd.Index(["i", "j", "k"])),
    ):
        np.testing.assert_array_equal(model.predict_proba(same), wanted)
    np.testing.assert_array_equal(models["array"].predict_proba(NEW), wanted)  # it knows no names
    assert len(model.predict(NEW.head(0))) == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (NEW.rename(columns={"size": "sizes"}), "no column 'size' .*did you mean sizes"),
        (pd.DataFrame(NEW.to_numpy()), "no column 'size'"),
        (NEW.assign(age=["old", "new", "old"]), "'age' holds text"),
        (NEW.assign(age=[1.0, np.nan, np.nan]), "2 of 3 rows have no value in column 'age'"),
    ],
)
def test_other_columns_are_refused(models: dict[str, Predictor], change: pd.DataFrame, words: str) -> None:
    with pytest.raises(DataError, match=f"(?s){words}"):
        models["frame"].predict(change)


def test_numbers_far_from_training_are_told(models: dict[str, Predictor]) -> None:
    model = models["frame"]
    far = NEW.assign(age=[0.0, 1000.0, 2000.0])
    with pytest.warns(UserWarning, match="column 'age': 66.7% of 3 values lie far outside the training range"):
        model.predict(far)
    with pytest.warns(UserWarning, match="column 'age'"):
        model.predict(far.to_numpy())
    report = model.column_report(far)
    assert {name: column["outside"] for name, column in report.items()} == {"size": 0, "age": 2 / 3, "rooms": 0}
    assert models["array"].column_report(far) == {}
