"""Decisions about a run as pure functions of the state of its journal: no storage, no clock."""

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
    """Return the state after an entry, given the state before it."""
    state = replace(state, number=entry.number, updated=entry.time, leave=None)
    if isinstance(entry, Claim):
        location = {name: entry.facts[name] for name in LOCATION_KEYS if name in entry.facts}
        state = replace(
            state,
            claim=replace(entry, facts=location, before=None),
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
    """Apply entries one by one to the state before them."""
    for entry in entries:
        state = apply_entry(state, entry)
    return state


def _update_last_attempt(state: JournalState, **changes: Any) -> JournalState:
    """Update the summary of the current attempt."""
    if not state.attempts:  # a journal that does not begin with a claim was not written by Trainyard
        return state
    return replace(state, attempts=(*state.attempts[:-1], replace(state.attempts[-1], **changes)))


def retained_after(
    previous: Sequence[CheckpointPair], new_pair: CheckpointPair, keep: int
) -> tuple[CheckpointPair, ...]:
    """Return the pairs that a commit retains: the new pair, then the previous ones, `keep` in total."""
    return (new_pair, *previous)[:keep]


def retained_from(retained: Sequence[CheckpointPair], resume_name: str) -> tuple[CheckpointPair, ...]:
    """Return the pairs of a commit's `kept` that remain for an attempt that resumes from one of them: that one and the
    older ones."""
    names = [checkpoint for checkpoint, _ in retained]
    return tuple(retained[names.index(resume_name) :])


def checkpoints_to_keep(kept: Iterable[CheckpointPair], state: JournalState) -> frozenset[str]:
    """Return the checkpoints to keep: both of every pair in a commit's `kept` and in that of any final commit."""
    return frozenset([*(name for pair in kept for name in pair if name is not None), *state.kept_by_ends])


def checkpoints_to_delete(names: Iterable[str], *, attempt: int, step: int, protected: Collection[str]) -> list[str]:
    """Return the checkpoints that an attempt deletes after a commit at `step`.

    These are the checkpoints of lower attempts, and its own up to this step, without the protected ones. Never one of a
    higher attempt, because this attempt may be a zombie.
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
    """Return the directory name of a checkpoint. No two attempts use the same name."""
    return f"step-{step:09d}-a{attempt:04d}"


def parse_checkpoint_name(name: str) -> tuple[int, int] | None:
    """Return (step, attempt) of a checkpoint's directory name; None for any other name."""
    match = re.fullmatch(r"step-(\d{9,})-a(\d{4,})", name)
    return (int(match[1]), int(match[2])) if match else None
