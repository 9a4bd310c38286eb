"""A function of the user's own as a source: what it may return, and what is said when it cannot be used."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data.sources import Source, open_source
from pipeline.errors import DataError
from pipeline.job_file import build_job

MODULE = "a_users_own_data"
Opens = Callable[..., Source]


@pytest.fixture
def opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Opens]:
    """Write a module with a function `data` of the given body into the working directory, and open it as a source."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def open_it(
        body: str, *, args: dict[str, Any] | None = None, precision: str = "fp32", name: str = "data"
    ) -> Source:
        sys.modules.pop(MODULE, None)
        text = "import numpy as np, torch\ndef data(**args):\n" + "".join(f"    {line}\n" for line in body.splitlines())
        (tmp_path / f"{MODULE}.py").write_text(text)
        tree = {
            "name": "t",
            "data": {"source": {"call": f"{MODULE}:{name}", "args": args or {}}},
            "train": {"precision": precision},
        }
        return open_source(build_job(tree, "test"))

    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # or a second body of the same second would not be seen
    yield open_it
    sys.modules.pop(MODULE, None)


X, Y = "np.ones((4, 3), np.float32)", "np.array([0, 1, 1, 0])"


@pytest.mark.parametrize(
    ("returned", "test_rows", "classes"),
    [
        (f"{X}, {Y}", None, ()),
        (f"[{X}, {Y}]", None, ()),
        (f"torch.from_numpy({X}), torch.from_numpy({Y})", None, ()),
        (f"({X}, {Y}), ({X}[:2], {Y}[:2])", 2, ()),
        (f"{{'train': ({X}, {Y})}}", None, ()),
        (f"{{'train': ({X}, {Y}), 'test': ({X}[:1], {Y}[:1]), 'classes': ['a', 'b']}}", 1, ("a", "b")),
        (f"{{'train': ({X}, {Y}), 'test': None, 'classes': np.array(['a', 'b'])}}", None, ("a", "b")),
    ],
)
def test_forms_of_the_answer(opens: Opens, returned: str, test_rows: int | None, classes: tuple[str, ...]) -> None:
    source = opens(f"return {returned}")
    assert source.train.inputs.shape == (4, 3)
    assert source.train.targets.tolist() == [0, 1, 1, 0]
    assert source.train.targets.dtype == np.int64
    assert (None if source.test is None else len(source.test)) == test_rows
    assert source.classes == classes


def test_args_are_passed(opens: Opens) -> None:
    assert opens("return np.full((args['n'], 1), 2.0), np.zeros(args['n'])", args={"n": 7}).train.inputs.shape == (7, 1)


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
def test_types_of_inputs(opens: Opens, inputs: str, precision: str, dtype: str) -> None:
    source = opens(f"return np.ones((4, 3)).astype({inputs}), {Y}", precision=precision)
    assert source.train.inputs.dtype == np.dtype(dtype)
    assert source.train.inputs.dtype.isnative
    assert (source.train.inputs == 1).all()


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "int32", "uint8", "bool"])
def test_types_of_tensors(opens: Opens, kind: str) -> None:
    source = opens(f"return torch.ones(4, 3).to(torch.{kind}), torch.tensor([0, 1, 1, 0], dtype=torch.{kind})")
    assert source.train.inputs.dtype == (np.uint8 if kind == "uint8" else np.float32)
    assert source.train.targets.tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize(
    ("made", "shape"),
    [
        ("np.ones({shape}, np.uint8)", (4, 8, 6, 3)),
        ("np.ones({shape}, np.uint8)", (4, 8, 6, 1)),
        ("np.ones({shape}, np.uint8)", (4, 3, 8, 6)),
        ("torch.ones({shape}, dtype=torch.uint8)", (4, 8, 6, 3)),
        ("torch.ones({shape}, dtype=torch.uint8)", (4, 3, 8, 6)),
    ],
)
def test_channels_are_found(opens: Opens, made: str, shape: tuple[int, ...]) -> None:
    source = opens(f"return {made.format(shape=shape)}, {Y}")
    assert source.train.inputs.shape == (4, min(shape[1], shape[3]), 8, 6)
    assert source.train.inputs.flags.c_contiguous


def test_channels_where_the_shape_does_not_tell(opens: Opens) -> None:
    body = "x = np.arange(4 * 3 * 5 * 3, dtype=np.uint8).reshape(4, 3, 5, 3)\n"
    arrays, tensors = (opens(body + f"return {made}, {Y}").train.inputs for made in ("x", "torch.from_numpy(x)"))
    assert np.array_equal(arrays, tensors.transpose(0, 3, 1, 2))


def test_one_axis_is_one_column(opens: Opens) -> None:
    source = opens("return np.arange(4.0), np.arange(4.0) * 2")
    assert source.train.inputs.shape == (4, 1)
    assert (source.train.targets.dtype, source.train.targets.shape) == (np.dtype("f4"), (4,))


def test_labels_in_a_column(opens: Opens) -> None:
    assert opens(f"return {X}, {Y}[:, None]").train.targets.tolist() == [0, 1, 1, 0]


