"""The recorder of rank 0: takes values from the training thread and makes them durable in a thread of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Literal

from pipeline.errors import NotFiniteError, StorageError, StorageLostError, TrainyardError
from pipeline.record import live, spool
from pipeline.record.attempt import Attempt
from pipeline.record.cells import CellLayout, Columns, EvaluationRow, StepBlock
from pipeline.record.heartbeat import interval
from pipeline.record.writer import Snapshot, Writer
from pipeline.watchdog import waits_for

__all__ = ["Recorder", "Snapshot", "complete"]

REST = 100
"""After a commit, so many times its cost pass before the next that may wait: bookkeeping costs under 1 %."""
LIVE_REST = 20
"""After the live rows were replaced, so many times what that took pass before they are again."""
LAST_WORD_S = 1.0
"""How long a leave waits for storage that was lost already."""
MOST_ROWS = 200_000
"""So many rows in memory make a commit necessary."""
MOST_WAITING = 15 * MOST_ROWS
"""So many wait in memory (some 300 MB) while a commit is under way, because storage is slow or away; then training
waits for it."""


class Recorder:
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

    def __init__(self, attempt: Attempt, *, keep: int, columns: Columns | None = None) -> None:
        metadata = attempt.run.facts()
        layout, run_schema = CellLayout.from_facts(metadata), columns if columns is not None else Columns.from_facts(metadata)
        self._attempt = attempt
        self._writer = Writer(attempt, layout=layout, keep=keep, columns=run_schema)
        self._live = live.LiveWriter(attempt.run, attempt.number, layout, run_schema)
        self._live_s = interval() / (1 if attempt.run.storage.backend.far else 2)
        self._live_due = time.monotonic() + self._live_s
        self._blocks: list[StepBlock] = []
        self._evaluations: list[EvaluationRow] = []
        self._waiting = 0
        self._rest_until = 0.0
        self.commit_s = 0.0
        """Seconds that the last commit took."""
        self._error: BaseException | None = None
        self._lost: spool.Lost | None = None
        self._changed = threading.Condition()
        self._job: Callable[[], None] | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="trainyard-recorder", daemon=True)
        self._thread.start()
        self._hand_over(self._begin)

    def steps(self, rows: StepBlock) -> None:
        """A block of consecutive steps, one array a column: epoch, step, loss, correct, lr, samples, seconds, time
        (seconds since 1970), and the run's own columns. The recorder keeps the arrays."""
        self._blocks.append(rows)
        self._live.steps(rows)
        self._waiting += len(rows["step"])

    def evaluation(self, row: EvaluationRow) -> None:
        """One evaluation of one split, at the step of the last row of steps."""
        self._evaluations.append(row)
        self._live.evaluation(row)

    def may_commit(self, *, is_late: bool = False) -> bool:
        """Whether a commit now keeps bookkeeping under its share: none is under way, and the last one's cost has long
        passed. One that is late, by what the user allows to be lost, waits for the one under way alone."""
        return self._job is None and (is_late or time.monotonic() >= self._rest_until)

    def must_commit(self) -> bool:
        """Whether too many rows wait in memory, or storage is lost and the present has to be saved here."""
        limit = MOST_ROWS if self._job is None else MOST_WAITING
        return self._waiting >= limit or self._lost is not None

    def commit(self, snapshot: Snapshot, done: Callable[[float], None] | None = None) -> None:
        """Hand over a snapshot, with all rows so far, and return. Waits for a commit that is under way.

        done: takes the seconds that the commit took, once it is durable; called by the recorder's thread.

        Raises
        ------
        StorageLostError, StorageError: storage was lost; the snapshot is saved on this machine, where that was
            possible.
        """
        blocks, evaluations = self._blocks, self._evaluations
        self._blocks, self._evaluations, self._waiting = [], [], 0

        def work() -> None:
            began = time.monotonic()
            self._unless_lost(lambda: self._writer.commit(snapshot, blocks, evaluations))
            if snapshot.end:
                self._live.close()
            else:
                self._live.drop(self._writer.rows)
            ended = time.monotonic()
            self.commit_s = ended - began
            self._rest_until = ended + REST * self.commit_s
            if done is not None:
                done(self.commit_s)

        self._wait()
        if self._lost is not None:
            self._error = self._saved_here(self._lost, snapshot, blocks, evaluations)
        self._hand_over(work)

    def check(self) -> None:
        """Raise what the background met: SupersededError, NotFiniteError, ... Costs nothing. A lost storage is for the
        next `commit` to raise, once it has saved the present."""
        if self._lost is None:
            self._raise()

    def finish(self) -> None:
        """Wait until the end and all that follows from it are done."""
        self._wait()
        self._raise()

    def leave(self, status: Literal["interrupted", "failed"], error: BaseException | None, step: int) -> None:
        """Wait for what is under way, then write into the journal why this attempt stops before the end.

        A leave that storage or a later attempt refuses is given up: the run then shows as stalled, or as the other's.
        """
        self._wait()
        if isinstance(self._error, StorageLostError):
            self._attempt.run = self._attempt.run.within(LAST_WORD_S)
        blocks, evaluations = self._blocks, self._evaluations

        def work() -> None:
            self._writer.rows.add(blocks, evaluations)  # for the row that was not finite
            self._writer.leave(status, error, step)
            if self._live.has_new_rows:  # they tell how it came to this
                self._live.write()

        self._error = None
        self._hand_over(work)
        self._wait()
        if self._error is not None and not isinstance(self._error, TrainyardError):
            raise self._error

    @waits_for("storage")
    def close(self) -> None:
        """Stop the thread, after what is under way."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    @waits_for("storage")
    def _hand_over(self, job: Callable[[], None]) -> None:
        with self._changed:
            while self._job is not None:
                self._changed.wait()
            self._raise()
            self._job = job
            self._changed.notify_all()

    @waits_for("storage")
    def _wait(self) -> None:
        with self._changed:
            while self._job is not None:
                self._changed.wait()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _begin(self) -> None:
        self._unless_lost(self._writer.begin)
        self._live.begin(self._writer.rows)

    def _unless_lost(self, job: Callable[[], None]) -> None:
        """What the writer does; where storage is lost, its last snapshot is saved on this machine."""
        try:
            job()
        except (StorageLostError, StorageError) as error:
            if not self._writer.has_rows:
                raise
            self._lost = error
            raise self._saved_here(error, None, [], []) from None

    def _saved_here(
        self,
        error: spool.Lost,
        snapshot: Snapshot | None,
        blocks: list[StepBlock],
        evaluations: list[EvaluationRow],
    ) -> BaseException:
        """Save a snapshot (None: that of the commit which failed) on this machine; the error that says so."""
        try:
            saved = self._writer.save_here(snapshot, blocks, evaluations)
        except NotFiniteError as worse:
            return worse
        except (TrainyardError, OSError) as failure:
            return self._error or spool.lost(error, None, 0, failure)  # what was saved before is still there
        return error if saved is None else spool.lost(error, *saved)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._job or self._closed, max(0.0, self._live_due - time.monotonic()))
                job = self._job
                if job is None and self._closed:
                    return
            try:
                (job or self._write_live)()
            except BaseException as error:  # handed to the training thread, whatever it is
                self._error = error
            if job is not None:
                with self._changed:
                    self._job = None
                    self._changed.notify_all()

    def _write_live(self) -> None:
        began = time.monotonic()
        self._live.write()
        ended = time.monotonic()
        self._live_due = ended + max(self._live_s, LIVE_REST * (ended - began))


def complete(attempt: Attempt, keep: int = 1) -> None:
    """For an attempt that begins at an end: do what is missing of cells, result, retention and `run.json`, and close
    it. `keep`: pairs that stay, where that end was saved on this machine only and is committed now."""
    metadata: dict[str, Any] = attempt.run.facts()
    try:
        layout, metric_schema = CellLayout.from_facts(metadata), Columns.from_facts(metadata)
        writer = Writer(attempt, layout=layout, keep=keep, columns=metric_schema)
        if attempt.spooled is not None:
            writer.begin()
        else:
            writer.complete()
        live.remove(attempt.run)
    finally:
        attempt.close()
