"""Faults at every single request of an attempt, one after the other: no search, nothing left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from pipeline.runs.journal.entries import Commit
from tests.runs.protocol_model import ProtocolModel
from tests.runs.simulated_writers import ReferenceProtocol, RequestOutcome, SimulatedWriter

COMMIT_STEPS = (4, 7, 8)
OUTCOMES: tuple[RequestOutcome, ...] = ("refused", "unanswered", "late")


@contextmanager
def open_model(protocol: ReferenceProtocol) -> Iterator[ProtocolModel]:
    """A world whose threads are gone at the end, whatever happened."""
    world = ProtocolModel(protocol)
    try:
        yield world
    finally:
        world.kill_all()


def count_requests(protocol: ReferenceProtocol) -> int:
    """Requests of an attempt that nothing disturbs."""
    with open_model(protocol) as world:
        life, count = world.start_writer(COMMIT_STEPS), 0
        while not life.is_finished:
            world.advance(life, 1)
            count += 1
        world.finish_and_check()
    return count


def kill_at(protocol: ReferenceProtocol, request: int, *, done: bool, late: bool) -> None:
    """The process dies at a request: not sent, done, or done after the next attempt has begun."""
    with open_model(protocol) as world:
        life = world.start_writer(COMMIT_STEPS)
        world.advance(life, request)
        life.kill(done=done, late=late)
        world.check_invariants()
        if late:
            world.advance(world.start_writer((5,)))
        world.finish_and_check()


def fail_at(protocol: ReferenceProtocol, request: int, outcome: RequestOutcome) -> None:
    """A request gets no answer, done or not; the writer does it again."""
    with open_model(protocol) as world:
        life = world.start_writer(COMMIT_STEPS)
        world.advance(life, request)
        life.resume(outcome)
        world.advance(life)
        world.check_invariants()
        world.finish_and_check()


def overtake_at(protocol: ReferenceProtocol, request: int, *, by: int) -> None:
    """The attempt is taken for dead at a request; the next does so many of its own, then the zombie all of its."""
    with open_model(protocol) as world:
        zombie = world.start_writer(COMMIT_STEPS)
        world.advance(zombie, request)
        other = world.start_writer((5, 9))
        world.advance(other, by)
        world.advance(zombie)
        world.check_invariants()
        world.advance(other)
        world.check_invariants()
        world.finish_and_check()


def overtake_until_commit(protocol: ReferenceProtocol, request: int) -> None:
    """The same, and the next one has just committed when the zombie goes on."""
    with open_model(protocol) as world:
        zombie = world.start_writer(COMMIT_STEPS)
        world.advance(zombie, request)
        before = count_commits(world)
        other = world.start_writer((5, 9))
        advance_until(world, other, lambda: count_commits(world) > before)
        world.advance(zombie)
        world.check_invariants()
        world.advance(other)
        world.finish_and_check()


def commit_during_claim(protocol: ReferenceProtocol, request: int, *, by: int) -> None:
    """The attempt taken for dead commits twice more while the next one claims, and deletes, then dies."""
    with open_model(protocol) as world:
        old = world.start_writer(COMMIT_STEPS)
        world.advance(old, request)
        before = count_commits(world)
        new = world.start_writer((5, 9))
        world.advance(new, by)
        advance_until(world, old, lambda: count_commits(world) > before + 1)
        advance_until(world, old, lambda: "run.json" in old.request)
        old.kill(done=False, late=False)
        world.advance(new)
        world.check_invariants()
        world.finish_and_check()


def damage_newest(protocol: ReferenceProtocol, older: int, newest: int, *, end: bool) -> None:
    """The newest checkpoint is damaged. Whoever goes on from the older one would like to end before its step, or go
    on beyond it where it was the end."""
    with open_model(protocol) as world:
        first = world.start_writer((older, newest), early_stop_step=newest if end else None)
        advance_until(world, first, lambda: world.fold_entries().highest_step == newest)
        if end:
            world.advance(first)
        first.kill(done=False, late=False)
        name = world.checkpoints()[-1]
        files = sorted(path for path in world.store.files if f"/{name}/" in path)
        world.damage_checkpoint(name, files[0], "cut")
        world.advance(world.start_writer((newest - 1,), early_stop_step=None if end else older + 1))
        world.check_invariants()
        world.finish_and_check()


def count_commits(world: ProtocolModel) -> int:
    return sum(isinstance(entry, Commit) for entry in world.read_entries())


def advance_until(world: ProtocolModel, life: SimulatedWriter, reached: Callable[[], bool]) -> None:
    while not life.is_finished and not reached():
        world.advance(life, 1)


def fault_cases(protocol: ReferenceProtocol, *, thin: bool) -> Iterator[Callable[[], None]]:
    """Every case; `thin` takes a part of them, spread over the requests."""
    count = count_requests(protocol)
    for older, newest in ((2, 5), (4, 8), (3, 9)):
        for end in (False, True):
            yield partial(damage_newest, protocol, older, newest, end=end)
    for request in reversed(range(0, count, 5 if thin else 1)):
        yield partial(overtake_until_commit, protocol, request)
    for request in range(0, count, 8 if thin else 1):
        for by in range(request // 8 % 4, 24, 4 if thin else 1):
            yield partial(commit_during_claim, protocol, request, by=by)
    for request in reversed(range(count)):
        yield partial(kill_at, protocol, request, done=False, late=False)
    for request in range(0, count, 2 if thin else 1):
        for done in (request % 4 == 0,) if thin else (False, True):
            yield partial(kill_at, protocol, request, done=done, late=not done)
        for fate in OUTCOMES[request // 2 % 3 :: 3] if thin else OUTCOMES:
            yield partial(fail_at, protocol, request + 1, fate)
    for request in range(0, count, 8 if thin else 1):
        for by in range(request % 32, count, 32 if thin else 1):
            yield partial(overtake_at, protocol, request, by=by)
