"""What a submission is called on a cluster, so that the same one again is known for the same.

The variables that are handed to a job: `--env KEY` and `--env-file FILE`.

The letter that comes with a job: the resolved job and the environment, for the entry point's eyes alone.

Ray shows a job's `env_vars` in the job's information and writes them into two logs; a file would stay on every node.
So a letter goes into the memory of the cluster's head, where Ray keeps the packages that it is sent, under a name that
nobody can guess; the entry point takes it out.
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

from dotenv.parser import parse_stream  # what `dotenv_values` reads with; it alone has the numbers of the lines

from pipeline.cluster.ray_internals import fetch_package, is_package_name
from pipeline.config import FileDataConfig, JobConfig, compute_identity, digest_tree
from pipeline.errors import InputError, WorkError


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


ENV_NAME_PATTERN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def collect_env_vars(names: Iterable[str], files: Iterable[str]) -> dict[str, str]:
    """Values by name; a name that is given alone wins over one in a file.

    Parameters
    ----------
    names: variables of this process' environment.
    files: with a KEY=VALUE on each line, as python-dotenv reads them: `export` before a name, quotes around a value (in
        double quotes with escapes such as \\n), comments from `#` on, at the end of a value without quotes too. `$NAME`
        and `${NAME}` are not replaced: a value is sent as it was written.

    Raises
    ------
    InputError: no such variable or file, or a line of another form. No value is ever quoted.
    """
    env_vars: dict[str, str] = {}
    for file in files:
        env_vars |= _read_env_file(file)
    for name in names:
        if "=" in name:
            raise InputError(
                f"--env takes a name, and its value from your environment, not {name.partition('=')[0]}=...",
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
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise InputError(f"cannot be read: {reason}", where=f"--env-file {file}", fix="name a file") from None
    env_vars = {}
    for binding in parse_stream(StringIO(text)):
        if binding.key is None and not binding.error:  # a comment, or blank lines at the end
            continue
        if binding.value is None or not ENV_NAME_PATTERN.fullmatch(binding.key or ""):
            statement = binding.original.string
            blank = statement[: len(statement) - len(statement.lstrip())]
            number = binding.original.line + blank.count("\n")
            raise InputError("a line that is no KEY=VALUE", where=f"--env-file {file}, line {number}", fix="repair it")
        env_vars[binding.key or ""] = binding.value
    return env_vars


PAYLOAD_FORMAT = 1


@dataclass(frozen=True)
class SubmissionPayload:
    """What `train` is called with on the cluster.

    Everything is plain: `job` is the resolved job file's text; `environment` holds variables to set first.
    """

    job: str = ""
    storage: str = ""
    name: str | None = None
    max_steps: int | None = None
    verbose: bool = False
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    allow_code_change: bool = False
    probe: Mapping[str, Any] | None = None
    """For the probe: what it is asked, see `probe`."""

    def to_bytes(self) -> bytes:
        """The bytes to send. (Ray's server quotes the first fifteen where it cannot keep them.)"""
        return json.dumps({"trainyard letter": PAYLOAD_FORMAT, **asdict(self)}).encode()


def fetch_payload(name: str) -> SubmissionPayload:
    """On the cluster: read a letter and destroy it.

    Raises
    ------
    WorkError: it is not there (any more).
    """
    if not is_package_name(name):
        raise WorkError(f"{name!r} is no letter", where="the entry point", fix="`trainyard submit` writes them")
    content = fetch_package(name)
    if content is None:
        raise WorkError("what was sent with the job is not there any more", where=name, fix="submit it again")
    tree = json.loads(content)
    if tree.pop("trainyard letter", None) != PAYLOAD_FORMAT:
        raise WorkError("the job was sent by another version of Trainyard", where=name, fix="submit it again")
    return SubmissionPayload(**tree)
