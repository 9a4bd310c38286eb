"""A user function as a data source: call it, and validate and convert what it returns."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.config import JobConfig, UserFunctionDataConfig, UserTableDataConfig
from pipeline.data.dataset import Dataset, DatasetPart, make_dataset
from pipeline.data.rounding import NumberKind, is_too_coarse, max_rounding_error
from pipeline.data.statistics import BLOCK_VALUES
from pipeline.errors import DataError
from pipeline.user_code import call_user_function
from pipeline.watchdog import watchdog_suspended

if TYPE_CHECKING:
    from pipeline.data.tabular.arrow_types import FloatType  # it imports Arrow

RETURNS = (
    "return (inputs, targets), ((inputs, targets), (test_inputs, test_targets)), or a dict with train, test, classes"
)
MAX_CHANNELS = 4


def open_user_function(job: JobConfig, on_progress: Callable[[str], None], *, float64: bool) -> Dataset:
    """Import and call the function, and convert what it returns to a `Dataset`.

    It returns NumPy arrays or torch tensors, as `(inputs, targets)`, as two such pairs (training and test), or as
    `{"train": pair, "test": pair, "classes": names}` with the last two optional. The working directory is importable.

    Inputs: uint8 stays uint8. Any other type becomes float32, or float64 if `float64` is set and float32 cannot
    represent all values of the type. Targets that are floats stay float64 if float32 would lose relevant digits. Inputs
    (N,) become (N, 1). Images of four axes have their channels last in NumPy arrays and second in tensors, as is usual
    for each, unless only one of the two axes is small enough (at most 4) to be the channels.

    Inputs may be a data frame of numbers (pandas, polars, Arrow). The names of its columns become
    `Dataset.column_names`, and the columns of a test frame are put in the order of the training frame.

    With `data.label`, it returns a table, see `user_table.open_returned_tables`.

    The function may take any time: `scale.hang_s` does not apply, because its progress cannot be observed.

    Raises
    ------
    DataError: with the name of the function and what to change in it.
    """
    assert isinstance(job.data, UserFunctionDataConfig), "a job with source: {call: module:function}"
    config = job.data.source
    where = f"data.source.call: {config.call}"
    on_progress(f"calling {config.call}")
    with watchdog_suspended():
        returned = call_user_function(config.call, config.args, where=where, error=DataError)
    if isinstance(job.data, UserTableDataConfig):
        from pipeline.data.sources.user_table import open_returned_tables  # it imports Arrow

        return open_returned_tables(returned, job, where, on_progress, float64=float64)
    return _to_dataset(returned, where, float64)


def _to_dataset(returned: Any, where: str, float64: bool) -> Dataset:
    """Convert what the function returned to a dataset, whose `reopen_in_float64` keeps a reference to it."""
    train, test, classes = _unpack_parts(returned, where)
    names = _input_column_names(train)
    test = _reorder_columns(test, names, f"{where}, test inputs")
    pairs = {
        name: _to_arrays(pair, f"{where}, {name}")
        for name, pair in (("train", train), ("test", test))
        if pair is not None
    }
    input_type = _select_float_type([inputs for inputs, _ in pairs.values()], float64)
    target_type = _select_float_type([targets for _, targets in pairs.values()], float64)
    if any(_needs_float64(targets) for _, targets in pairs.values()):
        target_type = np.float64
    parts = {
        name: DatasetPart(
            _convert_inputs(inputs, f"{where}, {name} inputs", input_type),
            _convert_targets(targets, f"{where}, {name} targets", target_type),
        )
        for name, (inputs, targets) in pairs.items()
    }
    if len(parts) == 2:
        _check_same_layout(parts["train"], parts["test"], where)
    dataset = replace(
        make_dataset(parts["train"], parts.get("test"), classes, names),
        has_boolean_labels=pairs["train"][1].dtype == np.bool_,
    )
    errors = [_max_rounding_errors(pairs[name][0], part.inputs) for name, part in parts.items()]
    if not np.any(errors):
        return dataset
    reopen = None if float64 else lambda: _to_dataset(returned, where, float64=True)
    return replace(dataset, rounding_errors=np.max(errors, axis=0), reopen_in_float64=reopen)


def _unpack_parts(returned: Any, where: str) -> tuple[Any, Any, tuple[str, ...]]:
    """Return the training pair, the test pair or None, and the class names."""
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
    """Return the column names of a data frame; empty for other data, and for names that are not text or not unique."""
    names = getattr(data, "column_names", getattr(data, "columns", None))
    if names is None or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        return ()
    return tuple(map(str, names))


def _input_column_names(pair: Any) -> tuple[str, ...]:
    return get_column_names(pair[0]) if isinstance(pair, (tuple, list)) and len(pair) == 2 else ()


def _reorder_columns(pair: Any, names: tuple[str, ...], where: str) -> Any:
    """Return the pair with the columns of its inputs in the order of `names`, if the inputs are a data frame."""
    test_names = _input_column_names(pair)
    if not names or not test_names or test_names == names:
        return pair
    differ = sorted({*names} ^ {*test_names})
    if differ:
        raise DataError(
            f"the column {differ[0]!r} is {'missing' if differ[0] in names else 'not in the training inputs'}",
            where=where,
            fix=f"return the same columns for both: {', '.join(names[:20])}",
        )
    frame = pair[0]
    return (frame.select(list(names)) if hasattr(frame, "column_names") else frame[list(names)]), pair[1]


def _to_arrays(pair: Any, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Return inputs (N, F) or (N, H, W) or (N, C, ...), and targets, of the types that the function returned."""
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise DataError(f"is {_describe_value(pair)}, not a pair (inputs, targets)", where=where, fix=RETURNS)
    inputs, targets = (
        _to_array(value, f"{where} {name}") for value, name in zip(pair, ("inputs", "targets"), strict=True)
    )
    if len(inputs) != len(targets):
        raise DataError(
            f"{len(inputs)} rows of inputs, but {len(targets)} targets", where=where, fix="return one target per row"
        )
    if len(inputs) == 0:
        raise DataError("no rows", where=where, fix="return at least one row")
    if inputs.ndim == 4:
        inputs = _to_channels_first(inputs, _is_tensor(pair[0]))
    return (inputs[:, None] if inputs.ndim == 1 else inputs), targets


