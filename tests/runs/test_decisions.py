"""Decisions about a run as functions of its journal, without storage."""

from __future__ import annotations

from itertools import pairwise

import hypothesis.strategies as st
from hypothesis import given, settings

from pipeline.runs.journal import decisions
from pipeline.runs.journal.entries import RECENT_ATTEMPTS, CheckpointPair, Claim, Commit, Exit, JournalEntry


def make_claim(number: int, attempt: int) -> Claim:
    return Claim(number=number, nonce=f"{attempt}", time="t", attempt=attempt)


def make_commit(
    number: int, attempt: int, step: int, *, end: bool = False, kept: tuple[CheckpointPair, ...] = ()
) -> Commit:
    name = decisions.format_checkpoint_name(step, attempt)
    return Commit(
        number=number,
        nonce=f"{attempt}",
        time="t",
        attempt=attempt,
        checkpoint=name,
        step=step,
        epoch=1,
        end=end,
        kept=kept or ((name, None),),
    )


def make_exit(number: int, attempt: int) -> Exit:
    return Exit(number=number, nonce=f"{attempt}", time="t", attempt=attempt, status="failed", step=1)


def test_attempt_is_over_after_its_exit_or_end() -> None:
    def is_over(*entries: JournalEntry) -> bool:
        return decisions.fold(entries).is_over

    assert is_over()
    open_run: list[JournalEntry] = [make_claim(1, 1), make_commit(2, 1, 10)]
    assert not is_over(*open_run)
    assert is_over(*open_run, make_exit(3, 1))
    assert is_over(*open_run, make_commit(3, 1, 20, end=True))
    assert not is_over(*open_run, make_exit(3, 1), make_claim(4, 2))
    assert not is_over(*open_run, make_commit(3, 1, 20, end=True), make_claim(4, 2))


def test_end_binds_later_attempts() -> None:
    entries: list[JournalEntry] = [
        make_claim(1, 1),
        make_commit(2, 1, 10),
        make_commit(3, 1, 20, end=True),
        make_claim(4, 2),
    ]
    assert decisions.fold(entries[:2]).ended_at is None
    assert decisions.fold(entries).ended_at == 20
    later = decisions.fold([*entries, make_commit(5, 2, 15)])
    assert later.commit is not None
    assert later.commit.step == 15, "the last in the journal, not that of the highest step"
    assert later.highest_step == 20


@st.composite
def journals(draw: st.DrawFn) -> list[JournalEntry]:
    """Consecutive attempts, each with commits and possibly an exit."""
    entries: list[JournalEntry] = []
    for attempt in range(1, 1 + draw(st.integers(0, RECENT_ATTEMPTS + 3))):
        entries.append(make_claim(len(entries) + 1, attempt))
        for step in sorted(draw(st.sets(st.integers(1, 40), max_size=4))):
            kept = tuple((decisions.format_checkpoint_name(step - back, attempt), None) for back in range(2))
            end = draw(st.integers(0, 9)) == 0
            entries.append(make_commit(len(entries) + 1, attempt, step, end=end, kept=kept))
        if draw(st.booleans()):
            entries.append(make_exit(len(entries) + 1, attempt))
    return entries


