"""Every decision about a run, as a function of what its journal's entries amount to: no storage, no clock."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

from pipeline.runs.journal.entries import (
    LOCATION_KEYS,
    RECENT_ATTEMPTS,
    AttemptSummary,
    CheckpointPair,
    Claim,
    Commit,
    Exit,
    JournalEntry,
    JournalState,
)

EMPTY_STATE = JournalState()


def apply_entry(state: JournalState, entry: JournalEntry) -> JournalState:
    """The state after an entry, from the state before it."""
    state = replace(state, number=entry.number, updated=entry.time, leave=None)
    if isinstance(entry, Claim):
        where = {name: entry.facts[name] for name in LOCATION_KEYS if name in entry.facts}
        state = replace(
            state,
            claim=replace(entry, facts=where, before=None),
            attempts=(*state.attempts, AttemptSummary(claim=entry.number))[-RECENT_ATTEMPTS:],
        )
        if entry.number == 1:
            state = replace(state, started=entry.time, way=str(entry.facts.get("way", "")))
        return state
    if isinstance(entry, Exit):
        return replace(_update_last_attempt(state, outcome=entry.status), leave=replace(entry, before=None))
    assert isinstance(entry, Commit)
    previous = state.commit
    if previous is not None and previous.attempt == entry.attempt:
        state = replace(state, published_step=max(state.published_step, previous.step))
    state = replace(
        _update_last_attempt(state, committed=entry.step),
        commit=replace(entry, before=None),
        highest_step=max(state.highest_step, entry.step),
    )
    if entry.end:
        ended_at = entry.step if state.ended_at is None else state.ended_at
        kept = tuple(sorted(checkpoints_to_keep(entry.kept, state)))
        state = replace(_update_last_attempt(state, outcome="end"), ended_at=ended_at, kept_by_ends=kept)
    return state


def fold(entries: Iterable[JournalEntry], state: JournalState = EMPTY_STATE) -> JournalState:
    """The state after entries, one by one, from the state before them."""
    for entry in entries:
        state = apply_entry(state, entry)
    return state


def _update_last_attempt(state: JournalState, **changes: Any) -> JournalState:
    """With what an entry tells of the attempt whose turn it is."""
    if not state.attempts:  # a journal that begins with no claim is none of ours
        return state
    return replace(state, attempts=(*state.attempts[:-1], replace(state.attempts[-1], **changes)))


def retained_after(
    previous: Sequence[CheckpointPair], new_pair: CheckpointPair, keep: int
) -> tuple[CheckpointPair, ...]:
    """What a commit keeps: its own pair, then what remains of those before it, `keep` in all."""
    return (new_pair, *previous)[:keep]


def retained_from(retained: Sequence[CheckpointPair], resume_name: str) -> tuple[CheckpointPair, ...]:
    """What remains of a commit's `kept` for an attempt based on one of them: that one and those after it."""
    names = [checkpoint for checkpoint, _ in retained]
    return tuple(retained[names.index(resume_name) :])


def checkpoints_to_keep(kept: Iterable[CheckpointPair], state: JournalState) -> frozenset[str]:
    """Directories that must stay: both of every pair in a commit's `kept` and in that of any end."""
    return frozenset([*(name for pair in kept for name in pair if name is not None), *state.kept_by_ends])


def checkpoints_to_delete(names: Iterable[str], *, attempt: int, step: int, protected: Collection[str]) -> list[str]:
    """Directories of checkpoints that an attempt deletes after a commit at `step`.

    Those of lower attempts and its own up to this step, but for the spared. Never one of a higher attempt: this
    one may be a zombie.
    """
    deletable = []
    for name in names:
        parsed = parse_checkpoint_name(name)
        if parsed is None or name in protected:
            continue
        checkpoint_step, checkpoint_attempt = parsed
        if checkpoint_attempt < attempt or (checkpoint_attempt == attempt and checkpoint_step <= step):
            deletable.append(name)
    return deletable


def format_checkpoint_name(step: int, attempt: int) -> str:
    """Directory of a checkpoint; no two attempts write the same."""
    return f"step-{step:09d}-a{attempt:04d}"


def parse_checkpoint_name(name: str) -> tuple[int, int] | None:
    """(step, attempt) of a checkpoint's directory; None for any other name."""
    match = re.fullmatch(r"step-(\d{9,})-a(\d{4,})", name)
    return (int(match[1]), int(match[2])) if match else None
