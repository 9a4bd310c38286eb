"""Write the files of one attempt, in the order that makes them durable. Synchronous: see `async_writer`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import NotFiniteError, TrainyardError
from pipeline.format_metrics import format_divergence_advice
from pipeline.redaction import redact
from pipeline.runs import local_fallback
from pipeline.runs.checkpoints import format as checkpoint_format
from pipeline.runs.checkpoints.snapshot import CheckpointFilesBuilder, Snapshot, adopt_best_weights, encode_json_file
from pipeline.runs.journal import decisions
from pipeline.runs.journal.entries import BestCheckpoint, CheckpointPair, Commit, Exit
from pipeline.runs.lease.attempt import Attempt
from pipeline.runs.metric_log.segments import (
    EvaluationRow,
    MetricSchema,
    PendingRows,
    Segment,
    SegmentLayout,
    StepBlock,
    encode_table,
)
from pipeline.runs.run import RESULT_FILE, Run
from pipeline.runs.status import write_summary

__all__ = ["EVALUATIONS_FOLDER", "STEPS_FOLDER", "Snapshot", "RunWriter"]

STEPS_FOLDER = "metrics/steps"
EVALUATIONS_FOLDER = "metrics/evals"


class RunWriter:
    """Write commits and the files that follow from them.

    Parameters
    ----------
    layout: of the run's segments, as fixed when it was created.
    keep: pairs of a checkpoint and its best to retain.
    """

    def __init__(self, attempt: Attempt, *, layout: SegmentLayout, keep: int, metric_schema: MetricSchema) -> None:
        self.attempt = attempt
        self.rows = PendingRows(attempt.run.name, attempt.number, layout, metric_schema)
        self._builder = CheckpointFilesBuilder(attempt.run.name, attempt.number, self.rows)
        self._keep = keep
        self._best = attempt.resume_checkpoint.best if attempt.resume_checkpoint is not None else None
        self._last_committed = attempt.resume_checkpoint.name if attempt.resume_checkpoint is not None else None
        self.has_resume_rows = attempt.resume_checkpoint is None and attempt.local_checkpoint is None
        """Whether the rows from which this attempt continues are loaded."""
        self._pending_snapshot: Snapshot | None = None
        """The snapshot that `commit` was given and has not stored yet."""

    @property
    def _run(self) -> Run:
        return self.attempt.run

    def resume(self) -> None:
        """Load the rows of the checkpoint to resume from, and publish the segments that it completes: its writer may
        have failed before it did. A checkpoint that an earlier attempt saved on this machine becomes the first
        commit."""
        checkpoint = self.attempt.resume_checkpoint
        if checkpoint is not None:
            with self.attempt.reading_resume_checkpoint():
                rows = checkpoint.read_rows()
            self.rows.load(rows, checkpoint.first_segment, checkpoint.step)
            self.has_resume_rows = self.attempt.local_checkpoint is None
            self._publish_segments(checkpoint.step, is_final=checkpoint.is_final)
        write_summary(self._run, self.attempt.state, "running")
        local_checkpoint = self.attempt.local_checkpoint
        if local_checkpoint is not None:
            self.rows.load(local_checkpoint.read_rows(), local_checkpoint.first_segment)
            self.has_resume_rows = True
            self.commit(local_fallback.load_snapshot(self._run, local_checkpoint), [], [])
            local_fallback.delete_local(self._run)

    def commit(self, snapshot: Snapshot, blocks: Sequence[StepBlock], evaluations: Sequence[EvaluationRow]) -> None:
        """Store a checkpoint with the rows since the last commit, then the files that follow from it.

        Raises
        ------
        NotFiniteError: a loss or a weight is NaN or infinite; nothing is written.
        SupersededError: a later attempt has taken over; the files written so far have no effect.
        """
        self.rows.add(blocks, evaluations)
        self.rows.check_contiguous(snapshot.step)
        self._check_finite(snapshot)
        self._pending_snapshot = snapshot
        name = decisions.format_checkpoint_name(snapshot.step, self.attempt.number)
        best = self._locate_best(snapshot, name)
        if best is not None and self._needs_separate_checkpoint(best, name):
            checkpoint_format.write_checkpoint(self._run.storage, *self._builder.build_best(snapshot, best))
        checkpoint_format.write_checkpoint(self._run.storage, *self._builder.build(snapshot, best, name))
        pair: CheckpointPair = (name, best.checkpoint if best is not None else None)
        commit = Commit(
            **self.attempt.next_entry_fields(),
            checkpoint=name,
            step=snapshot.step,
            epoch=snapshot.epoch,
            end=snapshot.is_final,
            kept=decisions.retained_after(self.attempt.retained, pair, self._keep),
            best=best,
            metrics=dict(snapshot.metrics),
            patience=snapshot.evaluations_since_best,
            skipped_updates=snapshot.skipped_updates,
        )
        self.attempt.append(commit)
        self.attempt.retained, self._best, self._last_committed = commit.kept, best, name
        self._pending_snapshot = None
        self._after_commit(commit)

    def save_locally(
        self, snapshot: Snapshot | None, blocks: Sequence[StepBlock], evaluations: Sequence[EvaluationRow]
    ) -> tuple[Path, int] | None:
        """Save a snapshot on this machine instead, with the rows since the last one, when storage is lost.

        Parameters
        ----------
        snapshot: None for that of the failed commit.

        Returns
        -------
        The folder and the step; None if the failed commit is in the journal after all.

        Raises
        ------
        NotFiniteError: a loss or a weight is NaN or infinite; nothing is written.
        TrainyardError, OSError: it cannot be saved on this machine either.
        """
        failed = self._pending_snapshot
        self.rows.add(blocks, evaluations)
        snapshot = snapshot or failed
        if snapshot is None:
            return None
        self.rows.check_contiguous(snapshot.step)
        self._check_finite(snapshot)
        if failed is not None:
            snapshot = adopt_best_weights(failed, snapshot)
        name = decisions.format_checkpoint_name(snapshot.step, self.attempt.number)
        best = self._locate_best(snapshot, name)
        best_files = (
            self._builder.build_best(snapshot, best)
            if best is not None and self._needs_separate_checkpoint(best, name)
            else None
        )
        allowed_heads = [self._last_committed]
        if failed is not None:  # without a reply it is unknown whether the entry was stored
            allowed_heads.append(decisions.format_checkpoint_name(failed.step, self.attempt.number))
        files, nonce, attempt = self._builder.build(snapshot, best, name), self.attempt.nonce, self.attempt.number
        folder = local_fallback.save_locally(
            self._run, snapshot, files, best_files, allowed_heads, nonce=nonce, attempt=attempt
        )
        return folder, snapshot.step

    def finalize(self) -> None:
        """Write what is missing after the final commit: segments, `result.json`, `run.json`; apply retention.

        The checkpoint to resume from must be that of the commit.
        """
        commit = self.attempt.state.commit
        checkpoint = self.attempt.resume_checkpoint
        assert checkpoint is not None
        assert commit is not None
        assert checkpoint.is_final
        assert commit.checkpoint == checkpoint.name
        with self.attempt.reading_resume_checkpoint():
            rows = checkpoint.read_rows()
        self.rows.load(rows, checkpoint.first_segment, checkpoint.step)
        self._after_commit(commit)

    def write_exit(self, status: Literal["interrupted", "failed"], error: BaseException | None, step: int) -> None:
        """Write to the journal why this attempt stops before the end.

        Raises
        ------
        SupersededError: a later attempt has taken over.
        """
        row = getattr(error, "row", None)
        if row is None and isinstance(error, NotFiniteError):
            row = self.rows.find_nonfinite_row()
        exit_entry = Exit(
            **self.attempt.next_entry_fields(), status=status, step=step, error=_error_to_json(error), row=row
        )
        self.attempt.append(exit_entry)
        write_summary(self._run, self.attempt.state, status)

    def _after_commit(self, commit: Commit) -> None:
        """Do what follows from a commit, in this order; each operation can be repeated."""
        self._publish_segments(commit.step, is_final=commit.end)
        if commit.end:
            self._run.storage.replace(RESULT_FILE, encode_result(self._run.name, commit), sync=True)
        self._apply_retention(commit)
        write_summary(self._run, self.attempt.state, "finished" if commit.end else "running")

    def _publish_segments(self, step: int, *, is_final: bool) -> None:
        """Write the segments that a commit at `step` completes. A reader that sees the steps of a segment also sees its
        evaluations."""
        for segment in self.rows.iter_segments(step, is_final=is_final):
            self._write_segment(segment)
        if not is_final:
            self.rows.drop_published(step)

    def _write_segment(self, segment: Segment) -> None:
        storage = self._run.storage
        storage.replace(f"{EVALUATIONS_FOLDER}/{segment.file_name}", encode_table(segment.evaluations), sync=True)
        storage.replace(f"{STEPS_FOLDER}/{segment.file_name}", encode_table(segment.steps), sync=True)

    def _apply_retention(self, commit: Commit) -> None:
        protected = decisions.checkpoints_to_keep(commit.kept, self.attempt.state)
        names = self._run.storage.list(checkpoint_format.CHECKPOINTS_FOLDER)
        for name in decisions.checkpoints_to_delete(
            names, attempt=self.attempt.number, step=commit.step, protected=protected
        ):
            checkpoint_format.delete_checkpoint(self._run.storage, name)

    def _locate_best(self, snapshot: Snapshot, name: str) -> BestCheckpoint | None:
        """Return the best evaluation so far with the name of its checkpoint."""
        best, committed_best = snapshot.best, self._best
        if best is None:
            return None
        if best.step == snapshot.step:
            return replace(best, checkpoint=name)
        if committed_best is not None and committed_best.step == best.step:
            return committed_best
        if snapshot.best_weights is None:
            raise ValueError(f"the weights of the best step {best.step} are neither given nor in a checkpoint")
        return replace(best, checkpoint=decisions.format_checkpoint_name(best.step, self.attempt.number))

    def _needs_separate_checkpoint(self, best: BestCheckpoint, name: str) -> bool:
        """Whether the weights of the best are not stored yet and are not those of checkpoint `name`."""
        return best.checkpoint != name and best is not self._best

    def _check_finite(self, snapshot: Snapshot) -> None:
        row = self.rows.find_nonfinite_row()
        if row is not None:
            split = f"{row['split']} " if row.get("split") else ""
            rate = f" (learning rate {row['lr']})" if row.get("lr") is not None else ""
            raise self._nonfinite_error(f"the {split}loss is {row['loss']} at step {row['step']}{rate}", row)
        name = snapshot.find_nonfinite_tensor()
        if name is not None:
            rate = f" (learning rate {self.rows.last_learning_rate()})"
            raise self._nonfinite_error(f"the weights {name} are not finite at step {snapshot.step}{rate}", None)

    def _nonfinite_error(self, what: str, row: dict[str, Any] | None) -> NotFiniteError:
        best, last = self._best, decisions.parse_checkpoint_name(self._last_committed or "")
        fix = format_divergence_advice(
            self._run.name,
            best.step if best is not None else None,
            last[0] if last is not None else None,
            best.no_improvement_message if best is not None else "",
        )
        error = NotFiniteError(what, where=self._run.url, fix=fix)
        error.__dict__["row"] = row
        return error


def encode_result(run: str, commit: Commit) -> bytes:
    """Return `result.json` as a function of the final commit."""
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
    return encode_json_file(tree)


def _error_to_json(error: BaseException | None) -> dict[str, Any] | None:
    if error is None:
        return None
    what = error.what if isinstance(error, TrainyardError) else str(error)
    return {"type": type(error).__name__, "message": redact(what)[:2000]}
