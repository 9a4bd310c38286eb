"""A function of the user's own as a source: called, and its answer checked before anything is built on it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.config import UserFunctionConfig
from pipeline.data.dataset import Dataset, DatasetPart, make_dataset
from pipeline.data.rounding import NumberKind, is_too_coarse, max_rounding_error
from pipeline.data.statistics import BLOCK_VALUES
from pipeline.errors import DataError
from pipeline.user_code import call_user_function
from pipeline.watchdog import watchdog_suspended

if TYPE_CHECKING:
    from pipeline.data.tabular.schema import FloatType  # it needs Arrow

RETURNS = (
    "return (inputs, targets), ((inputs, targets), (test_inputs, test_targets)), or a dict with train, test, classes"
)
MAX_CHANNELS = 4


def open_user_function(
    config: UserFunctionConfig, *, float64: bool, on_progress: Callable[[str], None] = lambda text: None
) -> Dataset:
    """Import and call the function, and bring what it returns into the form of a `Source`.

    It returns NumPy arrays or torch tensors, as `(inputs, targets)`, as two such pairs (training and test), or as
    `{"train": pair, "test": pair, "classes": names}` with the last two optional. The working directory is importable.

    Inputs: uint8 stays uint8; any other number becomes float32, or float64 where `float64` and float32 does not hold
    all of its type. Targets that are floats stay float64 where float32 would lose digits that matter. One axis (N,)
    becomes (N, 1). Images of four axes have their channels last in NumPy arrays and second in tensors, as is usual for
    each, unless only one of the two axes is small enough (at most 4) to be the channels.

    Inputs may be a data frame of numbers (pandas, polars, Arrow). Its names of columns are kept in `Source.names`, and
    a test frame is brought into the order of the training frame.

    The function may take as long as it likes: `scale.hang_s` is no limit for it, for nobody can see its progress.

    Raises
    ------
    DataError: names the function, and what to change in it.
    """
    where = f"data.source.call: {config.call}"
    on_progress(f"calling {config.call}")
    with watchdog_suspended():
        returned = call_user_function(config.call, config.args, where=where, error=DataError)
    return _to_dataset(returned, where, float64)


def _to_dataset(returned: Any, where: str, float64: bool) -> Dataset:
    """What the function returned as a source. Its arrays are held on to for as long as `in_float64` is."""
    train, test, classes = _unpack_parts(returned, where)
    names = _input_column_names(train)
    test = _reorder_columns(test, names, f"{where}, test inputs")
    pairs = {
        name: _to_arrays(pair, f"{where}, {name}")
        for name, pair in (("train", train), ("test", test))
        if pair is not None
    }
    types: list[FloatType] = [_select_float_type([pair[place] for pair in pairs.values()], float64) for place in (0, 1)]
    if any(_needs_float64(targets) for _, targets in pairs.values()):
        types[1] = np.float64
    parts = {
        name: DatasetPart(
            _convert_inputs(inputs, f"{where}, {name} inputs", types[0]),
            _convert_targets(targets, f"{where}, {name} targets", types[1]),
        )
        for name, (inputs, targets) in pairs.items()
    }
    if len(parts) == 2:
        _check_same_layout(parts["train"], parts["test"], where)
    source = make_dataset(parts["train"], parts.get("test"), classes, names)
    errors = [_max_rounding_errors(pairs[name][0], part.inputs) for name, part in parts.items()]
    if not np.any(errors):
        return source
    in_float64 = None if float64 else lambda: _to_dataset(returned, where, float64=True)
    return replace(source, rounding_errors=np.max(errors, axis=0), reopen_in_float64=in_float64)


def _unpack_parts(returned: Any, where: str) -> tuple[Any, Any, tuple[str, ...]]:
    """Training pair, test pair or None, and class names."""
    if isinstance(returned, Mapping):
        unknown = sorted(set(map(str, returned)) - {"train", "test", "classes"})
        if unknown or "train" not in returned:
            problem = f"the key {unknown[0]!r}" if unknown else "no key 'train'"
            raise DataError(f"returned a dict with {problem}", where=where, fix=RETURNS)
        classes = returned.get("classes")
        return (
            returned["train"],
            returned.get("test"),
            tuple(str(name) for name in (() if classes is None else classes)),
        )
    if isinstance(returned, (tuple, list)) and len(returned) == 2:
        if all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in returned):
            return returned[0], returned[1], ()
        return returned, None, ()
    raise DataError(f"returned {_describe_value(returned)}", where=where, fix=RETURNS)


def get_column_names(data: Any) -> tuple[str, ...]:
    """Names of a data frame's columns; empty where they are no text, or one occurs twice, or it is no data frame."""
    names = getattr(data, "column_names", getattr(data, "columns", None))
    if names is None or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        return ()
    return tuple(map(str, names))


