"""The log of a process on a cluster: records for the client among the lines for users, and no secrets.

The entry point and the probe write records: JSON after the record separator of RFC 7464, on a line of its own. Ray
stores standard output and error in its logs, so secrets are redacted in them.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.redaction import redact, redact_tree
from pipeline.streams import SafeStream

RECORD_SEPARATOR = "\x1e"
_RAY_ACTOR_DEATH = re.compile(
    r"(?:Job supervisor actor (?:died|could not be scheduled)|Unexpected error occurred): The actor"
)


def format_record(kind: str, values: Mapping[str, Any]) -> str:
    """Return the line of a record, with secrets redacted. A secret that is a JSON literal, such as true, is redacted in
    strings only."""
    return RECORD_SEPARATOR + json.dumps({"kind": kind, **redact_tree(values)})


def iter_records(log: str) -> Iterator[dict[str, Any]]:
    """Iterate over the records in a log, in order. Invalid ones are left out."""
    for line in log.split("\n"):
        record = parse_record(line)
        if record is not None:
            yield record


def parse_record(line: str) -> dict[str, Any] | None:
    """Return the record on a line, or None."""
    if not line.startswith(RECORD_SEPARATOR):
        return None
    try:
        tree = json.loads(line[1:])
    except json.JSONDecodeError:
        return None
    return tree if isinstance(tree, dict) and isinstance(tree.get("kind"), str) else None


def find_last_record(log: str, kind: str) -> dict[str, Any] | None:
    """Return the last record of a kind, or None."""
    matching = [record for record in iter_records(log) if record["kind"] == kind]
    return matching[-1] if matching else None


def human_lines(log: str) -> Iterator[str]:
    """Iterate over the lines of a log without records, and without Ray's own lines before the entry point's.

    (`splitlines` would split a line at the record separator.)
    """
    log = strip_ray_actor_death(log)
    for line in log.removesuffix("\n").split("\n") if log else ():
        if not line.startswith(RECORD_SEPARATOR) and not _is_ray_line(line):
            yield line


def strip_ray_actor_death(log: str) -> str:
    """Return the log without the paragraph that Ray appends if it loses the process that started the job."""
    match = _RAY_ACTOR_DEATH.search(log)
    return log[: match.start()] if match else log


def _is_ray_line(line: str) -> bool:
    return line.startswith("Running entrypoint for job ") or " job_manager.py:" in line[:60]


def redact_stdout_and_stderr() -> None:
    """Redact secrets in whatever this process prints from now on. An error in writing the log does not end the
    process."""
    sys.stdout, sys.stderr = RedactingStream(SafeStream(sys.stdout)), RedactingStream(SafeStream(sys.stderr))


class RedactingStream:
    """A stream that redacts secrets in what is written to it."""

    def __init__(self, stream: SafeStream) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        is_record = text.startswith(RECORD_SEPARATOR)  # format_record has redacted it
        self._stream.write(text if is_record else redact(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
