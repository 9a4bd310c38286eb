"""What is sent with a job: the resolved job, its options and environment variables, as a `SubmissionPayload`.

Ray shows a job's `env_vars` in the job's information and writes them to two logs, and a file would stay on every node.
So the payload is stored in the memory of the cluster's head, where Ray keeps uploaded packages, under a name that
cannot be guessed. The entry point reads and deletes it.

The module also makes the key of a submission, by which the same one is recognized, and reads `--env` and `--env-file`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

from dotenv.parser import parse_stream  # the parser of `dotenv_values`, with line numbers

from pipeline.cluster.ray_internals import fetch_package, is_package_name
from pipeline.config import FileDataConfig, JobConfig, compute_identity, digest_tree
from pipeline.errors import InputError, WorkError

PAYLOAD_FORMAT = 1
ENV_NAME_PATTERN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class SubmissionPayload:
    """The arguments of `train` on the cluster, as plain values."""

    job: str = ""
    """The text of the resolved job file."""
    storage: str = ""
    name: str | None = None
    max_steps: int | None = None
    verbose: bool = False
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Variables to set first."""
    allow_code_change: bool = False
    probe: Mapping[str, Any] | None = None
    """The questions of a probe, see `pipeline.cluster.submission.probe`."""

    def to_bytes(self) -> bytes:
        """Serialize the payload. (Ray's server quotes the first fifteen bytes if it cannot store them.)"""
        return json.dumps({"trainyard letter": PAYLOAD_FORMAT, **asdict(self)}).encode()


def fetch_payload(name: str) -> SubmissionPayload:
    """On the cluster: read a payload and delete it.

    Raises
    ------
    WorkError: there is no such payload (any more), or another version of Trainyard sent it.
    """
    if not is_package_name(name):
        raise WorkError(
            f"{name!r} is not the name of a payload", where="the entry point", fix="`trainyard submit` makes them"
        )
    content = fetch_package(name)
    if content is None:
        raise WorkError("the payload of the job is not on the cluster any more", where=name, fix="submit the job again")
    tree = json.loads(content)
    if tree.pop("trainyard letter", None) != PAYLOAD_FORMAT:
        raise WorkError("another version of Trainyard sent the job", where=name, fix="submit the job again")
    return SubmissionPayload(**tree)


def submission_key(
    job: JobConfig, *, storage: str, name: str | None, max_steps: int | None, code: Mapping[str, str]
) -> str:
    """Return `<job name>-<8 hex digits>`, a digest of what determines the run except for the content of the data."""
    tree = compute_identity(job, fingerprint="", max_steps=max_steps, code_digests=code)
    tree |= {"storage": storage, "name": name, "url": job.data.url if isinstance(job.data, FileDataConfig) else None}
    return f"{job.name}-{digest_tree(tree)[:8]}"


def find_numbered_ids(key: str, ids: Iterable[str]) -> dict[int, str]:
    """Return the ids among `ids` that are submissions of this key, by their number from 1."""
    pattern = re.compile(rf"{re.escape(key)}-([1-9]\d*)")
    return {int(match[1]): job_id for job_id in ids if (match := pattern.fullmatch(job_id))}


def collect_env_vars(names: Iterable[str], files: Iterable[str]) -> dict[str, str]:
    """Return the environment variables for a job, by name. A name in `names` overrides one in a file.

    Parameters
    ----------
    names: variables of this process' environment.
    files: paths of files with a KEY=VALUE on each line, in the format of python-dotenv: `export` before a name, quotes
        around a value (in double quotes with escapes such as \\n), comments from `#` on, also after a value without
        quotes. `$NAME` and `${NAME}` are not replaced: a value is sent as written.

    Raises
    ------
    InputError: no such variable or file, or an invalid line. The message contains no values.
    """
    env_vars: dict[str, str] = {}
    for file in files:
        env_vars |= _read_env_file(file)
    for name in names:
        if "=" in name:
            raise InputError(
                f"--env takes a name only, and the value from your environment, not {name.partition('=')[0]}=...",
                where="--env",
                fix=f"export {name.partition('=')[0]}=..., then --env {name.partition('=')[0]}; or use --env-file",
            )
        if name not in os.environ:
            raise InputError(f"the environment has no {name}", where=f"--env {name}", fix=f"export {name}=... first")
        env_vars[name] = os.environ[name]
    return env_vars


def _read_env_file(file: str) -> dict[str, str]:
    try:
        text = Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not a text file"
        raise InputError(
            f"cannot be read: {reason}", where=f"--env-file {file}", fix="give the path of a file"
        ) from None
    env_vars = {}
    for binding in parse_stream(StringIO(text)):
        if binding.key is None and not binding.error:  # a comment, or blank lines at the end
            continue
        if binding.value is None or not ENV_NAME_PATTERN.fullmatch(binding.key or ""):
            statement = binding.original.string
            blank = statement[: len(statement) - len(statement.lstrip())]
            number = binding.original.line + blank.count("\n")
            raise InputError(
                "not of the form KEY=VALUE", where=f"--env-file {file}, line {number}", fix="correct the line"
            )
        env_vars[binding.key or ""] = binding.value
    return env_vars
