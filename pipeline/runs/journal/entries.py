"""The entries of a journal (claims, commits and exits) as plain values, and the state that they add up to."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from typing import Any, ClassVar, Literal, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from pipeline.config import validate_name
from pipeline.format_metrics import format_number
from pipeline.runs.serialization import check_timestamp, to_json, verify_digest, with_digest

Parsed = TypeVar("Parsed")

CheckpointPair = tuple[str, str | None]
"""Names of a checkpoint and of the best one up to it, if there is a best."""

LOCATION_KEYS = ("host", "pid", "world_size", "device")
"""Metadata of a claim that locates an attempt; every later entry repeats it."""
RECENT_ATTEMPTS = 10
"""Number of latest attempts that are summarized in every entry and in `run.json`."""
MAX_INTERVAL_S = 86400.0
"""Maximum number of seconds between two heartbeats; watching one takes three intervals."""


@dataclass(frozen=True, kw_only=True)
class BestCheckpoint:
    """The best evaluation so far, and the checkpoint that contains its weights."""

    metric: str
    step: int
    value: float
    checkpoint: str = ""
    """Name of the checkpoint; empty until a commit sets it."""
    metrics: dict[str, float] = field(default_factory=dict)
    """All metrics of that evaluation, such as "val/loss"."""
    mode: Literal["min", "max"] = "min"
    before_training: float | None = None
    """The metric at step 0, which is not a candidate; None if it was not finite, or in earlier versions."""

    @property
    def no_improvement_message(self) -> str:
        """A message that no evaluation is better than that of the model before training; else empty."""
        before = self.before_training
        if before is None or (self.value < before if self.mode == "min" else self.value > before):
            return ""
        return f"no evaluation is better than before training ({self.metric} {format_number(before)})"


@dataclass(frozen=True, kw_only=True)
class JournalEntry:
    """The common fields of all entries."""

    kind: ClassVar[str]
    number: int
    """Position in the journal, from 1."""
    nonce: str
    """Nonce of the attempt that wrote the entry."""
    time: str
    """UTC, ISO 8601; information for users only."""
    attempt: int
    """Number of the attempt: the count of claims up to and including its own."""
    before: JournalState | None = None
    """The state after all entries before this one. None in entries of earlier versions: all entries must be read."""

    def to_json(self) -> str:
        """Return the content of the entry's file."""
        tree = {"kind": self.kind, **asdict(self)}
        before = tree.pop("before")
        if before is not None:
            for name in _ENTRY_TYPES_IN_STATE:
                if before[name] is not None:
                    del before[name]["before"]
            tree["before"] = before
        return to_json(with_digest(tree), indent=1) + "\n"


@dataclass(frozen=True, kw_only=True)
class Claim(JournalEntry):
    """An attempt takes over the run."""

    kind: ClassVar[str] = "claim"
    driver: str = ""
    """Nonce of the process that drives this attempt and possibly later ones."""
    boot: str = ""
    """Boot ID of the machine; empty if unknown."""
    lock: str = ""
    """File on that machine whose lock the attempt holds as long as its process runs."""
    interval_s: float = 10.0
    """Seconds between two heartbeats."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Host, pid, world size, versions, ..."""


@dataclass(frozen=True, kw_only=True)
class Commit(JournalEntry):
    """A checkpoint is complete and part of the run."""

    kind: ClassVar[str] = "commit"
    checkpoint: str
    step: int
    epoch: int
    end: bool
    """Whether training ends at this step, also for every later attempt."""
    kept: tuple[CheckpointPair, ...]
    """The retained pairs, that of this commit first."""
    best: BestCheckpoint | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    """Metrics of the latest evaluation, such as "val/loss"."""
    patience: int | None = None
    """Evaluations since the best one."""
    skipped_updates: int | None = None
    """For fp16: updates skipped since the start of the run because their gradient was not finite."""


@dataclass(frozen=True, kw_only=True)
class Exit(JournalEntry):
    """An attempt stops before the end."""

    kind: ClassVar[str] = "leave"
    status: Literal["interrupted", "failed"]
    step: int
    """The last completed step."""
    error: dict[str, Any] | None = None
    """{"type": ..., "message": ...}"""
    row: dict[str, Any] | None = None
    """The row whose loss was not finite, if that is the reason."""


@dataclass(frozen=True, kw_only=True)
class AttemptSummary:
    """The outcome of an attempt."""

    claim: int
    """Number of its claim in the journal."""
    committed: int | None = None
    """The last step that it committed."""
    outcome: Literal["interrupted", "failed", "end"] | None = None
    """None: it has not written that it is over."""


@dataclass(frozen=True, kw_only=True)
class JournalState:
    """The state after some number of entries: everything that decisions about the run need from them.

    `decisions.apply_entry` returns the state after an entry, given the state before it; the initial state is empty.
    """

    number: int = 0
    """Number of the last entry; 0 without any."""
    started: str = ""
    """Time of the first claim."""
    updated: str = ""
    """Time of the last entry."""
    way: str = ""
    """The execution backend of the first attempt, which all later attempts must use."""
    claim: Claim | None = None
    """The last claim, which is that of the current attempt. Of its metadata only `LOCATION_KEYS`."""
    commit: Commit | None = None
    """The newest commit, from which a resume starts if its checkpoint is valid."""
    leave: Exit | None = None
    """The last entry, if it is an exit."""
    highest_step: int = 0
    """The highest step ever committed; no early stop may come before it."""
    published_step: int = 0
    """The step up to which all complete segments were certainly published: they follow a commit after which the same
    attempt made another commit."""
    ended_at: int | None = None
    """The step at which every attempt must end, once there was a final commit."""
    kept_by_ends: tuple[str, ...] = ()
    """Both checkpoints of every pair that a final commit retains."""
    attempts: tuple[AttemptSummary, ...] = ()
    """The last `RECENT_ATTEMPTS`, oldest first."""

    @property
    def is_over(self) -> bool:
        """Whether the last attempt has written that it is over, by a final commit or an exit. True without attempts."""
        return not self.attempts or self.attempts[-1].outcome is not None


