"""Decisions over journals, without any storage."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from pipeline.record import decisions
from pipeline.record.entries import Claim, Commit, Entry, Leave, Pair


def claim(number: int, attempt: int) -> Claim:
    return Claim(number=number, nonce=f"{attempt}", time="t", attempt=attempt)


def commit(number: int, attempt: int, step: int, *, end: bool = False, kept: tuple[Pair, ...] = ()) -> Commit:
    name = decisions.checkpoint_name(step, attempt)
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


def leave(number: int, attempt: int) -> Leave:
    return Leave(number=number, nonce=f"{attempt}", time="t", attempt=attempt, status="failed", step=1)


def test_an_attempt_is_over_when_it_says_so_itself() -> None:
    assert decisions.is_over([])
    open_run: list[Entry] = [claim(1, 1), commit(2, 1, 10)]
    assert not decisions.is_over(open_run)
    assert decisions.is_over([*open_run, leave(3, 1)])
    assert decisions.is_over([*open_run, commit(3, 1, 20, end=True)])
    assert not decisions.is_over([*open_run, leave(3, 1), claim(4, 2)])
    assert not decisions.is_over([*open_run, commit(3, 1, 20, end=True), claim(4, 2)])


def test_the_end_binds_those_who_come_later() -> None:
    entries: list[Entry] = [claim(1, 1), commit(2, 1, 10), commit(3, 1, 20, end=True), claim(4, 2)]
    assert decisions.ended_at(entries[:2]) is None
    assert decisions.ended_at(entries) == 20
    newest = decisions.newest_commit([*entries, commit(5, 2, 15)])
    assert newest is not None
    assert newest.step == 15, "newest by the journal, not by step"
    assert decisions.highest_step([*entries, commit(5, 2, 15)]) == 20


names = st.builds(decisions.checkpoint_name, st.integers(0, 10**10), st.integers(1, 20000))
pairs = st.tuples(names, st.none() | names)


@given(st.integers(0, 10**10), st.integers(1, 20000))
def test_names_of_checkpoints_can_be_read_back(step: int, attempt: int) -> None:
    assert decisions.parse_checkpoint_name(decisions.checkpoint_name(step, attempt)) == (step, attempt)


@given(st.lists(pairs, max_size=6), pairs, st.integers(1, 4))
def test_what_is_kept_is_bounded_and_begins_with_itself(previous: list[Pair], own: Pair, keep: int) -> None:
    kept = decisions.kept_after(previous, own, keep)
    assert kept[0] == own
    assert len(kept) == min(keep, 1 + len(previous))
    assert list(kept[1:]) == previous[: len(kept) - 1]


@given(st.lists(pairs, min_size=1, max_size=5, unique_by=lambda pair: pair[0]), st.data())
def test_what_remains_begins_with_the_base(kept: list[Pair], data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(kept) - 1))
    assert decisions.remaining(kept, kept[index][0]) == tuple(kept[index:])


@given(
    st.sets(names | st.sampled_from(["readme", "step-1", ".tmp"]), max_size=12),
    st.sets(names, max_size=4),
    st.integers(1, 20000),
    st.integers(0, 10**10),
)
def test_never_doomed(there: set[str], spare: set[str], attempt: int, step: int) -> None:
    doomed = decisions.doomed(sorted(there | spare), attempt=attempt, step=step, spare=spare)
    assert not set(doomed) & spare
    for name in doomed:
        at, by = decisions.parse_checkpoint_name(name) or (-1, -1)
        assert by < attempt or (by == attempt and at <= step)
    for name in there - set(doomed) - spare:
        parsed = decisions.parse_checkpoint_name(name)
        assert parsed is None or parsed[1] > attempt or (parsed[1] == attempt and parsed[0] > step)


def test_both_of_every_pair_are_spared_and_those_of_ends() -> None:
    end = commit(2, 1, 20, end=True, kept=(("a", "b"), ("c", None)))
    assert decisions.spared([("d", "a")], [claim(1, 1), end, claim(3, 2)]) == {"a", "b", "c", "d"}
