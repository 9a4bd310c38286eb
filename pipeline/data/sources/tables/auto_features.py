"""`data.features: auto` before a table is decoded: the columns that no rule on their values alone leaves out.

Columns that can be judged only with the splits and the label are left out after decoding, see
`pipeline.data.auto_features`.
"""

from __future__ import annotations

import hashlib
import json
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pipeline.config import JobConfig, TableColumnsConfig
from pipeline.data.cache import get_or_build
from pipeline.data.sources.tables.columns import merge_column_kinds, select_feature_names
from pipeline.data.sources.tables.files import TableFiles
from pipeline.data.sources.tables.profile import profile_files
from pipeline.data.tabular.arrow_types import ArrowKind
from pipeline.data.tabular.profile import MAX_DISTINCT_KEYS, ColumnProfile
from pipeline.errors import DataError
from pipeline.events import ProgressFn

FORMAT = 2
"""Version of the cache entries, to be increased when the rules change."""

ENTRY_BYTES = 1 << 20
ENTRY_FILE = "left_out.json"

UNIQUE_FRACTION = 0.9
"""Text is almost unique if more than this fraction of its values differ."""


def select_auto_features(
    files: TableFiles, job: JobConfig, fingerprint: str, on_progress: ProgressFn
) -> tuple[JobConfig, dict[str, str]]:
    """Return the job with its features by name, and the columns that are left out, each with the reason.

    Text that is dates or times in ISO 8601 in all rows is added to `data.dates`.

    The result depends on the job and on the content of the files alone. Only text and lists of any length are read; for
    a table that is larger than `data.cache.in_memory_mb`, the result is kept in the cache.

    Raises
    ------
    DataError: no column is left, or the columns of the files differ.
    """
    data = job.data
    assert isinstance(data, TableColumnsConfig), "a job of tables"
    if data.features != "auto":
        return job, {}
    kinds, errors = merge_column_kinds(files)
    names = select_feature_names(data, [*kinds, *errors])
    if data.shape is not None:
        return with_features(job, names), {}
    left_out = {name: reason for name in names if name in kinds and (reason := _unusable_kind(kinds[name]))}
    left_out |= dict.fromkeys(errors.keys() & set(names), "not all files have it, with the same type")
    is_known = {name: _is_listed(name, [*data.dates, *data.hashed]) for name in names}
    read = {
        name: kinds[name] for name in names if name in kinds and not is_known[name] and _depends_on_values(kinds[name])
    }
    judged: dict[str, Any] = {"left_out": {}, "dates": []}
    if read and files.num_bytes <= data.cache.in_memory_mb * 10**6:
        judged = _judge_values(files, read, on_progress)
    elif read:

        def build(folder: Path) -> None:
            (folder / ENTRY_FILE).write_text(json.dumps(_judge_values(files, read, on_progress)))
            files.verify()

        key = hashlib.sha256(f"features: auto {FORMAT} {fingerprint} {sorted(read)}".encode()).hexdigest()
        entry = get_or_build(data.cache, key, build, size_bytes=ENTRY_BYTES)
        judged = json.loads((entry.folder / ENTRY_FILE).read_text())
    left_out |= judged["left_out"]
    kept = [name for name in names if name not in left_out]
    if not kept:
        listed = "; ".join(f"{name!r}: {reason}" for name, reason in list(left_out.items())[:5])
        raise DataError(
            f"features: auto leaves out every column ({listed})",
            where="data.features",
            fix='add columns of numbers or categories; features: ["*"] keeps all that can be used',
        )
    resolved = with_features(job, kept)
    if judged["dates"]:
        update = {"dates": [*data.dates, *judged["dates"]]}
        resolved = resolved.model_copy(update={"data": resolved.data.model_copy(update=update)})
    return resolved, {name: left_out[name] for name in names if name in left_out}


def with_features(job: JobConfig, names: list[str]) -> JobConfig:
    """Return the job with features by name."""
    return job.model_copy(update={"data": job.data.model_copy(update={"features": names, "exclude": []})})


def _is_listed(name: str, patterns: list[str]) -> bool:
    return any(name == pattern or fnmatchcase(name, pattern) for pattern in patterns)


def _unusable_kind(kind: ArrowKind) -> str:
    """Return why no column of a kind can be a feature; empty if one can."""
    if kind.kind == "null":
        return "it has no value in any row"
    return f"it holds {kind}" if kind.kind == "other" else ""


def _depends_on_values(kind: ArrowKind) -> bool:
    return kind.kind == "text" or (kind.kind == "vector" and kind.width == 0)


def _judge_values(files: TableFiles, kinds: dict[str, ArrowKind], on_progress: ProgressFn) -> dict[str, Any]:
    """Return the columns that are left out with the reason, and those of text that is dates, by name."""
    profiles = profile_files(files, kinds, on_progress).values()
    return {
        "left_out": {profile.name: reason for profile in profiles if (reason := judge_values(profile))},
        "dates": [profile.name for profile in profiles if profile.is_time_text],
    }


def judge_values(profile: ColumnProfile) -> str:
    """Return why a column of text or of lists is left out; empty if it is not."""
    if profile.num_nulls == profile.num_rows:
        return "it has no value in any row"
    if profile.length is not None and profile.length[0] != profile.length[1]:
        return f"its lists have {profile.length[0]:,} to {profile.length[1]:,} elements, not all the same number"
    if profile.kind.kind != "text" or profile.is_time_text or profile.num_values < 2:
        return ""
    if profile.has_more_distinct:
        return f"it is text with more than {MAX_DISTINCT_KEYS:,} different values"
    if profile.num_distinct > UNIQUE_FRACTION * profile.num_values:
        return f"it is almost unique text ({profile.num_distinct:,} different values in {profile.num_values:,} rows)"
    return ""