def _to_array(value: Any, where: str) -> np.ndarray:
    """Return a NumPy array of numbers whose first axis is the samples."""
    if _is_tensor(value):
        value = value.detach().cpu()
        value = value.float() if value.is_floating_point() and value.element_size() < 4 else value
    elif not hasattr(value, "__array__"):
        raise DataError(
            f"is {_describe_value(value)}, not a NumPy array or torch tensor",
            where=where,
            fix="convert it with np.asarray(...)",
        )
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        raise DataError(f"has the type {array.dtype}, not numbers", where=where, fix="encode it as numbers first")
    if array.ndim == 0 or 0 in array.shape[1:]:
        raise DataError(
            f"has the shape {array.shape}", where=where, fix="return one row per sample, with at least one value"
        )
    return array


def _is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")  # imported already if the value is a tensor
    return torch is not None and isinstance(value, torch.Tensor)


def _select_float_type(arrays: Sequence[np.ndarray], float64: bool) -> FloatType:
    """Return the type to which the numbers of all parts are converted."""
    return np.float64 if float64 and not all(np.can_cast(array.dtype, np.float32) for array in arrays) else np.float32


def _needs_float64(targets: np.ndarray) -> bool:
    """Return whether float32 would lose digits of the targets that are relevant relative to their spread."""
    if targets.dtype.kind != "f" or np.can_cast(targets.dtype, np.float32):
        return False
    wide = targets.reshape(len(targets), -1).astype(np.float64)
    if not np.isfinite(wide).all():
        return False  # `_convert_targets` raises an error for them
    with np.errstate(over="ignore"):
        errors = max_rounding_error(wide, wide.astype(np.float32), "floats")
    std, iqr = wide.std(0), np.subtract(*np.percentile(wide, [75, 25], axis=0))
    spread = np.where(iqr > 0, np.minimum(std, iqr), std)  # a few outliers must not hide the spread of the rest
    return bool(is_too_coarse(errors, spread).any())


def _convert_inputs(array: np.ndarray, where: str, dtype: FloatType) -> np.ndarray:
    return np.ascontiguousarray(array if array.dtype == np.uint8 else _convert_to_float(array, where, dtype))


def _convert_targets(array: np.ndarray, where: str, dtype: FloatType) -> np.ndarray:
    array = array[:, 0] if array.ndim == 2 and array.shape[1] == 1 and array.dtype.kind != "f" else array
    if array.dtype.kind == "f":
        array = _convert_to_float(array, where, dtype)
    elif array.dtype == np.uint64 and array.max() > np.iinfo(np.int64).max:
        raise DataError(f"has the value {array.max()}, beyond int64", where=where, fix="number the classes from 0")
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
            f"and {(~finite).sum() - 1:,} more values that are not finite in {floats.dtype}",
            where=where,
            fix="fill or drop them in the function",
        )
    return floats


def _max_rounding_errors(original: np.ndarray, converted: np.ndarray) -> np.ndarray:
    """Return the largest error in each column or channel, float64 (C,); images (N, H, W) have one channel."""
    channels = converted.shape[1] if converted.ndim != 3 else 1
    largest = np.zeros(channels)
    kind: NumberKind = "integers" if original.dtype.kind in "iu" else "floats"
    if original.dtype == converted.dtype or np.can_cast(original.dtype, np.float32):
        return largest
    block_rows = max(1, BLOCK_VALUES // max(1, converted[0].size))
    for first in range(0, len(converted), block_rows):
        wide, rounded = (
            np.moveaxis(values[first : first + block_rows].reshape(-1, channels, converted[0].size // channels), 1, -1)
            .reshape(-1, channels)
            .astype(np.float64)
            for values in (original, converted)
        )
        np.maximum(largest, max_rounding_error(wide, rounded, kind), out=largest)
    return largest


def _to_channels_first(images: np.ndarray, are_tensors: bool) -> np.ndarray:
    second, last = images.shape[1] <= MAX_CHANNELS, images.shape[3] <= MAX_CHANNELS
    channels_last = last if last != second else not are_tensors
    return images.transpose(0, 3, 1, 2) if channels_last else images


def _check_same_layout(train: DatasetPart, test: DatasetPart, where: str) -> None:
    for name in ("inputs", "targets"):
        train_array, test_array = getattr(train, name), getattr(test, name)
        if train_array.shape[1:] != test_array.shape[1:] or train_array.dtype != test_array.dtype:
            raise DataError(
                f"training {name} are {train_array.dtype} of shape (N, {str(train_array.shape[1:])[1:]}, "
                f"but test {name} are {test_array.dtype} of shape (N, {str(test_array.shape[1:])[1:]}",
                where=where,
                fix="return both with the same shape and type",
            )


def _describe_value(value: Any) -> str:
    size = f" of {len(value)}" if isinstance(value, (tuple, list, dict)) else ""
    return f"a {type(value).__name__}{size}" if value is not None else "None"
