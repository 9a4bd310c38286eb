"""Environment variables that were handed to this process: what storage and trackers need, and nobody may read.

They travel inside messages between our own processes, never in a command line, a file, or what Ray shows of a job.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from pipeline.redaction import register_secrets

_forwarded_names: set[str] = set()


def set_credentials(environment: Mapping[str, str]) -> None:
    """Set these variables here, and keep their values out of everything that is written."""
    os.environ.update(environment)
    _forwarded_names.update(environment)
    register_secrets(environment)


def forwarded_credentials() -> dict[str, str]:
    """What this process was handed and hands on to its workers."""
    return {name: os.environ[name] for name in sorted(_forwarded_names) if name in os.environ}
