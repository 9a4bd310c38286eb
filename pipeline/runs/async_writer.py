"""The recorder of rank 0: takes values from the training thread and makes them durable in a thread of its own."""

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
"""After a commit, so many times its cost pass before the next that may wait: bookkeeping costs under 1 %."""
LIVE_INTERVAL_FACTOR = 20
"""After the live rows were replaced, so many times what that took pass before they are again."""
EXIT_ENTRY_LIMIT_S = 1.0
"""How long a leave waits for storage that was lost already."""
MAX_BUFFERED_ROWS = 200_000
"""So many rows in memory make a commit necessary."""
MAX_BUFFERED_ROWS_DURING_COMMIT = 15 * MAX_BUFFERED_ROWS
"""So many wait in memory (some 300 MB) while a commit is under way, because storage is slow or away; then training
waits for it."""


class AsyncRunWriter:
    """Where training puts its values. No call waits for storage but `commit` while one is under way, `finish` and
    `leave`. What goes wrong in the background is raised by the next `check`, `commit` or `finish`.

    While storage is away, training goes on: its rows and one snapshot wait. When it has been away for longer than its
    limit, or refuses for good (a right that was taken away, a full disk), that snapshot is saved on this machine (see
    `spool`), `must_commit` asks for one of the present, and `commit` saves that in its place and raises the error,
    which says where it lies.

    Between commits it replaces the live rows (see `live`): twice in a heartbeat's interval, once where storage is far.
    Commits stay as rare as the job wants them, also at the start.

    Parameters
    ----------
    attempt: this process' claim on the run.
    keep: pairs of a checkpoint and its best that stay.
    columns: what is logged besides the usual; default: what the run's birth recorded.
    """

    def __init__(self, attempt: Attempt, *, keep: int, metric_schema: MetricSchema | None = None) -> None:
        metadata = attempt.run.read_metadata()
        layout, run_schema = (
            SegmentLayout.from_metadata(metadata),
            metric_schema if metric_schema is not None else MetricSchema.from_metadata(metadata),
        )
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
        """Seconds that the last commit took."""
        self._error: BaseException | None = None
        self._storage_failure: local_fallback.StorageFailure | None = None
        self._condition = threading.Condition()
        self._task: Callable[[], None] | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run_tasks, name="trainyard-recorder", daemon=True)
        self._thread.start()
        self._submit(self._resume)

    def log_steps(self, block: StepBlock) -> None:
        """A block of consecutive steps, one array a column: epoch, step, loss, correct, lr, samples, seconds, time
        (seconds since 1970), and the run's own columns. The recorder keeps the arrays."""
        self._blocks.append(block)
        self._live.log_steps(block)
        self._num_buffered += len(block["step"])

    def log_evaluation(self, row: EvaluationRow) -> None:
        """One evaluation of one split, at the step of the last row of steps."""
        self._evaluations.append(row)
        self._live.log_evaluation(row)

    def can_save_now(self, *, is_late: bool = False) -> bool:
        """Whether a commit now keeps bookkeeping under its share: none is under way, and the last one's cost has long
        passed. One that is late, by what the user allows to be lost, waits for the one under way alone."""
        return self._task is None and (is_late or time.monotonic() >= self._next_commit_time)

    def must_save_now(self) -> bool:
        """Whether too many rows wait in memory, or storage is lost and the present has to be saved here."""
        limit = MAX_BUFFERED_ROWS if self._task is None else MAX_BUFFERED_ROWS_DURING_COMMIT
        return self._num_buffered >= limit or self._storage_failure is not None

    def commit(self, snapshot: Snapshot, on_committed: Callable[[float], None] | None = None) -> None:
        """Hand over a snapshot, with all rows so far, and return. Waits for a commit that is under way.

        done: takes the seconds that the commit took, once it is durable; called by the recorder's thread.

        Raises
        ------
        StorageLostError, StorageError: storage was lost; the snapshot is saved on this machine, where that was
            possible.
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
        """Raise what the background met: SupersededError, NotFiniteError, ... Costs nothing. A lost storage is for the
        next `commit` to raise, once it has saved the present."""
        if self._storage_failure is None:
            self._raise_error()

    def finish(self) -> None:
        """Wait until the end and all that follows from it are done."""
        self._wait_until_idle()
        self._raise_error()

    def write_exit(self, status: Literal["interrupted", "failed"], error: BaseException | None, step: int) -> None:
        """Wait for what is under way, then write into the journal why this attempt stops before the end.

        A leave that storage or a later attempt refuses is given up: the run then shows as stalled, or as the other's.
        """
        self._wait_until_idle()
        if isinstance(self._error, StorageLostError):
            self._attempt.run = self._attempt.run.with_timeout(EXIT_ENTRY_LIMIT_S)
        blocks, evaluations = self._blocks, self._evaluations

        def work() -> None:
            self._writer.rows.add(blocks, evaluations)  # for the row that was not finite
            self._writer.write_exit(status, error, step)
            if self._live.has_new_rows:  # they tell how it came to this
                self._live.write()

        self._error = None
        self._submit(work)
        self._wait_until_idle()
        if self._error is not None and not isinstance(self._error, TrainyardError):
            raise self._error

    @blocking_on("storage")
    def close(self) -> None:
        """Stop the thread, after what is under way."""
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
        """What the writer does; where storage is lost, its last snapshot is saved on this machine."""
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
        """Save a snapshot (None: that of the commit which failed) on this machine; the error that says so."""
        try:
            saved = self._writer.save_locally(snapshot, blocks, evaluations)
        except NotFiniteError as worse:
            return worse
        except (TrainyardError, OSError) as failure:
            return self._error or local_fallback.with_local_copy(
                error, None, 0, failure
            )  # what was saved before is still there
        return error if saved is None else local_fallback.with_local_copy(error, *saved)

    def _run_tasks(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(
                    lambda: self._task or self._closed, max(0.0, self._live_due - time.monotonic())
                )
                job = self._task
                if job is None and self._closed:
                    return
            try:
                (job or self._write_live)()
            except BaseException as error:  # handed to the training thread, whatever it is
                self._error = error
            if job is not None:
                with self._condition:
                    self._task = None
                    self._condition.notify_all()

    def _write_live(self) -> None:
        began = time.monotonic()
        self._live.write()
        ended = time.monotonic()
        self._live_due = ended + max(self._live_s, LIVE_INTERVAL_FACTOR * (ended - began))


def finish_ended_run(attempt: Attempt, keep: int = 1) -> None:
    """For an attempt that begins at an end: do what is missing of cells, result, retention and `run.json`, and close
    it. `keep`: pairs that stay, where that end was saved on this machine only and is committed now."""
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
