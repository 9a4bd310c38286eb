"""The letter that comes with a job: the resolved job and the environment, for the entry point's eyes alone.

Ray shows a job's `env_vars` in the job's information and writes them into two logs; a file would stay on every node.
So a letter goes into the memory of the cluster's head, where Ray keeps the packages that it is sent, under a name that
nobody can guess; the entry point takes it out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.cluster.ray_internals import fetch_package, is_package_name
from pipeline.errors import WorkError

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
