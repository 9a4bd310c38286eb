"""The recorder of rank 0: takes values from the training thread and makes them durable in a thread of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Literal

from pipeline.errors import StorageLostError, TrainyardError
from pipeline.record.attempt import Attempt
from pipeline.record.cells import Columns, EvaluationRow, StepBlock
from pipeline.record.writer import Snapshot, Writer

__all__ = ["Recorder", "Snapshot", "complete"]

REST = 100
"""After a commit, so many times its cost pass before the next that may wait: bookkeeping costs under 1 %."""
LAST_WORD_S = 1.0
"""How long a leave waits for storage that was lost already."""
MOST_ROWS = 200_000
"""So many rows in memory make a commit necessary."""


class Recorder:
    """Where training puts its values. No call waits for storage but `commit` while one is under way, `finish` and
    `leave`. What goes wrong in the background is raised by the next `check`, `commit` or `finish`.

    Parameters
    ----------
    attempt: this process' claim on the run.
    cell_steps: steps of a cell of the metric log, as fixed at the run's birth.
    keep: pairs of a checkpoint and its best that stay.
    columns: what is logged besides the usual; default: what the run's birth recorded.
    """

    def __init__(self, attempt: Attempt, *, cell_steps: int, keep: int, columns: Columns | None = None) -> None:
        chosen = columns if columns is not None else Columns.from_facts(attempt.run.facts())
        self._attempt = attempt
        self._writer = Writer(attempt, cell_steps=cell_steps, keep=keep, columns=chosen)
        self._blocks: list[StepBlock] = []
        self._evaluations: list[EvaluationRow] = []
        self._waiting = 0
        self._rest_until = 0.0
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._job: Callable[[], None] | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="trainyard-recorder", daemon=True)
        self._thread.start()
        self._hand_over(self._writer.begin)

    def steps(self, rows: StepBlock) -> None:
        """A block of consecutive steps, one array a column: epoch, step, loss, correct, lr, samples, seconds, time
        (seconds since 1970), and the run's own columns. The recorder keeps the arrays."""
        self._blocks.append(rows)
        self._waiting += len(rows["step"])

    def evaluation(self, row: EvaluationRow) -> None:
        """One evaluation of one split, at the step of the last row of steps."""
        self._evaluations.append(row)

    def may_commit(self) -> bool:
        """Whether a commit now keeps bookkeeping under its share: none is under way, and the last one's cost has long
        passed."""
        return self._job is None and time.monotonic() >= self._rest_until

    def must_commit(self) -> bool:
        """Whether too many rows wait in memory."""
        return self._waiting >= MOST_ROWS

    def commit(self, snapshot: Snapshot) -> None:
        """Hand over a snapshot, with all rows so far, and return. Waits for a commit that is under way."""
        blocks, evaluations = self._blocks, self._evaluations
        self._blocks, self._evaluations, self._waiting = [], [], 0

        def work() -> None:
            began = time.monotonic()
            self._writer.commit(snapshot, blocks, evaluations)
            ended = time.monotonic()
            self._rest_until = ended + REST * (ended - began)

        self._hand_over(work)

    def check(self) -> None:
        """Raise what the background met: SupersededError, StorageLostError, NotFiniteError. Costs nothing."""
        if self._error is not None:
            raise self._error

    def finish(self) -> None:
        """Wait until the end and all that follows from it are done."""
        self._wait()
        self.check()

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

        self._error = None
        self._hand_over(work)
        self._wait()
        if self._error is not None and not isinstance(self._error, TrainyardError):
            raise self._error

    def close(self) -> None:
        """Stop the thread, after what is under way."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _hand_over(self, job: Callable[[], None]) -> None:
        with self._changed:
            while self._job is not None:
                self._changed.wait()
            self.check()
            self._job = job
            self._changed.notify_all()

    def _wait(self) -> None:
        with self._changed:
            while self._job is not None:
                self._changed.wait()

    def _work(self) -> None:
        while True:
            with self._changed:
                while self._job is None and not self._closed:
                    self._changed.wait()
                if self._job is None:
                    return
                job = self._job
            try:
                job()
            except BaseException as error:  # handed to the training thread, whatever it is
                self._error = error
            with self._changed:
                self._job = None
                self._changed.notify_all()


def complete(attempt: Attempt) -> None:
    """For an attempt based on an end: do what is missing of cells, result, retention and `run.json`, and close it."""
    facts: dict[str, Any] = attempt.run.facts()
    try:
        Writer(attempt, cell_steps=facts["cell_steps"], keep=1, columns=Columns.from_facts(facts)).complete()
    finally:
        attempt.close()
