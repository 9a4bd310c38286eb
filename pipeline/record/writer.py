"""What one attempt writes, in the order that makes it durable. No threads here: see `recorder`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import NotFiniteError, TrainyardError
from pipeline.learn.words import divergence_advice
from pipeline.record import decisions, saving, spool
from pipeline.record.attempt import Attempt
from pipeline.record.cells import Cell, CellLayout, Columns, EvaluationRow, Rows, StepBlock, encode
from pipeline.record.drafts import Drafter, json_file, with_best_of
from pipeline.record.entries import BestSoFar, Commit, Leave, Pair
from pipeline.record.run import RESULT, Run
from pipeline.record.snapshot import Snapshot
from pipeline.record.standing import write_view
from pipeline.storage.faults import scrub

__all__ = ["EVALUATIONS", "STEPS", "Snapshot", "Writer"]

STEPS = "metrics/steps"
EVALUATIONS = "metrics/evals"


class Writer:
    """Writes commits and what follows from them.

    Parameters
    ----------
    layout: of the run's cells, as fixed at its birth.
    keep: pairs of a checkpoint and its best that stay.
    """

    def __init__(self, attempt: Attempt, *, layout: CellLayout, keep: int, columns: Columns) -> None:
        self.attempt = attempt
        self.rows = Rows(attempt.run.name, attempt.number, layout, columns)
        self._drafter = Drafter(attempt.run.name, attempt.number, self.rows)
        self._keep = keep
        self._best = attempt.base.best if attempt.base is not None else None
        self._last_good = attempt.base.name if attempt.base is not None else None
        self.has_rows = attempt.base is None and attempt.spooled is None
        """Whether the rows from which this attempt goes on are read."""
        self._under_way: Snapshot | None = None
        """What `commit` was given and has not made durable yet."""

    @property
    def _run(self) -> Run:
        return self.attempt.run

    def begin(self) -> None:
        """Take up the base's rows and publish the cells that it completes: its writer may have died before. What an
        earlier attempt saved on this machine becomes the first commit."""
        checkpoint = self.attempt.base
        if checkpoint is not None:
            with self.attempt.reading_base():
                rows = checkpoint.rows()
            self.rows.load(rows, checkpoint.first_cell, checkpoint.step)
            self.has_rows = self.attempt.spooled is None
            self._publish(checkpoint.step, end=checkpoint.end)
        write_view(self._run, self.attempt.state, "running")
        local_checkpoint = self.attempt.spooled
        if local_checkpoint is not None:
            self.rows.load(local_checkpoint.rows(), local_checkpoint.first_cell)
            self.has_rows = True
            self.commit(spool.snapshot_of(self._run, local_checkpoint), [], [])
            spool.forget(self._run)

    def commit(self, snapshot: Snapshot, blocks: Sequence[StepBlock], evaluations: Sequence[EvaluationRow]) -> None:
        """Make a checkpoint durable, with the rows since the last commit, and then what follows from it.

        Raises
        ------
        NotFiniteError: a loss or a weight is NaN or infinite; nothing is written.
        SupersededError: a later attempt has taken over; what was written does no harm.
        """
        self.rows.add(blocks, evaluations)
        self.rows.check(snapshot.step)
        self._check_finite(snapshot)
        self._under_way = snapshot
        name = decisions.checkpoint_name(snapshot.step, self.attempt.number)
        best = self._place_best(snapshot, name)
        if best is not None and self._is_apart(best, name):
            saving.write_checkpoint(self._run.storage, *self._drafter.best_draft(snapshot, best))
        saving.write_checkpoint(self._run.storage, *self._drafter.draft(snapshot, best, name))
        pair: Pair = (name, best.checkpoint if best is not None else None)
        commit = Commit(
            **self.attempt.common(),
            checkpoint=name,
            step=snapshot.step,
            epoch=snapshot.epoch,
            end=snapshot.end,
            kept=decisions.kept_after(self.attempt.kept, pair, self._keep),
            best=best,
            metrics=dict(snapshot.metrics),
            patience=snapshot.patience,
            skipped_updates=snapshot.skipped_updates,
        )
        self.attempt.append(commit)
        self.attempt.kept, self._best, self._last_good = commit.kept, best, name
        self._under_way = None
        self._follow(commit)

    def save_here(
        self, snapshot: Snapshot | None, blocks: Sequence[StepBlock], evaluations: Sequence[EvaluationRow]
    ) -> tuple[Path, int] | None:
        """Save a snapshot on this machine instead, with the rows since the last one, when storage is lost.

        Parameters
        ----------
        snapshot: None for that of the commit which failed.

        Returns
        -------
        The folder and the step; None where the commit that failed stands in the journal all the same.

        Raises
        ------
        NotFiniteError: a loss or a weight is NaN or infinite; nothing is written.
        TrainyardError, OSError: this machine cannot take it either.
        """
        failed = self._under_way
        self.rows.add(blocks, evaluations)
        snapshot = snapshot or failed
        if snapshot is None:
            return None
        self.rows.check(snapshot.step)
        self._check_finite(snapshot)
        if failed is not None:
            snapshot = with_best_of(failed, snapshot)
        name = decisions.checkpoint_name(snapshot.step, self.attempt.number)
        best = self._place_best(snapshot, name)
        best_files = self._drafter.best_draft(snapshot, best) if best is not None and self._is_apart(best, name) else None
        after = [self._last_good]
        if failed is not None:  # of an entry whose reply is missing nobody knows whether it arrived
            after.append(decisions.checkpoint_name(failed.step, self.attempt.number))
        draft, nonce, attempt = self._drafter.draft(snapshot, best, name), self.attempt.nonce, self.attempt.number
        return spool.save(self._run, snapshot, draft, best_files, after, nonce=nonce, attempt=attempt), snapshot.step

    def complete(self) -> None:
        """Do what is missing after an end: cells, result, retention, `run.json`. The base must be that end."""
        commit = self.attempt.state.commit
        checkpoint = self.attempt.base
        assert checkpoint is not None
        assert commit is not None
        assert checkpoint.end
        assert commit.checkpoint == checkpoint.name
        with self.attempt.reading_base():
            rows = checkpoint.rows()
        self.rows.load(rows, checkpoint.first_cell, checkpoint.step)
        self._follow(commit)

    def leave(self, status: Literal["interrupted", "failed"], error: BaseException | None, step: int) -> None:
        """Say why this attempt stops before the end.

        Raises
        ------
        SupersededError: a later attempt has taken over.
        """
        row = getattr(error, "row", None)
        if row is None and isinstance(error, NotFiniteError):
            row = self.rows.first_not_finite()
        leave = Leave(**self.attempt.common(), status=status, step=step, error=_error_facts(error), row=row)
        self.attempt.append(leave)
        write_view(self._run, self.attempt.state, status)

    def _follow(self, commit: Commit) -> None:
        """What follows from a commit, in this order; each can be repeated."""
        self._publish(commit.step, end=commit.end)
        if commit.end:
            self._run.storage.replace(RESULT, result_file(self._run.name, commit), sync=True)
        self._retain(commit)
        write_view(self._run, self.attempt.state, "finished" if commit.end else "running")

    def _publish(self, step: int, *, end: bool) -> None:
        """Write the cells that a commit at `step` completes. A reader that sees a cell's steps sees its evaluations."""
        for segment in self.rows.cells(step, end=end):
            self._write_cell(segment)
        if not end:
            self.rows.drop(step)

    def _write_cell(self, cell: Cell) -> None:
        storage = self._run.storage
        storage.replace(f"{EVALUATIONS}/{cell.name}", encode(cell.evaluations), sync=True)
        storage.replace(f"{STEPS}/{cell.name}", encode(cell.steps), sync=True)

    def _retain(self, commit: Commit) -> None:
        spare = decisions.spared(commit.kept, self.attempt.state)
        names = self._run.storage.list(saving.FOLDER)
        for name in decisions.doomed(names, attempt=self.attempt.number, step=commit.step, spare=spare):
            saving.delete_checkpoint(self._run.storage, name)

    def _place_best(self, snapshot: Snapshot, name: str) -> BestSoFar | None:
        """The best so far with the name of its directory."""
        best, committed_best = snapshot.best, self._best
        if best is None:
            return None
        if best.step == snapshot.step:
            return replace(best, checkpoint=name)
        if committed_best is not None and committed_best.step == best.step:
            return committed_best
        if snapshot.best_weights is None:
            raise ValueError(f"the weights of the best step {best.step} are neither given nor in a checkpoint")
        return replace(best, checkpoint=decisions.checkpoint_name(best.step, self.attempt.number))

    def _is_apart(self, best: BestSoFar, name: str) -> bool:
        """Whether the best has weights that lie nowhere yet and are not those of checkpoint `name`."""
        return best.checkpoint != name and best is not self._best

    def _check_finite(self, snapshot: Snapshot) -> None:
        row = self.rows.first_not_finite()
        if row is not None:
            split = f"{row['split']} " if row.get("split") else ""
            rate = f" (learning rate {row['lr']})" if row.get("lr") is not None else ""
            raise self._not_finite(f"the {split}loss is {row['loss']} at step {row['step']}{rate}", row)
        name = snapshot.not_finite()
        if name is not None:
            rate = f" (learning rate {self.rows.learning_rate()})"
            raise self._not_finite(f"the weights {name} are not finite at step {snapshot.step}{rate}", None)

    def _not_finite(self, what: str, row: dict[str, Any] | None) -> NotFiniteError:
        best, last = self._best, decisions.parse_checkpoint_name(self._last_good or "")
        fix = divergence_advice(
            self._run.name,
            best.step if best is not None else None,
            last[0] if last is not None else None,
            best.no_gain if best is not None else "",
        )
        error = NotFiniteError(what, where=self._run.url, fix=fix)
        error.__dict__["row"] = row
        return error


def result_file(run: str, commit: Commit) -> bytes:
    """`result.json`, as a function of the end's entry."""
    best = commit.best
    tree = {
        "run": run,
        "step": commit.step,
        "epoch": commit.epoch,
        "metrics": commit.metrics,
        "best": asdict(best) if best is not None else None,
        "chosen": best.checkpoint if best is not None else commit.checkpoint,
        "last": commit.checkpoint,
    }
    return json_file(tree)


def _error_facts(error: BaseException | None) -> dict[str, Any] | None:
    if error is None:
        return None
    what = error.what if isinstance(error, TrainyardError) else str(error)
    return {"type": type(error).__name__, "message": scrub(what)[:2000]}
