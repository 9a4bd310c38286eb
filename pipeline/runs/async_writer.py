"""The asynchronous writer of rank 0: it stores the values of the training thread from a background thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Literal

from pipeline.errors import NotFiniteError, StorageError, StorageLostError, TrainyardError
from pipeline.runs import local_fallback
from pipeline.runs.lease.attempt import Attempt
from pipeline.runs.lease.heartbeat import get_interval_s
from pipeline.runs.metric_log import live
from pipeline.runs.metric_log.segments import EvaluationRow, MetricSchema, SegmentLayout, StepBlock
from pipeline.runs.writer import RunWriter, Snapshot
from pipeline.watchdog import blocking_on

__all__ = ["AsyncRunWriter", "Snapshot", "finish_ended_run"]

COMMIT_INTERVAL_FACTOR = 100
"""Minimum time between commits that may wait, as a multiple of the last commit's cost: bookkeeping costs under 1 %."""
LIVE_INTERVAL_FACTOR = 20
"""Minimum time between two writes of the live rows, as a multiple of what the last one took."""
EXIT_ENTRY_LIMIT_S = 1.0
"""Seconds that an exit entry waits for storage that is already lost."""
MAX_BUFFERED_ROWS = 200_000
"""Buffered rows from which on a commit is necessary."""
MAX_BUFFERED_ROWS_DURING_COMMIT = 15 * MAX_BUFFERED_ROWS
"""Rows buffered in memory (some 300 MB) while a commit is in progress because storage is slow or unavailable. Beyond
that, training waits for the commit."""


