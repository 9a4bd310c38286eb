"""The specification of a worker's part of an attempt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeline.config import JobConfig
from pipeline.user_code import UserCode


@dataclass(frozen=True)
class WorkerSpec:
    """What a driver sends to its workers; picklable."""

    job: JobConfig
    storage_url: str = field(repr=False)  # it may hold a password
    run_name: str
    driver: str
    """Nonce of the driver process."""
    max_steps: int | None = None
    ended_attempt: int | None = None
    """An attempt of this driver whose workers have provably ended."""
    code: UserCode | None = None
    """The user's code that the job imports; None: collect it from the files as they are now. (Its repr is short.)"""
    code_changes: tuple[str, ...] = ()
    """Files of `code` whose changes since the run's last attempt the user allowed."""
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Credentials that the driver forwards, see `pipeline.storage.credentials`. (Not in the repr, which Ray logs.)"""
