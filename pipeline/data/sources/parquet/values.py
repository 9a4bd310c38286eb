"""Labels and what splits go by, as arrays: every row must have a value."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.tables.contents import arrow_kind, dictionary_encode, to_float_array, unwrap_storage
from pipeline.data.tables.findings import InvalidValues
from pipeline.errors import DataError


def read_label_values(
    array: pa.Array, name: str, categories: pa.Array | None, as_numbers: bool, findings: InvalidValues
) -> np.ndarray:
    """Labels of a batch: int64 (n,), positions in `levels` where they are text; or float64 (n,) where `as_numbers`."""
    found = arrow_kind(array.type)
    if categories is not None:
        return _category_codes(array, name, categories, findings)
    if not as_numbers and found.kind != "real":
        return _to_int64(array, name, findings)
    values = to_float_array(array, np.float64)
    _note_nulls(np.isnan(values), name, findings)
    findings.add(name, "infinite values", "remove these rows", np.isinf(values))
    if as_numbers:
        return values
    broken = ~np.isfinite(values) | (values != np.floor(values)) | (np.abs(values) >= 2.0**63)
    fix = "use whole numbers or text, or task: regression"
    findings.add(name, "labels that are not whole", fix, broken & np.isfinite(values))
    return np.where(broken, 0, values).astype(np.int64)


def read_split_values(
    array: pa.Array, name: str, categories: pa.Array | None, as_numbers: bool, findings: InvalidValues
) -> np.ndarray:
    """What a batch is split by: int64 (n,), positions in `levels` where it is text, nanoseconds where it is time; or
    float64 (n,) where `as_numbers`."""
    if categories is not None:
        return _category_codes(array, name, categories, findings)
    if arrow_kind(array.type).kind == "time":
        return _to_nanoseconds(array, name, findings)
    if not as_numbers:
        return _to_int64(array, name, findings)
    values = to_float_array(array, np.float64)
    _note_nulls(np.isnan(values), name, findings)
    return values


def _category_codes(array: pa.Array, name: str, categories: pa.Array, findings: InvalidValues) -> np.ndarray:
    texts, rows = dictionary_encode(array, name, findings)
    _note_nulls(rows < 0, name, findings)
    known = pc.index_in(texts, value_set=categories).fill_null(0).to_numpy(zero_copy_only=False)
    positions: np.ndarray = np.append(known, 0).astype(np.int64)[rows]
    return positions


def _to_int64(array: pa.Array, name: str, findings: InvalidValues) -> np.ndarray:
    """Whole numbers or booleans as int64 (n,)."""
    _note_nulls(array.is_null().to_numpy(zero_copy_only=False), name, findings)
    array = unwrap_storage(array)
    if array.type == pa.uint64():
        beyond = pc.greater(array, pa.scalar(2**63 - 1, pa.uint64())).fill_null(False)
        findings.add(name, "numbers beyond int64", "use text", beyond.to_numpy(zero_copy_only=False))
    if pa.types.is_null(array.type):
        return np.zeros(len(array), np.int64)
    whole: np.ndarray = array.cast(pa.int64(), safe=False).fill_null(0).to_numpy(zero_copy_only=False)
    return whole


def _to_nanoseconds(array: pa.Array, name: str, findings: InvalidValues) -> np.ndarray:
    """Nanoseconds since 1970, int64 (n,); times without a zone are taken as UTC."""
    _note_nulls(array.is_null().to_numpy(zero_copy_only=False), name, findings)
    try:
        stamps = unwrap_storage(array).cast(pa.timestamp("ns", tz=getattr(array.type, "tz", None)))
    except pa.ArrowInvalid as error:
        raise DataError(
            f"the column {name!r} has times before 1677 or after 2262",
            where=findings.where,
            fix="nanoseconds do not reach so far: remove these rows, or use a number",
        ) from error
    times: np.ndarray = stamps.cast(pa.int64()).fill_null(0).to_numpy(zero_copy_only=False)
    return times


def parse_times(texts: tuple[str, ...], name: str, url: str) -> np.ndarray:
    """ISO 8601 dates and times as nanoseconds since 1970, int64 (n,)."""
    array = pa.array(texts, pa.string())
    for zone in (None, "UTC"):
        try:
            times: np.ndarray = array.cast(pa.timestamp("ns", tz=zone)).cast(pa.int64()).to_numpy()
            return times
        except pa.ArrowInvalid as error:
            failure = error
    raise DataError(
        f"the column {name!r} is text that is no time ({str(failure).splitlines()[0]})",
        where=url,
        fix="write times as 2024-05-31 or 2024-05-31T12:00:00Z, or as timestamps",
    )


def _note_nulls(nulls: np.ndarray, name: str, findings: InvalidValues) -> None:
    findings.add(name, "nulls (or NaN)", "remove these rows, or fill them in", nulls)
