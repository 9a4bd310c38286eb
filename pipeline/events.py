"""Events that a run emits: small immutable values for terminals, Prometheus metrics and callers' handlers.

They are cheap to create, and pickled unchanged on their way from a Ray worker to the driver.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class PhaseStarted:
    """A long phase before or after training, such as "decoding 1,200 of 50,000 images"."""

    text: str


@dataclass(frozen=True)
class Message:
    """A line for the user."""

    text: str


@dataclass(frozen=True)
class WarningMessage:
    """A line for the user that `--quiet` does not silence."""

    text: str


@dataclass(frozen=True)
class HangReported:
    """A process made no progress for too long and is about to be ended."""

    text: str


@dataclass(frozen=True)
class RunOpened:
    """The run directory exists: it was created, or an existing run is resumed."""

    run: str
    url: str
    is_new: bool


@dataclass(frozen=True)
class TrainingStarted:
    """An attempt starts to train after `step`."""

    step: int
    last_step: int
    num_evaluations: int
    """Of the whole run."""
    workers: str
    """Such as "cpu" or "2 workers, cuda"."""
    attempt: int = 1


@dataclass(frozen=True)
class StepReached:
    """Progress of a rank other than 0. Its other values are the same as on rank 0."""

    step: int


@dataclass(frozen=True)
class StepsLogged:
    """A block of consecutive steps was logged. Values are those of its last step, except `samples` and
    `samples_per_s`."""

    step: int
    epoch: int
    loss: float
    lr: float
    samples: int
    """Of the whole block, over all ranks."""
    samples_per_s: float
    skipped_updates: int | None = None
    """Since the start of the run, with fp16; else None."""


@dataclass(frozen=True)
class EvaluationLogged:
    """All splits were evaluated after `step`."""

    step: int
    epoch: int
    ends_epoch: bool
    number: int
    """Of this evaluation, counted from 0 over the whole run."""
    phase: int
    """Of the learning rate schedule."""
    metrics: Mapping[str, float]
    """By `split/metric`; finite values only."""
    best_metric: str
    is_best: bool
    no_gain: bool
    """The best so far is no better than the model before training."""


@dataclass(frozen=True)
class EarlyStopped:
    """Training ended before `last_step`: `best.patience` is exhausted."""

    step: int
    last_step: int
    evaluations_since_best: int
    metric: str


@dataclass(frozen=True)
class CheckpointCommitted:
    """A checkpoint is durable."""

    step: int
    write_s: float
    """Seconds to write it, with journal and metric log."""


Event = (
    PhaseStarted
    | Message
    | WarningMessage
    | HangReported
    | RunOpened
    | TrainingStarted
    | StepReached
    | StepsLogged
    | EvaluationLogged
    | EarlyStopped
    | CheckpointCommitted
)

ProgressFn = Callable[[str], None]
"""Receives short progress messages, such as "decoding 1,200 of 50,000 images"."""

EventHandler = Callable[[Event], None]
"""A function of one event. It may be called from threads other than the training thread."""


def ignore_event(event: Event) -> None:
    """Do nothing with an event."""
