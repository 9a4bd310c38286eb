"""Every decision about a run, as a function of its journal's entries: no storage, no clock."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from pipeline.record.entries import Claim, Commit, Entry, Leave, Pair


def last_claim(entries: Sequence[Entry]) -> Claim | None:
    """The claim of the attempt whose turn it is."""
    return next((entry for entry in reversed(entries) if isinstance(entry, Claim)), None)


def first_facts(entries: Iterable[Entry]) -> Mapping[str, Any]:
    """What the first attempt said of its surroundings; empty before it."""
    return next((entry.facts for entry in entries if isinstance(entry, Claim)), {})


def newest_commit(entries: Sequence[Entry]) -> Commit | None:
    """The commit that a resume goes on from, if its checkpoint is sound."""
    return next((entry for entry in reversed(entries) if isinstance(entry, Commit)), None)


def ends(entries: Iterable[Entry]) -> list[Commit]:
    """All commits that end the run."""
    return [entry for entry in entries if isinstance(entry, Commit) and entry.end]


def ended_at(entries: Sequence[Entry]) -> int | None:
    """The step that binds every attempt as the last one, once there was an end."""
    return next((entry.step for entry in ends(entries)), None)


def highest_step(entries: Iterable[Entry]) -> int:
    """The highest step ever committed; no early stop may come before it. 0 without a commit."""
    return max((entry.step for entry in entries if isinstance(entry, Commit)), default=0)


def is_over(entries: Sequence[Entry]) -> bool:
    """Whether the last attempt has said itself that it does no more, by an end or a leave. True without any."""
    claim = last_claim(entries)
    return claim is None or any(
        isinstance(entry, Leave) or (isinstance(entry, Commit) and entry.end)
        for entry in entries[claim.number :]
        if entry.attempt == claim.attempt
    )


def kept_after(previous: Sequence[Pair], own: Pair, keep: int) -> tuple[Pair, ...]:
    """What a commit keeps: its own pair, then what remains of those before it, `keep` in all."""
    return (own, *previous)[:keep]


def remaining(kept: Sequence[Pair], base: str) -> tuple[Pair, ...]:
    """What remains of a commit's `kept` for an attempt based on one of them: that one and those after it."""
    names = [checkpoint for checkpoint, _ in kept]
    return tuple(kept[names.index(base) :])


def spared(kept: Iterable[Pair], entries: Iterable[Entry]) -> frozenset[str]:
    """Directories that must stay: both of every pair in a commit's `kept` and in that of any end."""
    pairs = [*kept, *(pair for end in ends(entries) for pair in end.kept)]
    return frozenset(name for pair in pairs for name in pair if name is not None)


def doomed(names: Iterable[str], *, attempt: int, step: int, spare: Collection[str]) -> list[str]:
    """Directories of checkpoints that an attempt deletes after a commit at `step`.

    Those of lower attempts and its own up to this step, but for the spared. Never one of a higher attempt: this
    one may be a zombie.
    """
    found = []
    for name in names:
        parsed = parse_checkpoint_name(name)
        if parsed is None or name in spare:
            continue
        at, by = parsed
        if by < attempt or (by == attempt and at <= step):
            found.append(name)
    return found


def checkpoint_name(step: int, attempt: int) -> str:
    """Directory of a checkpoint; no two attempts write the same."""
    return f"step-{step:09d}-a{attempt:04d}"


def parse_checkpoint_name(name: str) -> tuple[int, int] | None:
    """(step, attempt) of a checkpoint's directory; None for any other name."""
    match = re.fullmatch(r"step-(\d{9,})-a(\d{4,})", name)
    return (int(match[1]), int(match[2])) if match else None
