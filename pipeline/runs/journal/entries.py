"""What stands in a journal: claims, commits and leaves, as plain values; and what entries up to one amount to."""

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
"""Names of a checkpoint and of the best one until then, where there is a best."""

LOCATION_KEYS = ("host", "pid", "world_size", "device")
"""Facts of a claim that say where an attempt runs; every later entry repeats them."""
RECENT_ATTEMPTS = 10
"""Attempts that have a line in every later entry and in `run.json`: the last ones."""


@dataclass(frozen=True, kw_only=True)
class BestCheckpoint:
    """The best evaluation so far, and the directory that holds its weights."""

    metric: str
    step: int
    value: float
    checkpoint: str = ""
    """Name of the directory; empty until a commit has given it one."""
    metrics: dict[str, float] = field(default_factory=dict)
    """All of that evaluation, such as "val/loss"."""
    mode: Literal["min", "max"] = "min"
    before_training: float | None = None
    """The metric's value at step 0, which is no candidate; None where it was not finite, or in an earlier version."""

    @property
    def no_improvement_message(self) -> str:
        """That no evaluation is better than that of the model before training, in words; else empty."""
        before = self.before_training
        if before is None or (self.value < before if self.mode == "min" else self.value > before):
            return ""
        return f"no evaluation is better than before training ({self.metric} {format_number(before)})"


@dataclass(frozen=True, kw_only=True)
class JournalEntry:
    """What all entries have."""

    kind: ClassVar[str]
    number: int
    """Place in the journal, from 1."""
    nonce: str
    """That of the attempt which wrote the entry."""
    time: str
    """UTC, ISO 8601; for people."""
    attempt: int
    """Number of the attempt: the count of claims up to its own."""
    before: JournalState | None = None
    """What all entries before this one amount to. None in entries of earlier versions: those before must be read."""

    def to_json(self) -> str:
        """The entry's file."""
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
    """An attempt takes the run over."""

    kind: ClassVar[str] = "claim"
    driver: str = ""
    """Nonce of the process that drives this and perhaps later attempts."""
    boot: str = ""
    """Identifies one life of one machine; empty where that is not known."""
    lock: str = ""
    """File on that machine whose lock the attempt holds for as long as its process lives."""
    interval_s: float = 10.0
    """Between two heartbeats."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Host, pid, world size, versions, ..."""