def _input_column_names(pair: Any) -> tuple[str, ...]:
    return get_column_names(pair[0]) if isinstance(pair, (tuple, list)) and len(pair) == 2 else ()


def _reorder_columns(pair: Any, names: tuple[str, ...], where: str) -> Any:
    """A pair whose inputs, where they are a data frame too, have their columns in this order."""
    test_names = _input_column_names(pair)
    if not names or not test_names or test_names == names:
        return pair
    differ = sorted({*names} ^ {*test_names})
    if differ:
        raise DataError(
            f"the column {differ[0]!r} is {'not there' if differ[0] in names else 'not in the training inputs'}",
            where=where,
            fix=f"return the same columns for both: {', '.join(names[:20])}",
        )
    frame = pair[0]
    return (frame.select(list(names)) if hasattr(frame, "column_names") else frame[list(names)]), pair[1]


def _to_arrays(pair: Any, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Inputs (N, F) or (N, H, W) or (N, C, ...), and targets, of the types that the function gave them."""
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise DataError(f"is {_describe_value(pair)}, not a pair (inputs, targets)", where=where, fix=RETURNS)
    inputs, targets = (
        _to_array(value, f"{where} {name}") for value, name in zip(pair, ("inputs", "targets"), strict=True)
    )
    if len(inputs) != len(targets):
        raise DataError(
            f"{len(inputs)} rows of inputs, but {len(targets)} targets", where=where, fix="return one target a row"
        )
    if len(inputs) == 0:
        raise DataError("no rows", where=where, fix="return at least one row")
    if inputs.ndim == 4:
        inputs = _to_channels_first(inputs, _is_tensor(pair[0]))
    return (inputs[:, None] if inputs.ndim == 1 else inputs), targets


def _to_array(value: Any, where: str) -> np.ndarray:
    """A NumPy array of numbers, with an axis of rows."""
    if _is_tensor(value):
        value = value.detach().cpu()
        value = value.float() if value.is_floating_point() and value.element_size() < 4 else value
    elif not hasattr(value, "__array__"):
        raise DataError(
            f"is {_describe_value(value)}, not a NumPy array or torch tensor",
            where=where,
            fix="np.asarray(...) makes one",
        )
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        raise DataError(f"has the type {array.dtype}, not numbers", where=where, fix="encode it as numbers first")
    if array.ndim == 0 or 0 in array.shape[1:]:
        raise DataError(f"has the shape {array.shape}", where=where, fix="one row a sample, at least one value a row")
    return array


def _is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")  # a tensor of torch has imported it
    return torch is not None and isinstance(value, torch.Tensor)


def _select_float_type(arrays: Sequence[np.ndarray], float64: bool) -> FloatType:
    """What the numbers of all parts become."""
    return np.float64 if float64 and not all(np.can_cast(array.dtype, np.float32) for array in arrays) else np.float32


def _needs_float64(targets: np.ndarray) -> bool:
    """Whether float32 would lose digits of numbers to be learned that matter beside their spread."""
    if targets.dtype.kind != "f" or np.can_cast(targets.dtype, np.float32):
        return False
    wide = targets.reshape(len(targets), -1).astype(np.float64)
    if not np.isfinite(wide).all():
        return False  # refused below
    with np.errstate(over="ignore"):
        errors = max_rounding_error(wide, wide.astype(np.float32), "floats")
    std, between = wide.std(0), np.subtract(*np.percentile(wide, [75, 25], axis=0))
    spread = np.where(between > 0, np.minimum(std, between), std)  # a few rows far away are no reason to blur the rest
    return bool(is_too_coarse(errors, spread).any())


def _convert_inputs(array: np.ndarray, where: str, dtype: FloatType) -> np.ndarray:
    return np.ascontiguousarray(array if array.dtype == np.uint8 else _convert_to_float(array, where, dtype))


def _convert_targets(array: np.ndarray, where: str, dtype: FloatType) -> np.ndarray:
    array = array[:, 0] if array.ndim == 2 and array.shape[1] == 1 and array.dtype.kind != "f" else array
    if array.dtype.kind == "f":
        array = _convert_to_float(array, where, dtype)
    elif array.dtype == np.uint64 and array.max() > np.iinfo(np.int64).max:
        raise DataError(f"holds {array.max()}, beyond int64", where=where, fix="number the classes from 0")
    else:
        array = array.astype(np.int64)
    if array.ndim > 2 or (array.ndim == 2 and array.dtype.kind != "f"):
        raise DataError(
            f"has the shape {array.shape} and the type {array.dtype}",
            where=where,
            fix="labels are (N,) integers; numbers are floats, (N,) or (N, T)",
        )
    return np.ascontiguousarray(array)


def _convert_to_float(array: np.ndarray, where: str, dtype: FloatType) -> np.ndarray:
    with np.errstate(over="ignore"):
        floats: np.ndarray = array.astype(dtype, copy=False)
    finite = np.isfinite(floats)
    if not finite.all():
        position = tuple(int(axis) for axis in np.unravel_index(int(np.argmin(finite)), finite.shape))
        raise DataError(
            f"{array[position]} at row {position[0]}{f', position {position[1:]}' if len(position) > 1 else ''}, "
            f"and {(~finite).sum() - 1:,} more values that {floats.dtype} cannot hold as a number",
            where=where,
            fix="fill or drop them in the function",
        )
    return floats


def _max_rounding_errors(given: np.ndarray, stored: np.ndarray) -> np.ndarray:
    """The largest error in each column or channel, float64 (C,); images (N, H, W) have one."""
    channels = stored.shape[1] if stored.ndim != 3 else 1
    largest = np.zeros(channels)
    kind: NumberKind = "integers" if given.dtype.kind in "iu" else "floats"
    if given.dtype == stored.dtype or np.can_cast(given.dtype, np.float32):
        return largest
    rows = max(1, BLOCK_VALUES // max(1, stored[0].size))
    for first in range(0, len(stored), rows):
        wide, held = (
            np.moveaxis(values[first : first + rows].reshape(-1, channels, stored[0].size // channels), 1, -1)
            .reshape(-1, channels)
            .astype(np.float64)
            for values in (given, stored)
        )
        np.maximum(largest, max_rounding_error(wide, held, kind), out=largest)
    return largest


def _to_channels_first(images: np.ndarray, are_tensors: bool) -> np.ndarray:
    second, last = images.shape[1] <= MAX_CHANNELS, images.shape[3] <= MAX_CHANNELS
    channels_last = last if last != second else not are_tensors
    return images.transpose(0, 3, 1, 2) if channels_last else images


def _check_same_layout(train: DatasetPart, test: DatasetPart, where: str) -> None:
    for name in ("inputs", "targets"):
        ours, theirs = getattr(train, name), getattr(test, name)
        if ours.shape[1:] != theirs.shape[1:] or ours.dtype != theirs.dtype:
            raise DataError(
                f"training {name} are {ours.dtype} of shape (N, {str(ours.shape[1:])[1:]}, "
                f"but test {name} are {theirs.dtype} of shape (N, {str(theirs.shape[1:])[1:]}",
                where=where,
                fix="return both of one shape and type",
            )


def _describe_value(value: Any) -> str:
    size = f" of {len(value)}" if isinstance(value, (tuple, list, dict)) else ""
    return f"a {type(value).__name__}{size}" if value is not None else "None"