def test_many_targets_a_row(opens: Opens) -> None:
    assert opens(f"return {X}, np.zeros((4, 2))", precision="fp64").train.targets.dtype == np.float64


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ("return None", "None"),
        (f"return {X}", "ndarray"),
        (f"return {X}, {Y}, 3", "a tuple of 3"),
        (f"return {{'test': ({X}, {Y})}}", "no key 'train'"),
        (f"return {{'train': ({X}, {Y}), 'vall': 1}}", "'vall'"),
        (f"return {{'train': {X}}}", "ndarray"),
        (f"return {X}.tolist(), {Y}", "a list of 4"),
        (f"return {X}[:3], {Y}", "3 rows of inputs, but 4 targets"),
        (f"return {X}[:0], {Y}[:0]", "no rows"),
        (f"return {X}[:, :0], {Y}", "(4, 0)"),
        (f"return np.float32(3), {Y}", "()"),
        (f"return {X}.astype(object), {Y}", "object"),
        (f"return {X}, np.array(['a', 'b', 'a', 'b'])", "<U1"),
        (f"return {X} * 1j, {Y}", "complex"),
        (f"x = {X}\nx[2, 1] = np.nan\nx[3, 1] = -np.inf\nreturn x, {Y}", "nan at row 2, position (1,), and 1 more"),
        (f"return np.full((4, 3), 1e300), {Y}", "1e+300 at row 0"),
        (f"return {X}, np.array([0, np.inf, 0, 0])", "inf at row 1"),
        (f"return {X}, np.zeros((4, 2), int)", "(4, 2)"),
        (f"return {X}, np.full(4, 2**63, np.uint64)", str(2**63)),
        (f"return ({X}, {Y}), ({X}[:, :2], {Y})", "(N, 2"),
        (f"return ({X}, {Y}), ({X}, {Y} * 1.0)", "float32"),
        ("return 1 / 0", "ZeroDivisionError: division by zero, at "),
        ("import no_such_module_at_all", "no_such_module_at_all"),
        ("raise KeyError('day')", "KeyError: 'day'"),
    ],
)
def test_what_cannot_be_used(opens: Opens, body: str, word: str) -> None:
    with pytest.raises(DataError) as refused:
        opens(body)
    assert word in refused.value.what
    assert f"{MODULE}:data" in refused.value.where
    assert refused.value.fix


def test_the_line_of_the_users_error_is_named(opens: Opens, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"{MODULE}\.py:4"):
        opens("x = 1\nreturn x / 0")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ("no_such_module_of_mine:data", ["no module 'no_such_module_of_mine'", "run from the folder"]),
        (f"{MODULE}:dta", ["no function or class 'dta'", f"{MODULE}.py"]),
        (f"{MODULE}:np", ["no function or class 'np'"]),
        ("broken_at_import:data", ["RuntimeError: too early", "broken_at_import.py:1"]),
        ("broken_syntax:data", ["SyntaxError"]),
        ("imports_nothing:data", ["nothing_like_it"]),
    ],
)
def test_functions_that_are_not_there(opens: Opens, tmp_path: Path, call: str, words: list[str]) -> None:
    opens(f"return {X}, {Y}")
    (tmp_path / "broken_at_import.py").write_text("raise RuntimeError('too early')\n")
    (tmp_path / "broken_syntax.py").write_text("def data(:\n")
    (tmp_path / "imports_nothing.py").write_text("import nothing_like_it\n")
    with pytest.raises(DataError) as refused:
        open_source(build_job({"name": "t", "data": {"source": {"call": call}}}, "test"))
    assert all(word in str(refused.value) for word in words)
    assert call in refused.value.where


def test_wrong_arguments(opens: Opens) -> None:
    with pytest.raises(DataError, match="KeyError: 'n'"):
        opens("return np.ones((args['n'], 1)), np.zeros(4)", args={"m": 1})


def test_read_only_arrays_are_fine(opens: Opens) -> None:
    assert opens(f"return np.broadcast_to(np.float32(1), (4, 3)), {Y}").train.inputs.shape == (4, 3)


FRAME = "pd.DataFrame({'a': [0.0, 1.0, 2.0, 3.0], 'b': [10.0, 20.0, 30.0, 40.0]})"


@pytest.mark.parametrize(
    "made", [FRAME, f"pl.from_pandas({FRAME})", f"pa.table({FRAME})"], ids=["pandas", "polars", "arrow"]
)
def test_names_of_a_frames_columns_are_kept_and_its_test_rows_ordered_by_them(opens: Opens, made: str) -> None:
    imports = "import pandas as pd, polars as pl, pyarrow as pa\n"
    reorder = f"x = {made}\nother = x.select(['b', 'a']) if hasattr(x, 'select') else x[['b', 'a']]\n"
    source = opens(f"{imports}{reorder}return (x, {Y}), (other, {Y})")
    assert source.names == ("a", "b")
    assert source.test is not None
    np.testing.assert_array_equal(source.test.inputs, source.train.inputs)
    assert opens(f"{imports}x = {made}\nreturn (x, {Y}), (np.asarray(x), {Y})").names == ("a", "b")


def test_test_rows_of_other_columns_are_refused(opens: Opens) -> None:
    with pytest.raises(DataError, match="test inputs: the column 'a' is not there"):
        opens(f"import pandas as pd\nx = {FRAME}\nreturn (x, {Y}), (x.rename(columns={{'a': 'c'}}), {Y})")


@pytest.mark.parametrize("made", [X, f"pd.DataFrame({X})", f"pd.DataFrame({X}, columns=['a', 'a', 'b'])"])
def test_arrays_and_frames_without_names_have_none(opens: Opens, made: str) -> None:
    assert opens(f"import pandas as pd\nreturn {made}, {Y}").names == ()
