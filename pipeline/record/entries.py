"""What stands in a journal: claims, commits and leaves, as plain values."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Literal

from pipeline.record.values import to_json

Pair = tuple[str, str | None]
"""Names of a checkpoint and of the best one until then, where there is a best."""


@dataclass(frozen=True, kw_only=True)
class BestSoFar:
    """The best evaluation so far, and the directory that holds its weights."""

    metric: str
    step: int
    value: float
    checkpoint: str = ""
    """Name of the directory; empty until a commit has given it one."""
    metrics: dict[str, float] = field(default_factory=dict)
    """All of that evaluation, such as "val/loss"."""


@dataclass(frozen=True, kw_only=True)
class Entry:
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

    def to_json(self) -> str:
        """The entry's file."""
        return to_json({"kind": self.kind, **asdict(self)}, indent=1) + "\n"


@dataclass(frozen=True, kw_only=True)
class Claim(Entry):
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
class Commit(Entry):
    """A checkpoint is complete and counts."""

    kind: ClassVar[str] = "commit"
    checkpoint: str
    step: int
    epoch: int
    end: bool
    """Training is over at this step, for every later attempt too."""
    kept: tuple[Pair, ...]
    """What stays, itself first."""
    best: BestSoFar | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the latest evaluation, such as "val/loss"."""
    patience: int | None = None
    """Evaluations since the best one."""


@dataclass(frozen=True, kw_only=True)
class Leave(Entry):
    """An attempt stops before the end."""

    kind: ClassVar[str] = "leave"
    status: Literal["interrupted", "failed"]
    step: int
    """The last step that it did."""
    error: dict[str, Any] | None = None
    """{"type": ..., "message": ...}"""
    row: dict[str, Any] | None = None
    """The row whose loss was not finite, where that is why."""


_KINDS: dict[str, type[Entry]] = {kind.kind: kind for kind in (Claim, Commit, Leave)}


def parse_entry(tree: Any, number: int) -> Entry:
    """An entry from its plain values; ValueError, TypeError or KeyError for anything else."""
    if not isinstance(tree, dict) or tree.get("number") != number:
        raise ValueError("its number is not that of its name")
    kind = _KINDS[tree["kind"]]
    known = {one.name for one in fields(kind)}
    values = {key: value for key, value in tree.items() if key in known}  # later versions may add some
    if kind is Commit:
        values["kept"] = tuple((str(pair[0]), pair[1]) for pair in tree["kept"])
        values["best"] = parse_best(tree["best"])
        values["metrics"] = _numbers(tree["metrics"])
    return kind(**values)


def parse_best(tree: Any) -> BestSoFar | None:
    """A best so far from its plain values."""
    if tree is None:
        return None
    return BestSoFar(
        metric=str(tree["metric"]),
        step=int(tree["step"]),
        value=float(tree["value"]),
        checkpoint=str(tree["checkpoint"]),
        metrics=_numbers(tree.get("metrics", {})),
    )


def _numbers(tree: Any) -> dict[str, float]:
    return {str(key): float(value) for key, value in tree.items()}
