"""What a submission is called on a cluster, so that the same one again is known for the same."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from pipeline.job import FileDataConfig, JobConfig, compute_identity, digest_tree


def submission_key(
    job: JobConfig, *, storage: str, name: str | None, max_steps: int | None, code: Mapping[str, str]
) -> str:
    """`<job name>-<8 digits>` of what determines the run, as far as it is known without the data itself."""
    tree = compute_identity(job, fingerprint="", max_steps=max_steps, code_digests=code)
    tree |= {"storage": storage, "name": name, "url": job.data.url if isinstance(job.data, FileDataConfig) else None}
    return f"{job.name}-{digest_tree(tree)[:8]}"


def find_numbered_ids(key: str, ids: Iterable[str]) -> dict[int, str]:
    """Those of some job ids that are submissions of this key, by their number from 1."""
    pattern = re.compile(rf"{re.escape(key)}-([1-9]\d*)")
    return {int(match[1]): job_id for job_id in ids if (match := pattern.fullmatch(job_id))}