@dataclass(frozen=True, kw_only=True)
class Commit(JournalEntry):
    """A checkpoint is complete and counts."""

    kind: ClassVar[str] = "commit"
    checkpoint: str
    step: int
    epoch: int
    end: bool
    """Training is over at this step, for every later attempt too."""
    kept: tuple[CheckpointPair, ...]
    """What stays, itself first."""
    best: BestCheckpoint | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the latest evaluation, such as "val/loss"."""
    patience: int | None = None
    """Evaluations since the best one."""
    skipped_updates: int | None = None
    """For fp16: updates skipped since the start of the run, because their gradient was not finite."""


@dataclass(frozen=True, kw_only=True)
class Exit(JournalEntry):
    """An attempt stops before the end."""

    kind: ClassVar[str] = "leave"
    status: Literal["interrupted", "failed"]
    step: int
    """The last step that it did."""
    error: dict[str, Any] | None = None
    """{"type": ..., "message": ...}"""
    row: dict[str, Any] | None = None
    """The row whose loss was not finite, where that is why."""


@dataclass(frozen=True, kw_only=True)
class AttemptSummary:
    """How far an attempt came."""

    claim: int
    """Number of its claim in the journal."""
    committed: int | None = None
    """The last step that it committed."""
    outcome: Literal["interrupted", "failed", "end"] | None = None
    """None: it has not said that it is over."""


@dataclass(frozen=True, kw_only=True)
class JournalState:
    """What the entries up to one of them amount to: all that any decision about the run needs of them.

    `decisions.apply` gives the state after an entry from the state before it; without entries it is the empty one.
    """

    number: int = 0
    """Of the last of these entries; 0 without any."""
    started: str = ""
    """Time of the first claim."""
    updated: str = ""
    """Time of the last entry."""
    way: str = ""
    """How the first attempt runs a step, which binds all others."""
    claim: Claim | None = None
    """The last one: that of the attempt whose turn it is. Of its facts only those of `WHERE`."""
    commit: Commit | None = None
    """The newest one: a resume goes on from it, if its checkpoint is sound."""
    leave: Exit | None = None
    """The last entry, where that is a leave."""
    highest_step: int = 0
    """The highest step ever committed; no early stop may come before it."""
    published_step: int = 0
    """The step up to which all complete cells were published for certain: they follow a commit, and whoever wrote them
    went on to another commit after that."""
    ended_at: int | None = None
    """The step that binds every attempt as the last one, once there was an end."""
    kept_by_ends: tuple[str, ...] = ()
    """Both checkpoints of every pair that an end keeps."""
    attempts: tuple[AttemptSummary, ...] = ()
    """The last `RECENT_ATTEMPTS`, oldest first."""

    @property
    def is_over(self) -> bool:
        """Whether the last attempt has said itself that it does no more, by an end or a leave. True without any."""
        return not self.attempts or self.attempts[-1].outcome is not None


_ENTRY_TYPES_IN_STATE: dict[str, type[JournalEntry]] = {"claim": Claim, "commit": Commit, "leave": Exit}
_ENTRY_TYPES: dict[str, type[JournalEntry]] = {kind.kind: kind for kind in (Claim, Commit, Exit)}


MAX_INTERVAL_S = 86400.0
"""Between two heartbeats, at the most; whoever watches one waits for three."""


def parse_entry(tree: Any, number: int) -> JournalEntry:
    """An entry from the plain values of its file.

    Raises
    ------
    ValueError, TypeError, KeyError: altered since it was written, or not what a version of Trainyard would write: a
        value of another type, no time, a checkpoint whose name leads elsewhere.
    """
    values = verify_digest(tree)
    if values.get("number") != number:
        raise ValueError("its number is not that of its name")
    entry = _parse_without_state(_ENTRY_TYPES[values["kind"]], values)
    before = values.get("before")
    return entry if before is None else replace(entry, before=_parse_state(before, number - 1))


def _parse_without_state(entry_type: type[JournalEntry], tree: Any) -> JournalEntry:
    """An entry without what stands before it."""
    values = _select_fields(entry_type, tree, exclude={"before"})
    if entry_type is Commit:
        values["best"] = parse_best(values["best"])
        values["metrics"] = to_floats(values["metrics"])
    entry = validate_as(entry_type, values)
    check_timestamp(entry.time)
    if min(entry.attempt, getattr(entry, "step", 0), getattr(entry, "epoch", 0)) < 0:
        raise ValueError("a number below 0")
    if isinstance(entry, Claim) and not 0 < entry.interval_s <= MAX_INTERVAL_S:
        raise ValueError(f"{entry.interval_s} s is no interval between heartbeats")
    if isinstance(entry, Claim) and not isinstance(entry.facts.get("code", {}), dict):
        raise ValueError("facts.code is no mapping of files to digests")
    if isinstance(entry, Commit):
        for name in {entry.checkpoint, *(member for pair in entry.kept for member in pair if member is not None)}:
            validate_name(name)
    if isinstance(entry, Exit) and entry.error is not None and not isinstance(entry.error.get("message"), str):
        raise ValueError("an error without a message")
    return entry


def _parse_state(tree: Any, number: int) -> JournalState:
    """What the entries up to a number amount to, from its plain values."""
    state = validate_as(JournalState, _select_fields(JournalState, tree, exclude=_ENTRY_TYPES_IN_STATE))
    entries: dict[str, Any] = {
        name: _parse_without_state(kind, tree[name])
        for name, kind in _ENTRY_TYPES_IN_STATE.items()
        if tree[name] is not None
    }
    state = replace(state, **entries, attempts=state.attempts[-RECENT_ATTEMPTS:])
    if state.number != number:
        raise ValueError(f"what stands before it ends at entry {state.number}")
    claims = [one.claim for one in state.attempts]
    if not number:
        if entries or claims:
            raise ValueError("something stands before the first entry")
        return state
    if state.claim is None or claims[-1:] != [state.claim.number]:
        raise ValueError("the claim before it is missing")
    if not all(1 <= one <= number for one in [*claims, *(entry.number for entry in entries.values())]):
        raise ValueError("what stands before it names later entries")
    if min(state.highest_step, state.published_step, state.ended_at or 0) < 0:
        raise ValueError("a number below 0")
    check_timestamp(state.started)
    check_timestamp(state.updated)
    for name in state.kept_by_ends:
        validate_name(name)
    return state


def _select_fields(dataclass_type: type, tree: Any, exclude: Collection[str]) -> dict[str, Any]:
    """The values of a dataclass' fields: later versions may add some."""
    if not isinstance(tree, dict):
        raise ValueError("no mapping of names to values")
    names = {one.name for one in fields(dataclass_type)} - set(exclude)
    return {key: value for key, value in tree.items() if key in names}


def validate_as(dataclass_type: type[Parsed], values: Mapping[str, Any]) -> Parsed:
    """A dataclass from plain values of exactly its fields' types; ValueError for others."""
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
    """A best so far from its plain values."""
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
    """Metrics from their plain values, where one that is not finite is a word."""
    return {str(key): float(value) for key, value in tree.items()}
