"""Reads of the test split: each is on record before it happens, so that nobody chooses on it unseen."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from pipeline.record.run import Run
from pipeline.record.values import to_json, utc_now

TEST_READS_FOLDER = "reads"


def log_test_access(run: Run, metadata: Mapping[str, Any]) -> int:
    """Create the next entry of the run's reads, and return its number.

    facts: plain values: which checkpoint, who, where.
    """
    text = to_json({"time": utc_now(), "nonce": secrets.token_hex(16), **metadata}, indent=1) + "\n"
    number = 1 + len(run.storage.list(TEST_READS_FOLDER))
    while not run.storage.create(f"{TEST_READS_FOLDER}/{number:08d}.json", text.encode()):
        number += 1
    return number
