"""Secret environment variables that storage and trackers need and that this process received from another one.

They are sent in messages between Trainyard's processes, never in a command line, in a file or in what Ray shows of a
job.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from pipeline.redaction import register_secrets

_forwarded_names: set[str] = set()


def set_credentials(environment: Mapping[str, str]) -> None:
    """Set these environment variables, and redact their values in all output."""
    os.environ.update(environment)
    _forwarded_names.update(environment)
    register_secrets(environment)


def forwarded_credentials() -> dict[str, str]:
    """Return the variables that this process received, for it to forward to its workers."""
    return {name: os.environ[name] for name in sorted(_forwarded_names) if name in os.environ}
