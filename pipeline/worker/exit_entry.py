"""The journal entry of an attempt that stops before the end, written by rank 0 or else by the driver."""

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
def record_exit(writer: AsyncRunWriter, reporter: Rank0Reporter) -> Iterator[None]:
    """While entered, an error that leaves the context is written into the journal as the reason of the exit."""
    try:
        yield
    except SupersededError:
        raise
    except Interrupted:
        writer.write_exit("interrupted", None, reporter.step)
        raise
    except PeerFailure as error:  # the driver starts another attempt, or records the cause
        writer.write_exit("interrupted", error, reporter.step)
        raise
    except Exception as error:
        writer.write_exit("failed", error, reporter.step)
        raise


def record_driver_exit(run: Run, spec: WorkerSpec, error: TrainyardError) -> None:
    """Write into the journal why a driver gives up, where its last workers exited before they could write it, or did
    not have the reason. The driver claims an attempt for this: only the holder of the lease writes the journal."""
    if isinstance(error, StorageLostError):  # the message names the locally saved checkpoint: do not delay it
        run = run.with_timeout(EXIT_ENTRY_LIMIT_S)
    with suppress(BusyError, StorageLostError):  # another process has claimed the run, or the journal cannot be written
        if run.exists():
            _record_driver_exit(run, spec, error)


def _record_driver_exit(run: Run, spec: WorkerSpec, error: TrainyardError) -> None:
    state = run.journal.read_state()
    claim, leave = state.claim, state.leave
    if claim is None or claim.driver != spec.driver or state.ended_at is not None:
        return
    status: Literal["interrupted", "failed"] = "interrupted" if isinstance(error, Interrupted) else "failed"
    if leave is not None and leave.status == status and (leave.error or {}).get("type") in (None, type(error).__name__):
        return  # the workers have written the same reason
    full_claim = run.journal.read_claims([claim.number])[0] or claim
    attempt = acquire_lease(run, driver=spec.driver, metadata=full_claim.facts, known_dead_attempt=claim.attempt)
    try:
        writer = AsyncRunWriter(attempt, keep=spec.job.checkpoint.keep)
        writer.write_exit(status, error, attempt.highest_step)
        writer.close()
    finally:
        attempt.close()