class AsyncRunWriter:
    """Store the metrics and checkpoints of training in the background.

    Only `finish`, `write_exit`, and `commit` while another commit is in progress wait for storage. An error of the
    background thread is raised by the next `raise_if_failed`, `commit` or `finish`.

    While storage is unavailable, training continues: its rows and one snapshot are buffered. After storage has been
    unavailable for longer than its time limit, or has failed permanently (a revoked permission, a full disk), that
    snapshot is saved on this machine (see `local_fallback`), and `must_save_now` asks for a current one. `commit` then
    saves the current snapshot in its place and raises the error, which contains the folder.

    Between commits the writer replaces the live rows (see `live`): twice per heartbeat interval, once if storage is
    remote. Commits are as rare as the job configures, also at the start.

    Parameters
    ----------
    attempt: this process' claim on the run.
    keep: pairs of a checkpoint and its best to retain.
    metric_schema: the additional columns; default: those recorded when the run was created.
    """

    def __init__(self, attempt: Attempt, *, keep: int, metric_schema: MetricSchema | None = None) -> None:
        metadata = attempt.run.read_metadata()
        layout = SegmentLayout.from_metadata(metadata)
        run_schema = metric_schema if metric_schema is not None else MetricSchema.from_metadata(metadata)
        self._attempt = attempt
        self._writer = RunWriter(attempt, layout=layout, keep=keep, metric_schema=run_schema)
        self._live = live.LiveWriter(attempt.run, attempt.number, layout, run_schema)
        self._live_s = get_interval_s() / (1 if attempt.run.storage.backend.is_remote else 2)
        self._live_due = time.monotonic() + self._live_s
        self._blocks: list[StepBlock] = []
        self._evaluations: list[EvaluationRow] = []
        self._num_buffered = 0
        self._next_commit_time = 0.0
        self.last_commit_s = 0.0
        """Duration of the last commit, in seconds."""
        self._error: BaseException | None = None
        self._storage_failure: local_fallback.StorageFailure | None = None
        self._condition = threading.Condition()
        self._task: Callable[[], None] | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run_tasks, name="trainyard-recorder", daemon=True)
        self._thread.start()
        self._submit(self._resume)

    def log_steps(self, block: StepBlock) -> None:
        """Log a block of consecutive steps, one array per column: epoch, step, loss, correct, lr, samples, seconds,
        time (seconds since 1970), and the run's additional columns. The writer keeps the arrays."""
        self._blocks.append(block)
        self._live.log_steps(block)
        self._num_buffered += len(block["step"])

    def log_evaluation(self, row: EvaluationRow) -> None:
        """Log one evaluation of one split, at the last logged step."""
        self._evaluations.append(row)
        self._live.log_evaluation(row)

    def can_save_now(self, *, is_late: bool = False) -> bool:
        """Whether a commit now keeps the cost of bookkeeping within its limit: no commit is in progress, and enough
        time has passed since the last one. A commit that is late, by the progress that the user accepts to lose, only
        waits for the one in progress."""
        return self._task is None and (is_late or time.monotonic() >= self._next_commit_time)

    def must_save_now(self) -> bool:
        """Whether too many rows are buffered, or storage is lost and the current state must be saved locally."""
        limit = MAX_BUFFERED_ROWS if self._task is None else MAX_BUFFERED_ROWS_DURING_COMMIT
        return self._num_buffered >= limit or self._storage_failure is not None

    def commit(self, snapshot: Snapshot, on_committed: Callable[[float], None] | None = None) -> None:
        """Submit a snapshot, with all rows so far, and return. Waits for a commit that is in progress.

        Parameters
        ----------
        on_committed: receives the duration of the commit in seconds once it is durable; called by the background
            thread.

        Raises
        ------
        StorageLostError, StorageError: storage was lost; the snapshot is saved on this machine if that was possible.
        """
        blocks, evaluations = self._blocks, self._evaluations
        self._blocks, self._evaluations, self._num_buffered = [], [], 0

        def work() -> None:
            began = time.monotonic()
            self._run_or_save_locally(lambda: self._writer.commit(snapshot, blocks, evaluations))
            if snapshot.is_final:
                self._live.close()
            else:
                self._live.drop_published(self._writer.rows)
            ended = time.monotonic()
            self.last_commit_s = ended - began
            self._next_commit_time = ended + COMMIT_INTERVAL_FACTOR * self.last_commit_s
            if on_committed is not None:
                on_committed(self.last_commit_s)

        self._wait_until_idle()
        if self._storage_failure is not None:
            self._error = self._save_locally(self._storage_failure, snapshot, blocks, evaluations)
        self._submit(work)

    def raise_if_failed(self) -> None:
        """Raise the error of the background thread: SupersededError, NotFiniteError, ... Does not block. Loss of
        storage is raised by the next `commit`, after it has saved the current state."""
        if self._storage_failure is None:
            self._raise_error()

    def finish(self) -> None:
        """Wait until the last commit and everything that follows from it are done."""
        self._wait_until_idle()
        self._raise_error()

    def write_exit(self, status: Literal["interrupted", "failed"], error: BaseException | None, step: int) -> None:
        """Wait for the task in progress, then write to the journal why this attempt stops before the end.

        An exit entry that fails because of storage or a later attempt is skipped: the run's status is then stalled, or
        that of the later attempt.
        """
        self._wait_until_idle()
        if isinstance(self._error, StorageLostError):
            self._attempt.run = self._attempt.run.with_timeout(EXIT_ENTRY_LIMIT_S)
        blocks, evaluations = self._blocks, self._evaluations

        def work() -> None:
            self._writer.rows.add(blocks, evaluations)  # so that the entry can contain the nonfinite row
            self._writer.write_exit(status, error, step)
            if self._live.has_new_rows:  # they show what preceded the failure
                self._live.write()

        self._error = None
        self._submit(work)
        self._wait_until_idle()
        if self._error is not None and not isinstance(self._error, TrainyardError):
            raise self._error

    @blocking_on("storage")
    def close(self) -> None:
        """Finish the task in progress and stop the thread."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()
        self._thread.join()

    @blocking_on("storage")
    def _submit(self, task: Callable[[], None]) -> None:
        with self._condition:
            while self._task is not None:
                self._condition.wait()
            self._raise_error()
            self._task = task
            self._condition.notify_all()

    @blocking_on("storage")
    def _wait_until_idle(self) -> None:
        with self._condition:
            while self._task is not None:
                self._condition.wait()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _resume(self) -> None:
        self._run_or_save_locally(self._writer.resume)
        self._live.resume(self._writer.rows)

    def _run_or_save_locally(self, task: Callable[[], None]) -> None:
        """Run a task of the writer; if storage is lost, save its last snapshot on this machine."""
        try:
            task()
        except (StorageLostError, StorageError) as error:
            if not self._writer.has_resume_rows:
                raise
            self._storage_failure = error
            raise self._save_locally(error, None, [], []) from None

    def _save_locally(
        self,
        error: local_fallback.StorageFailure,
        snapshot: Snapshot | None,
        blocks: list[StepBlock],
        evaluations: list[EvaluationRow],
    ) -> BaseException:
        """Save a snapshot (None: that of the failed commit) on this machine, and return the error that reports it."""
        try:
            saved = self._writer.save_locally(snapshot, blocks, evaluations)
        except NotFiniteError as nonfinite:
            return nonfinite
        except (TrainyardError, OSError) as failure:
            # An earlier error reports an earlier save, which still exists.
            return self._error or local_fallback.with_local_copy(error, None, 0, failure)
        return error if saved is None else local_fallback.with_local_copy(error, *saved)

    def _run_tasks(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(
                    lambda: self._task or self._closed, max(0.0, self._live_due - time.monotonic())
                )
                task = self._task
                if task is None and self._closed:
                    return
            try:
                (task or self._write_live)()
            except BaseException as error:  # passed on to the training thread, whatever it is
                self._error = error
            if task is not None:
                with self._condition:
                    self._task = None
                    self._condition.notify_all()

    def _write_live(self) -> None:
        began = time.monotonic()
        self._live.write()
        ended = time.monotonic()
        self._live_due = ended + max(self._live_s, LIVE_INTERVAL_FACTOR * (ended - began))


def finish_ended_run(attempt: Attempt, keep: int = 1) -> None:
    """Complete and close an attempt that starts from a finished run: write missing segments, `result.json` and
    `run.json`, and apply retention.

    Parameters
    ----------
    keep: pairs to retain, if the final checkpoint was saved on this machine only and is committed now.
    """
    metadata: dict[str, Any] = attempt.run.read_metadata()
    try:
        layout, metric_schema = SegmentLayout.from_metadata(metadata), MetricSchema.from_metadata(metadata)
        writer = RunWriter(attempt, layout=layout, keep=keep, metric_schema=metric_schema)
        if attempt.local_checkpoint is not None:
            writer.resume()
        else:
            writer.finalize()
        live.remove_live_tables(attempt.run)
    finally:
        attempt.close()
