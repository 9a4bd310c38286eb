"""User functions as data sources: which return values are accepted, and how errors are reported."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config.files import build_job
from pipeline.data.sources import Dataset, open_dataset
from pipeline.errors import DataError

MODULE_NAME = "a_users_own_data"
OpenUserData = Callable[..., Dataset]


@pytest.fixture
def open_user_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenUserData]:
    """A function that writes a module with a function `data` of the given body, and opens it as a dataset."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def open_it(
        body: str, *, args: dict[str, Any] | None = None, precision: str = "fp32", name: str = "data"
    ) -> Dataset:
        sys.modules.pop(MODULE_NAME, None)
        text = "import numpy as np, torch\ndef data(**args):\n" + "".join(f"    {line}\n" for line in body.splitlines())
        (tmp_path / f"{MODULE_NAME}.py").write_text(text)
        tree = {
            "name": "t",
            "data": {"source": {"call": f"{MODULE_NAME}:{name}", "args": args or {}}},
            "train": {"precision": precision},
        }
        return open_dataset(build_job(tree, "test"))

    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # a second body within the same second would be ignored
    yield open_it
    sys.modules.pop(MODULE_NAME, None)


INPUTS_CODE, LABELS_CODE = "np.ones((4, 3), np.float32)", "np.array([0, 1, 1, 0])"


@pytest.mark.parametrize(
    ("returned", "test_rows", "classes"),
    [
        (f"{INPUTS_CODE}, {LABELS_CODE}", None, ()),
        (f"[{INPUTS_CODE}, {LABELS_CODE}]", None, ()),
        (f"torch.from_numpy({INPUTS_CODE}), torch.from_numpy({LABELS_CODE})", None, ()),
        (f"({INPUTS_CODE}, {LABELS_CODE}), ({INPUTS_CODE}[:2], {LABELS_CODE}[:2])", 2, ()),
        (f"{{'train': ({INPUTS_CODE}, {LABELS_CODE})}}", None, ()),
        (
            f"{{'train': ({INPUTS_CODE}, {LABELS_CODE}), 'test': ({INPUTS_CODE}[:1], {LABELS_CODE}[:1]), "
            "'classes': ['a', 'b']}",
            1,
            ("a", "b"),
        ),
        (
            f"{{'train': ({INPUTS_CODE}, {LABELS_CODE}), 'test': None, 'classes': np.array(['a', 'b'])}}",
            None,
            ("a", "b"),
        ),
    ],
)
def test_accepted_return_values(
    open_user_data: OpenUserData, returned: str, test_rows: int | None, classes: tuple[str, ...]
) -> None:
    dataset = open_user_data(f"return {returned}")
    assert dataset.train.inputs.shape == (4, 3)
    assert dataset.train.targets.tolist() == [0, 1, 1, 0]
    assert dataset.train.targets.dtype == np.int64
    assert (None if dataset.test is None else len(dataset.test)) == test_rows
    assert dataset.classes == classes


def test_args_are_passed(open_user_data: OpenUserData) -> None:
    assert open_user_data(
        "return np.full((args['n'], 1), 2.0), np.zeros(args['n'])", args={"n": 7}
    ).train.inputs.shape == (7, 1)


@pytest.mark.parametrize(
    ("inputs", "precision", "dtype"),
    [
        ("np.uint8", "fp64", "uint8"),
        ("np.int64", "fp64", "float64"),
        ("np.int64", "fp32", "float32"),
        ("np.int16", "fp64", "float32"),
        ("bool", "fp32", "float32"),
        ("np.float16", "fp32", "float32"),
        ("np.float64", "fp32", "float32"),
        ("np.float64", "fp64", "float64"),
        ("'>f4'", "fp32", "float32"),
    ],
)
def test_input_types(open_user_data: OpenUserData, inputs: str, precision: str, dtype: str) -> None:
    dataset = open_user_data(f"return np.ones((4, 3)).astype({inputs}), {LABELS_CODE}", precision=precision)
    assert dataset.train.inputs.dtype == np.dtype(dtype)
    assert dataset.train.inputs.dtype.isnative
    assert (dataset.train.inputs == 1).all()


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "int32", "uint8", "bool"])
def test_tensor_types(open_user_data: OpenUserData, kind: str) -> None:
    dataset = open_user_data(
        f"return torch.ones(4, 3).to(torch.{kind}), torch.tensor([0, 1, 1, 0], dtype=torch.{kind})"
    )
    assert dataset.train.inputs.dtype == (np.uint8 if kind == "uint8" else np.float32)
    assert dataset.train.targets.tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize(
    ("array", "shape"),
    [
        ("np.ones({shape}, np.uint8)", (4, 8, 6, 3)),
        ("np.ones({shape}, np.uint8)", (4, 8, 6, 1)),
        ("np.ones({shape}, np.uint8)", (4, 3, 8, 6)),
        ("torch.ones({shape}, dtype=torch.uint8)", (4, 8, 6, 3)),
        ("torch.ones({shape}, dtype=torch.uint8)", (4, 3, 8, 6)),
    ],
)
def test_channel_axis_is_detected(open_user_data: OpenUserData, array: str, shape: tuple[int, ...]) -> None:
    dataset = open_user_data(f"return {array.format(shape=shape)}, {LABELS_CODE}")
    assert dataset.train.inputs.shape == (4, min(shape[1], shape[3]), 8, 6)
    assert dataset.train.inputs.flags.c_contiguous


