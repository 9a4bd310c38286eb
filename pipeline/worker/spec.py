"""What a driver asks of its workers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeline.config import JobConfig
from pipeline.user_code import UserCode


@dataclass(frozen=True)
class WorkerSpec:
    """What a driver asks of its workers; picklable."""

    job: JobConfig
    storage_url: str = field(repr=False)  # it may hold a password
    run_name: str
    driver: str
    """Nonce of the driving process."""
    max_steps: int | None = None
    ended_attempt: int | None = None
    """An attempt of this driver's whose workers are known to have ended."""
    code: UserCode | None = None
    """The user's own code that the job imports; None: what is there now. (Its repr is short.)"""
    code_changes: tuple[str, ...] = ()
    """Files of it that changed since the run's last attempt, which the user allowed."""
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    """What the driver was handed, see `pipeline.storage.credentials`. (Ray writes an order's repr down.)"""
