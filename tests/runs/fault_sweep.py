"""Exhaustive fault injection: a fault at every single request of an attempt, one per case."""

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
    """Create a model, and stop its threads at the end in any case."""
    model = ProtocolModel(protocol)
    try:
        yield model
    finally:
        model.kill_all()


def count_requests(protocol: ReferenceProtocol) -> int:
    """Return the number of requests of an undisturbed attempt."""
    with open_model(protocol) as model:
        writer, count = model.start_writer(COMMIT_STEPS), 0
        while not writer.is_finished:
            model.advance(writer, 1)
            count += 1
        model.finish_and_check()
    return count


def kill_at(protocol: ReferenceProtocol, request: int, *, done: bool, late: bool) -> None:
    """Kill the process at a request that is not sent, done, or done after the next attempt has started."""
    with open_model(protocol) as model:
        writer = model.start_writer(COMMIT_STEPS)
        model.advance(writer, request)
        writer.kill(done=done, late=late)
        model.check_invariants()
        if late:
            model.advance(model.start_writer((5,)))
        model.finish_and_check()


def fail_at(protocol: ReferenceProtocol, request: int, outcome: RequestOutcome) -> None:
    """Leave a request without a reply, done or not; the writer retries it."""
    with open_model(protocol) as model:
        writer = model.start_writer(COMMIT_STEPS)
        model.advance(writer, request)
        writer.resume(outcome)
        model.advance(writer)
        model.check_invariants()
        model.finish_and_check()


def overtake_at(protocol: ReferenceProtocol, request: int, *, by: int) -> None:
    """Presume the attempt dead at a request; the next attempt does `by` requests, then the zombie all of its own."""
    with open_model(protocol) as model:
        zombie = model.start_writer(COMMIT_STEPS)
        model.advance(zombie, request)
        other = model.start_writer((5, 9))
        model.advance(other, by)
        model.advance(zombie)
        model.check_invariants()
        model.advance(other)
        model.check_invariants()
        model.finish_and_check()


def overtake_until_commit(protocol: ReferenceProtocol, request: int) -> None:
    """Presume the attempt dead at a request; the zombie continues just after the next attempt has committed."""
    with open_model(protocol) as model:
        zombie = model.start_writer(COMMIT_STEPS)
        model.advance(zombie, request)
        before = count_commits(model)
        other = model.start_writer((5, 9))
        advance_until(model, other, lambda: count_commits(model) > before)
        model.advance(zombie)
        model.check_invariants()
        model.advance(other)
        model.finish_and_check()


def commit_during_claim(protocol: ReferenceProtocol, request: int, *, by: int) -> None:
    """The attempt presumed dead commits twice more, and deletes, while the next one claims; then it is killed."""
    with open_model(protocol) as model:
        old = model.start_writer(COMMIT_STEPS)
        model.advance(old, request)
        before = count_commits(model)
        new = model.start_writer((5, 9))
        model.advance(new, by)
        advance_until(model, old, lambda: count_commits(model) > before + 1)
        advance_until(model, old, lambda: "run.json" in old.request)
        old.kill(done=False, late=False)
        model.advance(new)
        model.check_invariants()
        model.finish_and_check()


def damage_newest(protocol: ReferenceProtocol, older: int, newest: int, *, end: bool) -> None:
    """Damage the newest checkpoint. The attempt that resumes from the older one tries to stop before the step of the
    newest, or, if that was the end, to train beyond it."""
    with open_model(protocol) as model:
        first = model.start_writer((older, newest), early_stop_step=newest if end else None)
        advance_until(model, first, lambda: model.fold_entries().highest_step == newest)
        if end:
            model.advance(first)
        first.kill(done=False, late=False)
        name = model.checkpoints()[-1]
        files = sorted(path for path in model.store.files if f"/{name}/" in path)
        model.damage_checkpoint(name, files[0], "truncated")
        model.advance(model.start_writer((newest - 1,), early_stop_step=None if end else older + 1))
        model.check_invariants()
        model.finish_and_check()


def count_commits(model: ProtocolModel) -> int:
    return sum(isinstance(entry, Commit) for entry in model.read_entries())


def advance_until(model: ProtocolModel, writer: SimulatedWriter, reached: Callable[[], bool]) -> None:
    while not writer.is_finished and not reached():
        model.advance(writer, 1)


def fault_cases(protocol: ReferenceProtocol, *, thin: bool) -> Iterator[Callable[[], None]]:
    """Yield every case; with `thin` only a part of them, spread over the requests."""
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
        for outcome in OUTCOMES[request // 2 % 3 :: 3] if thin else OUTCOMES:
            yield partial(fail_at, protocol, request + 1, outcome)
    for request in range(0, count, 8 if thin else 1):
        for by in range(request % 32, count, 32 if thin else 1):
            yield partial(overtake_at, protocol, request, by=by)