_ENTRY_TYPES_IN_STATE: dict[str, type[JournalEntry]] = {"claim": Claim, "commit": Commit, "leave": Exit}
_ENTRY_TYPES: dict[str, type[JournalEntry]] = {kind.kind: kind for kind in (Claim, Commit, Exit)}


def parse_entry(tree: Any, number: int) -> JournalEntry:
    """Parse and validate an entry from the plain values of its file.

    Raises
    ------
    ValueError, TypeError, KeyError: it was altered, or is not what a version of Trainyard would write: a value of
        another type, an invalid time, a checkpoint name that is a path.
    """
    values = verify_digest(tree)
    if values.get("number") != number:
        raise ValueError("its number is not that of its file name")
    entry = _parse_without_state(_ENTRY_TYPES[values["kind"]], values)
    before = values.get("before")
    return entry if before is None else replace(entry, before=_parse_state(before, number - 1))


def _parse_without_state(entry_type: type[JournalEntry], tree: Any) -> JournalEntry:
    """Parse an entry without the state before it."""
    values = _select_fields(entry_type, tree, exclude={"before"})
    if entry_type is Commit:
        values["best"] = parse_best(values["best"])
        values["metrics"] = to_floats(values["metrics"])
    entry = validate_as(entry_type, values)
    check_timestamp(entry.time)
    if min(entry.attempt, getattr(entry, "step", 0), getattr(entry, "epoch", 0)) < 0:
        raise ValueError("a negative number")
    if isinstance(entry, Claim) and not 0 < entry.interval_s <= MAX_INTERVAL_S:
        raise ValueError(f"{entry.interval_s} s is not a valid heartbeat interval")
    if isinstance(entry, Claim) and not isinstance(entry.facts.get("code", {}), dict):
        raise ValueError("facts.code is not a mapping of files to digests")
    if isinstance(entry, Commit):
        for name in {entry.checkpoint, *(member for pair in entry.kept for member in pair if member is not None)}:
            validate_name(name)
    if isinstance(entry, Exit) and entry.error is not None and not isinstance(entry.error.get("message"), str):
        raise ValueError("an error without a message")
    return entry


def _parse_state(tree: Any, number: int) -> JournalState:
    """Parse and validate the state after the entries up to a number."""
    state = validate_as(JournalState, _select_fields(JournalState, tree, exclude=_ENTRY_TYPES_IN_STATE))
    entries: dict[str, Any] = {
        name: _parse_without_state(kind, tree[name])
        for name, kind in _ENTRY_TYPES_IN_STATE.items()
        if tree[name] is not None
    }
    state = replace(state, **entries, attempts=state.attempts[-RECENT_ATTEMPTS:])
    if state.number != number:
        raise ValueError(f"the state before it ends at entry {state.number}")
    claims = [summary.claim for summary in state.attempts]
    if not number:
        if entries or claims:
            raise ValueError("the state before the first entry is not empty")
        return state
    if state.claim is None or claims[-1:] != [state.claim.number]:
        raise ValueError("the state before it lacks the last claim")
    if not all(1 <= value <= number for value in [*claims, *(entry.number for entry in entries.values())]):
        raise ValueError("the state before it refers to later entries")
    if min(state.highest_step, state.published_step, state.ended_at or 0) < 0:
        raise ValueError("a negative number")
    check_timestamp(state.started)
    check_timestamp(state.updated)
    for name in state.kept_by_ends:
        validate_name(name)
    return state


def _select_fields(dataclass_type: type, tree: Any, exclude: Collection[str]) -> dict[str, Any]:
    """Return the values of a dataclass' fields; later versions may have more."""
    if not isinstance(tree, dict):
        raise ValueError("not a mapping of names to values")
    names = {dataclass_field.name for dataclass_field in fields(dataclass_type)} - set(exclude)
    return {key: value for key, value in tree.items() if key in names}


def validate_as(dataclass_type: type[Parsed], values: Mapping[str, Any]) -> Parsed:
    """Build a dataclass from plain values of exactly its fields' types; ValueError for others."""
    text = json.dumps(
        {**values, **{name: asdict(value) for name, value in values.items() if isinstance(value, BestCheckpoint)}}
    )
    try:
        instance: Parsed = _type_adapter(cast("Any", dataclass_type)).validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    return instance


@cache
def _type_adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def parse_best(tree: Any) -> BestCheckpoint | None:
    """Parse a best evaluation from its plain values."""
    if tree is None:
        return None
    before = tree.get("before_training")
    return BestCheckpoint(
        metric=str(tree["metric"]),
        step=int(tree["step"]),
        value=float(tree["value"]),
        checkpoint=validate_name(tree["checkpoint"]) if tree["checkpoint"] else "",
        metrics=to_floats(tree.get("metrics", {})),
        mode="max" if tree.get("mode") == "max" else "min",
        before_training=float(before) if before is not None else None,
    )


def to_floats(tree: Any) -> dict[str, float]:
    """Parse metrics from their plain values, in which a nonfinite one is a string."""
    return {str(key): float(value) for key, value in tree.items()}
