"""Lines of a job's log that are meant for programs: what the entry point and the probe say to the client.

A record is JSON behind the separator that RFC 7464 has for it, on a line of its own.

Standard output and error that write no secret: what a process on a cluster says ends in Ray's logs.
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
    """One line for `print`, without secrets: one that is a word of JSON, such as true, is blotted out in texts only."""
    return RECORD_SEPARATOR + json.dumps({"kind": kind, **redact_tree(values)})


def iter_records(log: str) -> Iterator[dict[str, Any]]:
    """The records in a log, in order. A line that only looks like one is left out."""
    for line in log.split("\n"):
        record = parse_record(line)
        if record is not None:
            yield record


def parse_record(line: str) -> dict[str, Any] | None:
    """The record that a line is, or None."""
    if not line.startswith(RECORD_SEPARATOR):
        return None
    try:
        tree = json.loads(line[1:])
    except json.JSONDecodeError:
        return None
    return tree if isinstance(tree, dict) and isinstance(tree.get("kind"), str) else None


def find_last_record(log: str, kind: str) -> dict[str, Any] | None:
    """The last record of a kind."""
    matching = [record for record in iter_records(log) if record["kind"] == kind]
    return matching[-1] if matching else None


def human_lines(log: str) -> Iterator[str]:
    """The log without records, and without what Ray writes before the entry point begins.

    (`splitlines` would take the separator for the end of a line.)
    """
    log = strip_ray_actor_death(log)
    for line in log.removesuffix("\n").split("\n") if log else ():
        if not line.startswith(RECORD_SEPARATOR) and not _is_ray_line(line):
            yield line


def strip_ray_actor_death(log: str) -> str:
    """The log up to what Ray adds where it loses the process that started the job: a paragraph on dead actors."""
    match = _RAY_ACTOR_DEATH.search(log)
    return log[: match.start()] if match else log


def _is_ray_line(line: str) -> bool:
    return line.startswith("Running entrypoint for job ") or " job_manager.py:" in line[:60]


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
