"""Labels and what splits go by, as arrays: every row must have a value."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.tables.contents import as_texts, content, numbers, plain
from pipeline.data.tables.findings import Findings
from pipeline.errors import DataError


def label_values(
    array: pa.Array, name: str, levels: pa.Array | None, as_numbers: bool, findings: Findings
) -> np.ndarray:
    """Labels of a batch: int64 (n,), positions in `levels` where they are text; or float64 (n,) where `as_numbers`."""
    found = content(array.type)
    if levels is not None:
        return _positions(array, name, levels, findings)
    if not as_numbers and found.kind != "real":
        return _whole(array, name, findings)
    values = numbers(array, np.float64)
    _refuse_nulls(np.isnan(values), name, findings)
    findings.note(name, "infinite values", "remove these rows", np.isinf(values))
    if as_numbers:
        return values
    broken = ~np.isfinite(values) | (values != np.floor(values)) | (np.abs(values) >= 2.0**63)
    fix = "use whole numbers or text, or task: regression"
    findings.note(name, "labels that are not whole", fix, broken & np.isfinite(values))
    return np.where(broken, 0, values).astype(np.int64)


def split_values(
    array: pa.Array, name: str, levels: pa.Array | None, as_numbers: bool, findings: Findings
) -> np.ndarray:
    """What a batch is split by: int64 (n,), positions in `levels` where it is text, nanoseconds where it is time; or
    float64 (n,) where `as_numbers`."""
    if levels is not None:
        return _positions(array, name, levels, findings)
    if content(array.type).kind == "time":
        return _times(array, name, findings)
    if not as_numbers:
        return _whole(array, name, findings)
    values = numbers(array, np.float64)
    _refuse_nulls(np.isnan(values), name, findings)
    return values


def _positions(array: pa.Array, name: str, levels: pa.Array, findings: Findings) -> np.ndarray:
    texts, rows = as_texts(array, name, findings)
    _refuse_nulls(rows < 0, name, findings)
    known = pc.index_in(texts, value_set=levels).fill_null(0).to_numpy(zero_copy_only=False)
    positions: np.ndarray = np.append(known, 0).astype(np.int64)[rows]
    return positions


def _whole(array: pa.Array, name: str, findings: Findings) -> np.ndarray:
    """Whole numbers or booleans as int64 (n,)."""
    _refuse_nulls(array.is_null().to_numpy(zero_copy_only=False), name, findings)
    array = plain(array)
    if array.type == pa.uint64():
        beyond = pc.greater(array, pa.scalar(2**63 - 1, pa.uint64())).fill_null(False)
        findings.note(name, "numbers beyond int64", "use text", beyond.to_numpy(zero_copy_only=False))
    if pa.types.is_null(array.type):
        return np.zeros(len(array), np.int64)
    whole: np.ndarray = array.cast(pa.int64(), safe=False).fill_null(0).to_numpy(zero_copy_only=False)
    return whole


def _times(array: pa.Array, name: str, findings: Findings) -> np.ndarray:
    """Nanoseconds since 1970, int64 (n,); times without a zone are taken as UTC."""
    _refuse_nulls(array.is_null().to_numpy(zero_copy_only=False), name, findings)
    try:
        stamps = plain(array).cast(pa.timestamp("ns", tz=getattr(array.type, "tz", None)))
    except pa.ArrowInvalid as error:
        raise DataError(
            f"the column {name!r} has times before 1677 or after 2262",
            where=findings.where,
            fix="nanoseconds do not reach so far: remove these rows, or use a number",
        ) from error
    times: np.ndarray = stamps.cast(pa.int64()).fill_null(0).to_numpy(zero_copy_only=False)
    return times


def as_times(texts: tuple[str, ...], name: str, url: str) -> np.ndarray:
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


def _refuse_nulls(nulls: np.ndarray, name: str, findings: Findings) -> None:
    findings.note(name, "nulls (or NaN)", "remove these rows, or fill them in", nulls)
