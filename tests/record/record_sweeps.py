"""Faults at every single request of an attempt, one after the other: no search, nothing left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from pipeline.record.entries import Commit
from tests.record.record_lives import Faithful, Fate, Life
from tests.record.record_world import World

SAVES = (4, 7, 8)
FATES: tuple[Fate, ...] = ("refused", "unanswered", "late")


@contextmanager
def world_of(protocol: Faithful) -> Iterator[World]:
    """A world whose threads are gone at the end, whatever happened."""
    world = World(protocol)
    try:
        yield world
    finally:
        world.end_all()


def count_requests(protocol: Faithful) -> int:
    """Requests of an attempt that nothing disturbs."""
    with world_of(protocol) as world:
        life, count = world.begin(SAVES), 0
        while not life.over:
            world.advance(life, 1)
            count += 1
        world.conclude()
    return count


def kill_at(protocol: Faithful, request: int, *, done: bool, late: bool) -> None:
    """The process dies at a request: not sent, done, or done after the next attempt has begun."""
    with world_of(protocol) as world:
        life = world.begin(SAVES)
        world.advance(life, request)
        life.kill(done=done, late=late)
        world.check()
        if late:
            world.advance(world.begin((5,)))
        world.conclude()


def fail_at(protocol: Faithful, request: int, fate: Fate) -> None:
    """A request gets no answer, done or not; the writer does it again."""
    with world_of(protocol) as world:
        life = world.begin(SAVES)
        world.advance(life, request)
        life.go_on(fate)
        world.advance(life)
        world.check()
        world.conclude()


def overtake_at(protocol: Faithful, request: int, *, by: int) -> None:
    """The attempt is taken for dead at a request; the next does so many of its own, then the zombie all of its."""
    with world_of(protocol) as world:
        zombie = world.begin(SAVES)
        world.advance(zombie, request)
        other = world.begin((5, 9))
        world.advance(other, by)
        world.advance(zombie)
        world.check()
        world.advance(other)
        world.check()
        world.conclude()


def overtake_until_commit(protocol: Faithful, request: int) -> None:
    """The same, and the next one has just committed when the zombie goes on."""
    with world_of(protocol) as world:
        zombie = world.begin(SAVES)
        world.advance(zombie, request)
        before = count_commits(world)
        other = world.begin((5, 9))
        advance_until(world, other, lambda: count_commits(world) > before)
        world.advance(zombie)
        world.check()
        world.advance(other)
        world.conclude()


def commit_during_claim(protocol: Faithful, request: int, *, by: int) -> None:
    """The attempt taken for dead commits twice more while the next one claims, and deletes, then dies."""
    with world_of(protocol) as world:
        old = world.begin(SAVES)
        world.advance(old, request)
        before = count_commits(world)
        new = world.begin((5, 9))
        world.advance(new, by)
        advance_until(world, old, lambda: count_commits(world) > before + 1)
        advance_until(world, old, lambda: "run.json" in old.what)
        old.kill(done=False, late=False)
        world.advance(new)
        world.check()
        world.conclude()


def damage_the_newest(protocol: Faithful, older: int, newest: int, *, end: bool) -> None:
    """The newest checkpoint is damaged. Whoever goes on from the older one would like to end before its step, or go
    on beyond it where it was the end."""
    with world_of(protocol) as world:
        first = world.begin((older, newest), wish=newest if end else None)
        advance_until(world, first, lambda: world.state().highest_step == newest)
        if end:
            world.advance(first)
        first.kill(done=False, late=False)
        name = world.checkpoints()[-1]
        files = sorted(path for path in world.store.files if f"/{name}/" in path)
        world.damage(name, files[0], "cut")
        world.advance(world.begin((newest - 1,), wish=None if end else older + 1))
        world.check()
        world.conclude()


def count_commits(world: World) -> int:
    return sum(isinstance(entry, Commit) for entry in world.known())


def advance_until(world: World, life: Life, reached: Callable[[], bool]) -> None:
    while not life.over and not reached():
        world.advance(life, 1)


def sweep(protocol: Faithful, *, thin: bool) -> Iterator[Callable[[], None]]:
    """Every case; `thin` takes a part of them, spread over the requests."""
    count = count_requests(protocol)
    for older, newest in ((2, 5), (4, 8), (3, 9)):
        for end in (False, True):
            yield partial(damage_the_newest, protocol, older, newest, end=end)
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
        for fate in FATES[request // 2 % 3 :: 3] if thin else FATES:
            yield partial(fail_at, protocol, request + 1, fate)
    for request in range(0, count, 8 if thin else 1):
        for by in range(request % 32, count, 32 if thin else 1):
            yield partial(overtake_at, protocol, request, by=by)
