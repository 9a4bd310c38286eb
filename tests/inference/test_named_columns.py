"""A model whose `call` source returned a data frame matches columns by name."""

from __future__ import annotations

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

from pipeline import load, train
from pipeline.config.files import build_job
from pipeline.errors import DataError
from pipeline.inference.predictor import Predictor

MODULE_NAME = "frames_of_a_user"
MODULE_CODE = """
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
def predictors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Predictor]:
    """Predictors trained on a data frame and on an array of the same values."""
    folder = tmp_path_factory.mktemp("frames")
    (folder / f"{MODULE_NAME}.py").write_text(MODULE_CODE)
    predictors_by_kind = {}
    for name in ("frame", "array"):
        tree = {
            "name": name,
            "code": str(folder),
            "data": {"source": {"call": f"{MODULE_NAME}:{name}"}},
            "train": {"phases": [{"epochs": 1, "lr": 0.5}]},
        }
        predictors_by_kind[name] = load(train(build_job(tree, "test"), storage=str(folder / "runs")).url, trust=True)
    return predictors_by_kind


NEW_DATA = pd.DataFrame({"size": [4.0, 6.0, 5.5], "age": [-1.0, 0.0, 1.0], "rooms": [1, 2, 3]})


def test_columns_are_matched_by_name(predictors: dict[str, Predictor]) -> None:
    model = predictors["frame"]
    expected = model.predict_proba(NEW_DATA.to_numpy())
    mixed = NEW_DATA[["rooms", "age", "size"]]
    for same in (
        NEW_DATA,
        mixed,
        NEW_DATA.assign(name="x")[["name", "rooms", "size", "age"]],
        pl.from_pandas(mixed),
        pa.Table.from_pandas(mixed),
        mixed.to_dict("list"),
        mixed.to_dict("records"),
        mixed.set_index(pd.Index(["i", "j", "k"])),
    ):
        np.testing.assert_array_equal(model.predict_proba(same), expected)
    np.testing.assert_array_equal(predictors["array"].predict_proba(NEW_DATA), expected)  # without names
    assert len(model.predict(NEW_DATA.head(0))) == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (NEW_DATA.rename(columns={"size": "sizes"}), "no column 'size' .*did you mean sizes"),
        (pd.DataFrame(NEW_DATA.to_numpy()), "no column 'size'"),
        (NEW_DATA.assign(age=["old", "new", "old"]), "'age' holds text"),
        (NEW_DATA.assign(age=[1.0, np.nan, np.nan]), "2 of 3 rows have no value in column 'age'"),
    ],
)
def test_other_columns_are_rejected(predictors: dict[str, Predictor], change: pd.DataFrame, words: str) -> None:
    with pytest.raises(DataError, match=f"(?s){words}"):
        predictors["frame"].predict(change)


def test_values_far_from_training_are_reported(predictors: dict[str, Predictor]) -> None:
    model = predictors["frame"]
    far = NEW_DATA.assign(age=[0.0, 1000.0, 2000.0])
    with pytest.warns(UserWarning, match="column 'age': 66.7% of 3 values are far outside the training range"):
        model.predict(far)
    with pytest.warns(UserWarning, match="column 'age'"):
        model.predict(far.to_numpy())
    report = model.column_report(far)
    assert {name: column["outside"] for name, column in report.items()} == {"size": 0, "age": 2 / 3, "rooms": 0}
    assert predictors["array"].column_report(far) == {}