def test_ambiguous_channels_are_last_in_arrays_and_second_in_tensors(open_user_data: OpenUserData) -> None:
    body = "x = np.arange(4 * 3 * 5 * 3, dtype=np.uint8).reshape(4, 3, 5, 3)\n"
    arrays, tensors = (
        open_user_data(body + f"return {code}, {LABELS_CODE}").train.inputs for code in ("x", "torch.from_numpy(x)")
    )
    assert np.array_equal(arrays, tensors.transpose(0, 3, 1, 2))


def test_inputs_of_one_axis_are_one_column(open_user_data: OpenUserData) -> None:
    dataset = open_user_data("return np.arange(4.0), np.arange(4.0) * 2")
    assert dataset.train.inputs.shape == (4, 1)
    assert (dataset.train.targets.dtype, dataset.train.targets.shape) == (np.dtype("f4"), (4,))


def test_labels_of_shape_n_1_are_flattened(open_user_data: OpenUserData) -> None:
    assert open_user_data(f"return {INPUTS_CODE}, {LABELS_CODE}[:, None]").train.targets.tolist() == [0, 1, 1, 0]


def test_several_targets_per_row(open_user_data: OpenUserData) -> None:
    assert open_user_data(f"return {INPUTS_CODE}, np.zeros((4, 2))", precision="fp64").train.targets.dtype == np.float64


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("return None", "None"),
        (f"return {INPUTS_CODE}", "ndarray"),
        (f"return {INPUTS_CODE}, {LABELS_CODE}, 3", "a tuple of 3"),
        (f"return {{'test': ({INPUTS_CODE}, {LABELS_CODE})}}", "no key 'train'"),
        (f"return {{'train': ({INPUTS_CODE}, {LABELS_CODE}), 'vall': 1}}", "'vall'"),
        (f"return {{'train': {INPUTS_CODE}}}", "ndarray"),
        (f"return {INPUTS_CODE}.tolist(), {LABELS_CODE}", "a list of 4"),
        (f"return {INPUTS_CODE}[:3], {LABELS_CODE}", "3 rows of inputs, but 4 targets"),
        (f"return {INPUTS_CODE}[:0], {LABELS_CODE}[:0]", "no rows"),
        (f"return {INPUTS_CODE}[:, :0], {LABELS_CODE}", "(4, 0)"),
        (f"return np.float32(3), {LABELS_CODE}", "()"),
        (f"return {INPUTS_CODE}.astype(object), {LABELS_CODE}", "object"),
        (f"return {INPUTS_CODE}, np.array(['a', 'b', 'a', 'b'])", "<U1"),
        (f"return {INPUTS_CODE} * 1j, {LABELS_CODE}", "complex"),
        (
            f"x = {INPUTS_CODE}\nx[2, 1] = np.nan\nx[3, 1] = -np.inf\nreturn x, {LABELS_CODE}",
            "nan at row 2, position (1,), and 1 more",
        ),
        (f"return np.full((4, 3), 1e300), {LABELS_CODE}", "1e+300 at row 0"),
        (f"return {INPUTS_CODE}, np.array([0, np.inf, 0, 0])", "inf at row 1"),
        (f"return {INPUTS_CODE}, np.zeros((4, 2), int)", "(4, 2)"),
        (f"return {INPUTS_CODE}, np.full(4, 2**63, np.uint64)", str(2**63)),
        (f"return ({INPUTS_CODE}, {LABELS_CODE}), ({INPUTS_CODE}[:, :2], {LABELS_CODE})", "(N, 2"),
        (f"return ({INPUTS_CODE}, {LABELS_CODE}), ({INPUTS_CODE}, {LABELS_CODE} * 1.0)", "float32"),
        ("return 1 / 0", "ZeroDivisionError: division by zero, at "),
        ("import no_such_module_at_all", "no_such_module_at_all"),
        ("raise KeyError('day')", "KeyError: 'day'"),
    ],
)
def test_invalid_return_values_are_rejected(open_user_data: OpenUserData, body: str, text: str) -> None:
    with pytest.raises(DataError) as caught:
        open_user_data(body)
    assert text in caught.value.what
    assert f"{MODULE_NAME}:data" in caught.value.where
    assert caught.value.fix


