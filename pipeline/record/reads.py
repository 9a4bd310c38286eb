"""Reads of the test split: each is on record before it happens, so that nobody chooses on it unseen."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from pipeline.record.run import Run
from pipeline.record.values import now, to_json

FOLDER = "reads"


def record_read(run: Run, facts: Mapping[str, Any]) -> int:
    """Create the next entry of the run's reads, and return its number.

    facts: plain values: which checkpoint, who, where.
    """
    text = to_json({"time": now(), "nonce": secrets.token_hex(16), **facts}, indent=1) + "\n"
    number = 1 + len(run.storage.list(FOLDER))
    while not run.storage.create(f"{FOLDER}/{number:08d}.json", text.encode()):
        number += 1
    return number
