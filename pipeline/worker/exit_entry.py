"""The last word of an attempt that stops before the end, or of a driver whose workers died before they could say it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Literal

from pipeline.context import PeerFailure
from pipeline.errors import BusyError, Interrupted, StorageLostError, SupersededError, TrainyardError
from pipeline.runs.async_writer import EXIT_ENTRY_LIMIT_S, AsyncRunWriter
from pipeline.runs.lease.attempt import acquire_lease
from pipeline.runs.run import Run
from pipeline.worker.reporter import Rank0Reporter
from pipeline.worker.spec import WorkerSpec


@contextmanager
def record_exit(recorder: AsyncRunWriter, reporter: Rank0Reporter) -> Iterator[None]:
    """Write into the journal why an attempt leaves before the end."""
    try:
        yield
    except SupersededError:
        raise
    except Interrupted:
        recorder.write_exit("interrupted", None, reporter.step)
        raise
    except PeerFailure as error:  # the driver starts again, or says why not
        recorder.write_exit("interrupted", error, reporter.step)
        raise
    except Exception as error:
        recorder.write_exit("failed", error, reporter.step)
        raise


def record_driver_exit(run: Run, spec: WorkerSpec, error: TrainyardError) -> None:
    """Write into the journal why a driver gives up, where its last workers died before they could, or could not know:
    as an attempt of its own, for only what has claimed a run writes its journal."""
    if isinstance(error, StorageLostError):  # what it says of the work that is saved elsewhere must not wait
        run = run.with_timeout(EXIT_ENTRY_LIMIT_S)
    with suppress(BusyError, StorageLostError):  # then another has the run, or nobody can be told
        if run.exists():
            _record_driver_exit(run, spec, error)


def _record_driver_exit(run: Run, spec: WorkerSpec, error: TrainyardError) -> None:
    state = run.journal.read_state()
    last, left = state.claim, state.leave
    if last is None or last.driver != spec.driver or state.ended_at is not None:
        return
    status: Literal["interrupted", "failed"] = "interrupted" if isinstance(error, Interrupted) else "failed"
    if left is not None and left.status == status and (left.error or {}).get("type") in (None, type(error).__name__):
        return  # the workers have said so themselves
    whole = run.journal.read_claims([last.number])[0] or last
    attempt = acquire_lease(run, driver=spec.driver, metadata=whole.facts, known_dead_attempt=last.attempt)
    try:
        recorder = AsyncRunWriter(attempt, keep=spec.job.checkpoint.keep)
        recorder.write_exit(status, error, attempt.highest_step)
        recorder.close()
    finally:
        attempt.close()