def test_error_names_the_line_in_user_code(open_user_data: OpenUserData, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"{MODULE_NAME}\.py:4"):
        open_user_data("x = 1\nreturn x / 0")


@pytest.mark.parametrize(
    ("call", "texts"),
    [
        ("no_such_module_of_mine:data", ["no module 'no_such_module_of_mine'", "run from the folder"]),
        (f"{MODULE_NAME}:dta", ["no function or class 'dta'", f"{MODULE_NAME}.py"]),
        (f"{MODULE_NAME}:np", ["no function or class 'np'"]),
        ("broken_at_import:data", ["RuntimeError: too early", "broken_at_import.py:1"]),
        ("broken_syntax:data", ["SyntaxError"]),
        ("imports_nothing:data", ["nothing_like_it"]),
    ],
)
def test_functions_that_cannot_be_imported_are_reported(
    open_user_data: OpenUserData, tmp_path: Path, call: str, texts: list[str]
) -> None:
    open_user_data(f"return {INPUTS_CODE}, {LABELS_CODE}")
    (tmp_path / "broken_at_import.py").write_text("raise RuntimeError('too early')\n")
    (tmp_path / "broken_syntax.py").write_text("def data(:\n")
    (tmp_path / "imports_nothing.py").write_text("import nothing_like_it\n")
    with pytest.raises(DataError) as caught:
        open_dataset(build_job({"name": "t", "data": {"source": {"call": call}}}, "test"))
    assert all(text in str(caught.value) for text in texts)
    assert call in caught.value.where


def test_errors_in_the_function_are_reported(open_user_data: OpenUserData) -> None:
    with pytest.raises(DataError, match="KeyError: 'n'"):
        open_user_data("return np.ones((args['n'], 1)), np.zeros(4)", args={"m": 1})


def test_read_only_arrays_are_accepted(open_user_data: OpenUserData) -> None:
    assert open_user_data(f"return np.broadcast_to(np.float32(1), (4, 3)), {LABELS_CODE}").train.inputs.shape == (4, 3)


FRAME_CODE = "pd.DataFrame({'a': [0.0, 1.0, 2.0, 3.0], 'b': [10.0, 20.0, 30.0, 40.0]})"


@pytest.mark.parametrize(
    "frame", [FRAME_CODE, f"pl.from_pandas({FRAME_CODE})", f"pa.table({FRAME_CODE})"], ids=["pandas", "polars", "arrow"]
)
def test_column_names_of_frames_are_kept_and_test_rows_reordered(open_user_data: OpenUserData, frame: str) -> None:
    imports = "import pandas as pd, polars as pl, pyarrow as pa\n"
    reorder = f"x = {frame}\nother = x.select(['b', 'a']) if hasattr(x, 'select') else x[['b', 'a']]\n"
    dataset = open_user_data(f"{imports}{reorder}return (x, {LABELS_CODE}), (other, {LABELS_CODE})")
    assert dataset.column_names == ("a", "b")
    assert dataset.test is not None
    np.testing.assert_array_equal(dataset.test.inputs, dataset.train.inputs)
    assert open_user_data(
        f"{imports}x = {frame}\nreturn (x, {LABELS_CODE}), (np.asarray(x), {LABELS_CODE})"
    ).column_names == ("a", "b")


def test_test_rows_with_other_columns_are_rejected(open_user_data: OpenUserData) -> None:
    with pytest.raises(DataError, match="test inputs: the column 'a' is missing"):
        open_user_data(
            f"import pandas as pd\nx = {FRAME_CODE}\nreturn (x, {LABELS_CODE}), (x.rename(columns={{'a': 'c'}}), "
            f"{LABELS_CODE})"
        )


@pytest.mark.parametrize(
    "frame", [INPUTS_CODE, f"pd.DataFrame({INPUTS_CODE})", f"pd.DataFrame({INPUTS_CODE}, columns=['a', 'a', 'b'])"]
)
def test_arrays_and_unnamed_frames_have_no_names(open_user_data: OpenUserData, frame: str) -> None:
    assert open_user_data(f"import pandas as pd\nreturn {frame}, {LABELS_CODE}").column_names == ()
