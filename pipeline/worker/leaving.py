"""The last word of an attempt that stops before the end, or of a driver whose workers died before they could say it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Literal

from pipeline.bookkeeping import Bookkeeper
from pipeline.context import PeerFailure
from pipeline.errors import BusyError, Interrupted, StorageLostError, SupersededError, TrainyardError
from pipeline.record.attempt import claim
from pipeline.record.recorder import LAST_WORD_S, Recorder
from pipeline.record.run import Run
from pipeline.worker.order import Order


@contextmanager
def leaving_word(recorder: Recorder, bookkeeper: Bookkeeper) -> Iterator[None]:
    """Write into the journal why an attempt leaves before the end."""
    try:
        yield
    except SupersededError:
        raise
    except Interrupted:
        recorder.leave("interrupted", None, bookkeeper.step)
        raise
    except PeerFailure as error:  # the driver starts again, or says why not
        recorder.leave("interrupted", error, bookkeeper.step)
        raise
    except Exception as error:
        recorder.leave("failed", error, bookkeeper.step)
        raise


def say_for_the_dead(run: Run, order: Order, error: TrainyardError) -> None:
    """Write into the journal why a driver gives up, where its last workers died before they could, or could not know:
    as an attempt of its own, for only what has claimed a run writes its journal."""
    if isinstance(error, StorageLostError):  # what it says of the work that is saved elsewhere must not wait
        run = run.within(LAST_WORD_S)
    with suppress(BusyError, StorageLostError):  # then another has the run, or nobody can be told
        if run.exists():
            _say_for_the_dead(run, order, error)


def _say_for_the_dead(run: Run, order: Order, error: TrainyardError) -> None:
    state = run.journal.state()
    last, left = state.claim, state.leave
    if last is None or last.driver != order.driver or state.ended_at is not None:
        return
    status: Literal["interrupted", "failed"] = "interrupted" if isinstance(error, Interrupted) else "failed"
    if left is not None and left.status == status and (left.error or {}).get("type") in (None, type(error).__name__):
        return  # the workers have said so themselves
    whole = run.journal.claims([last.number])[0] or last
    attempt = claim(run, driver=order.driver, facts=whole.facts, dead=last.attempt)
    try:
        recorder = Recorder(attempt, keep=order.job.checkpoint.keep)
        recorder.leave(status, error, attempt.highest_step)
        recorder.close()
    finally:
        attempt.close()