@settings(deadline=None)
@given(journals(), st.data())
def test_state_summarizes_all_entries(entries: list[JournalEntry], data: st.DataObject) -> None:
    """Applying entry by entry is equivalent to examining all entries."""
    state = decisions.fold(entries)
    claims = [entry for entry in entries if isinstance(entry, Claim)]
    commits = [entry for entry in entries if isinstance(entry, Commit)]
    ends = [entry for entry in commits if entry.end]
    assert state.number == len(entries)
    assert state.claim == (claims[-1] if claims else None)
    assert state.commit == (commits[-1] if commits else None)
    assert state.leave == (entries[-1] if entries and isinstance(entries[-1], Exit) else None)
    assert state.highest_step == max((entry.step for entry in commits), default=0)
    assert state.ended_at == (ends[0].step if ends else None)
    assert set(state.kept_by_ends) == {name for end in ends for pair in end.kept for name in pair if name is not None}
    pairs = [(commit, following) for commit, following in pairwise(commits) if commit.attempt == following.attempt]
    assert state.published_step == max((commit.step for commit, _ in pairs), default=0)
    assert [summary.claim for summary in state.attempts] == [entry.number for entry in claims][-RECENT_ATTEMPTS:]
    for summary in state.attempts:
        claim = entries[summary.claim - 1]
        of_attempt = [entry for entry in entries[summary.claim :] if entry.attempt == claim.attempt]
        steps = [entry.step for entry in of_attempt if isinstance(entry, Commit)]
        outcomes = [entry.status if isinstance(entry, Exit) else "end" for entry in of_attempt if ends_attempt(entry)]
        assert summary.committed == (max(steps) if steps else None)
        assert summary.outcome == (outcomes[-1] if outcomes else None)
    number = data.draw(st.integers(0, len(entries)))
    assert decisions.fold(entries[number:], decisions.fold(entries[:number])) == state


def ends_attempt(entry: JournalEntry) -> bool:
    """Whether an attempt is over after its entry."""
    return isinstance(entry, Exit) or (isinstance(entry, Commit) and entry.end)


checkpoint_names = st.builds(decisions.format_checkpoint_name, st.integers(0, 10**10), st.integers(1, 20000))
checkpoint_pairs = st.tuples(checkpoint_names, st.none() | checkpoint_names)


@given(st.integers(0, 10**10), st.integers(1, 20000))
def test_checkpoint_names_round_trip(step: int, attempt: int) -> None:
    assert decisions.parse_checkpoint_name(decisions.format_checkpoint_name(step, attempt)) == (step, attempt)


@given(st.lists(checkpoint_pairs, max_size=6), checkpoint_pairs, st.integers(1, 4))
def test_retained_checkpoints_are_bounded_and_start_with_the_newest(
    previous: list[CheckpointPair], new_pair: CheckpointPair, keep: int
) -> None:
    kept = decisions.retained_after(previous, new_pair, keep)
    assert kept[0] == new_pair
    assert len(kept) == min(keep, 1 + len(previous))
    assert list(kept[1:]) == previous[: len(kept) - 1]


@given(st.lists(checkpoint_pairs, min_size=1, max_size=5, unique_by=lambda pair: pair[0]), st.data())
def test_retained_from_starts_with_the_resume_checkpoint(kept: list[CheckpointPair], data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(kept) - 1))
    assert decisions.retained_from(kept, kept[index][0]) == tuple(kept[index:])


@given(
    st.sets(checkpoint_names | st.sampled_from(["readme", "step-1", ".tmp"]), max_size=12),
    st.sets(checkpoint_names, max_size=4),
    st.integers(1, 20000),
    st.integers(0, 10**10),
)
def test_protected_checkpoints_are_never_deleted(names: set[str], protected: set[str], attempt: int, step: int) -> None:
    deleted = decisions.checkpoints_to_delete(
        sorted(names | protected), attempt=attempt, step=step, protected=protected
    )
    assert not set(deleted) & protected
    for name in deleted:
        checkpoint_step, checkpoint_attempt = decisions.parse_checkpoint_name(name) or (-1, -1)
        assert checkpoint_attempt < attempt or (checkpoint_attempt == attempt and checkpoint_step <= step)
    for name in names - set(deleted) - protected:
        parsed = decisions.parse_checkpoint_name(name)
        assert parsed is None or parsed[1] > attempt or (parsed[1] == attempt and parsed[0] > step)


def test_both_checkpoints_of_pairs_and_of_ends_are_kept() -> None:
    end = make_commit(2, 1, 20, end=True, kept=(("a", "b"), ("c", None)))
    state = decisions.fold([make_claim(1, 1), end, make_claim(3, 2)])
    assert decisions.checkpoints_to_keep([("d", "a")], state) == {"a", "b", "c", "d"}
