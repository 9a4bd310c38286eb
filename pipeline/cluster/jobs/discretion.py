"""Standard output and error that write no secret: what a process on a cluster says ends in Ray's logs."""

from __future__ import annotations

import sys
from typing import Any

from pipeline.cluster.jobs.records import RECORD_SEPARATOR
from pipeline.redaction import redact
from pipeline.streams import SafeStream


def redact_stdout_and_stderr() -> None:
    """From now on, whatever a library or the user's code prints of a secret is blotted out, and a log that cannot be
    written ends nothing."""
    sys.stdout, sys.stderr = RedactingStream(SafeStream(sys.stdout)), RedactingStream(SafeStream(sys.stderr))


class RedactingStream:
    def __init__(self, stream: SafeStream) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(
            text if text.startswith(RECORD_SEPARATOR) else redact(text)
        )  # a record has none to begin with
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
