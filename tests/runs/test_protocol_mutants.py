"""The searches of `test_protocol` find a violation in every mutant, which leaves out one clause of the protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from pipeline.runs.checkpoints import format as checkpoint_format
from pipeline.runs.checkpoints.checkpoint import Checkpoint, DamagedError
from pipeline.runs.journal import decisions
from pipeline.runs.journal.entries import Claim, Commit, JournalEntry, JournalState
from pipeline.runs.journal.journal import Journal
from pipeline.runs.lease.attempt import Attempt, append_claim, select_resume_checkpoint
from pipeline.runs.metric_log.live import LiveWriter
from pipeline.runs.metric_log.segments import (
    EvaluationRow,
    MetricSchema,
    PendingRows,
    Segment,
    SegmentLayout,
    StepBlock,
    encode_table,
)
from pipeline.runs.run import Run
from pipeline.runs.writer import EVALUATIONS_FOLDER, STEPS_FOLDER, RunWriter, Snapshot
from pipeline.storage import retry
from tests.runs.fault_sweep import fault_cases
from tests.runs.simulated_writers import KEEP_CHECKPOINTS, SEGMENT_LAYOUT, ReferenceProtocol
from tests.runs.state_machine import ProtocolStateMachine


class WriterMutant(ReferenceProtocol):
    """A protocol with another writer class."""

    writer_type: type[RunWriter]

    def make_writer(self, attempt: Attempt) -> RunWriter:
        return self.writer_type(attempt, layout=SEGMENT_LAYOUT, keep=KEEP_CHECKPOINTS, metric_schema=MetricSchema())


def _with_writer(writer: type[RunWriter]) -> ReferenceProtocol:
    mutant = WriterMutant()
    mutant.writer_type = writer
    return mutant


class SegmentsBeforeCommit(RunWriter):
    def _check_finite(self, snapshot: Snapshot) -> None:
        for segment in self.rows.iter_segments(snapshot.step, is_final=snapshot.is_final):
            self._write_segment(segment)


class StepsBeforeEvaluations(RunWriter):
    def _write_segment(self, segment: Segment) -> None:
        self._run.storage.replace(f"{STEPS_FOLDER}/{segment.file_name}", encode_table(segment.steps))
        self._run.storage.replace(f"{EVALUATIONS_FOLDER}/{segment.file_name}", encode_table(segment.evaluations))


class FixedSizeSegments(RunWriter):
    """Segments as an earlier version would write them."""

    def __init__(self, attempt: Attempt, *, layout: SegmentLayout, keep: int, metric_schema: MetricSchema) -> None:
        super().__init__(
            attempt,
            layout=SegmentLayout(layout.max_segment_steps, layout.max_segment_steps),
            keep=keep,
            metric_schema=metric_schema,
        )


class SegmentsInDescendingOrder(RunWriter):
    def _publish_segments(self, step: int, *, is_final: bool) -> None:
        for segment in reversed(list(self.rows.iter_segments(step, is_final=is_final))):
            self._write_segment(segment)
        if not is_final:
            self.rows.drop_published(step)


class IncompleteSegments(RunWriter):
    def _publish_segments(self, step: int, *, is_final: bool) -> None:
        for segment in self.rows.iter_segments(step, is_final=True):
            self._write_segment(segment)
        if not is_final:
            self.rows.drop_published(step)


class ResumeSegmentsNotPublished(RunWriter):
    def resume(self) -> None:
        if self.attempt.resume_checkpoint is not None:
            self.rows.load(self.attempt.resume_checkpoint.read_rows(), self.attempt.resume_checkpoint.first_segment)
            self.rows.drop_published(self.attempt.resume_checkpoint.step)


class CommitBeforeFiles(RunWriter):
    """The journal entry is written first, then the checkpoint's files."""

    def commit(self, snapshot: Snapshot, blocks: Sequence[StepBlock], evaluations: Sequence[EvaluationRow]) -> None:
        delayed: list[tuple[Any, ...]] = []
        original = checkpoint_format.write_checkpoint
        append = self.attempt.append

        def append_then_write(entry: JournalEntry) -> None:
            append(entry)
            checkpoint_format.write_checkpoint = original
            for args in delayed:
                original(*args)

        checkpoint_format.write_checkpoint = lambda *args: delayed.append(args)
        self.attempt.append = append_then_write  # type: ignore[method-assign]
        try:
            super().commit(snapshot, blocks, evaluations)
        finally:
            checkpoint_format.write_checkpoint = original
            self.attempt.append = append  # type: ignore[method-assign]


class OnlyRowsSinceLastCommit(RunWriter):
    def commit(self, snapshot: Snapshot, blocks: Sequence[StepBlock], evaluations: Sequence[EvaluationRow]) -> None:
        super().commit(snapshot, blocks, evaluations)
        if not snapshot.is_final:
            self.rows.first_segment = SEGMENT_LAYOUT.count_complete(snapshot.step)
            self.rows.steps = self.rows.steps.slice(0, 0)
            self.rows.evaluations = self.rows.evaluations.slice(0, 0)


class DeletesSecondRetained(RunWriter):
    def _apply_retention(self, commit: Commit) -> None:
        super()._apply_retention(replace(commit, kept=commit.kept[:1]))


class DeletesBestCheckpoint(RunWriter):
    def _apply_retention(self, commit: Commit) -> None:
        super()._apply_retention(replace(commit, kept=tuple((name, None) for name, _ in commit.kept)))


class DeletesCheckpointsOfEnds(RunWriter):
    def _apply_retention(self, commit: Commit) -> None:
        state, self.attempt.state = self.attempt.state, JournalState()
        super()._apply_retention(commit)
        self.attempt.state = state


class DeletesOfNewerAttempts(RunWriter):
    def _apply_retention(self, commit: Commit) -> None:
        protected = decisions.checkpoints_to_keep(commit.kept, self.attempt.state)
        for name in self._run.storage.list(checkpoint_format.CHECKPOINTS_FOLDER):
            if name not in protected:
                checkpoint_format.delete_checkpoint(self._run.storage, name)


class DeletesBeforeCommit(RunWriter):
    def _check_finite(self, snapshot: Snapshot) -> None:
        for name in self._run.storage.list(checkpoint_format.CHECKPOINTS_FOLDER):
            checkpoint_format.delete_checkpoint(self._run.storage, name)


class NeverDeletes(RunWriter):
    def _apply_retention(self, commit: Commit) -> None:
        return


class NoResult(RunWriter):
    def finalize(self) -> None:
        return


class IgnoresSuperseded(ReferenceProtocol):
    def make_writer(self, attempt: Attempt) -> RunWriter:
        def append(entry: JournalEntry) -> None:
            while not attempt.run.journal.append(entry):
                attempt.state = attempt.run.journal.read_state()
                entry = replace(entry, number=attempt.state.number + 1, before=attempt.state)
            attempt.state = decisions.apply_entry(attempt.state, entry)

        attempt.append = append  # type: ignore[method-assign]
        return super().make_writer(attempt)


class HintOnlyJournal(Journal):
    """The number in `run.json` is used as the newest, without a search beyond it."""

    num_searches = 0

    def _find_newest(self) -> JournalEntry | None:
        self.num_searches += 1
        assert self.num_searches < 20, "the claim is repeated without end"
        hint = self._hint()
        return self.read_entry(hint) if hint > self._state.number else None if hint else super()._find_newest()


class UsesHintOnly(ReferenceProtocol):
    """A claim that uses the entry number in `run.json` as the newest."""

    def claim(self, run: Run, template: Claim, known_dead_attempt: int | None) -> Attempt:
        run.journal = HintOnlyJournal(run.storage, run.journal._hint)
        return super().claim(run, template, known_dead_attempt)


class CarriesStateOfClaim(ReferenceProtocol):
    """Commits do not include the earlier commits of their attempt in the state."""

    def make_writer(self, attempt: Attempt) -> RunWriter:
        append, before = attempt.append, attempt.state
        attempt.append = lambda entry: append(replace(entry, before=before))  # type: ignore[method-assign]
        return super().make_writer(attempt)


class CarriesNoEndCheckpoints(ReferenceProtocol):
    """Entries do not carry the checkpoints of final commits."""

    def claim(self, run: Run, template: Claim, known_dead_attempt: int | None) -> Attempt:
        attempt = super().claim(run, template, known_dead_attempt)
        attempt.state = replace(attempt.state, kept_by_ends=())
        return attempt


class SelectsBeforeClaim(ReferenceProtocol):
    def claim(self, run: Run, template: Claim, known_dead_attempt: int | None) -> Attempt:
        before = Attempt(run, 0, "", run.journal.read_state())
        select_resume_checkpoint(before)
        attempt = append_claim(run, template, known_dead_attempt)
        attempt.resume_checkpoint, attempt.retained = before.resume_checkpoint, before.retained
        return attempt


class SelectsByListing(ReferenceProtocol):
    def claim(self, run: Run, template: Claim, known_dead_attempt: int | None) -> Attempt:
        attempt = append_claim(run, template, known_dead_attempt)
        for name in reversed(run.storage.list(checkpoint_format.CHECKPOINTS_FOLDER)):
            try:
                attempt.resume_checkpoint = Checkpoint(run, name)
                attempt.resume_checkpoint.verify()
                attempt.resume_checkpoint.read_rows()
            except DamagedError:
                attempt.resume_checkpoint = None
                continue
            attempt.retained = (
                (name, attempt.resume_checkpoint.best.checkpoint if attempt.resume_checkpoint.best else None),
            )
            break
        return attempt


class SelectsWithoutCheck(ReferenceProtocol):
    def claim(self, run: Run, template: Claim, known_dead_attempt: int | None) -> Attempt:
        attempt = append_claim(run, template, known_dead_attempt)
        commit = attempt.state.commit
        if commit is not None:
            attempt.resume_checkpoint, attempt.retained = Checkpoint(run, commit.checkpoint), commit.kept
        return attempt


class LiveRowsInOneFile(ReferenceProtocol):
    """All attempts write the same file."""

    def make_live_writer(self, attempt: Attempt) -> LiveWriter:
        return LiveWriter(attempt.run, 1, SEGMENT_LAYOUT, MetricSchema())


class LiveRowsDroppedBeforeSegments(ReferenceProtocol):
    """The rows are dropped as soon as they fill a segment."""

    def make_live_writer(self, attempt: Attempt) -> LiveWriter:
        class EarlyDroppingLiveWriter(LiveWriter):
            def log_steps(self, block: StepBlock) -> None:
                super().log_steps(block)
                self._first_step = SEGMENT_LAYOUT.first_step(SEGMENT_LAYOUT.count_complete(int(block["step"][-1])))

        return EarlyDroppingLiveWriter(attempt.run, attempt.number, SEGMENT_LAYOUT, MetricSchema())


class LiveRowsWithoutResumedRows(ReferenceProtocol):
    def make_live_writer(self, attempt: Attempt) -> LiveWriter:
        class ForgettingLiveWriter(LiveWriter):
            def resume(self, rows: PendingRows) -> None:
                super().resume(rows)
                self._rows.steps = rows.steps.slice(0, 0)

        return ForgettingLiveWriter(attempt.run, attempt.number, SEGMENT_LAYOUT, MetricSchema())


class LiveRowsNotRemoved(ReferenceProtocol):
    def remove_live_rows(self, run: Run) -> None:
        return


class EndsBelowHighestStep(ReferenceProtocol):
    def min_end_step(self, attempt: Attempt) -> int:
        return 0


class TrainsBeyondEnd(ReferenceProtocol):
    def required_end_step(self, attempt: Attempt) -> int | None:
        return None


MUTANTS: dict[str, ReferenceProtocol] = {
    kind.__name__: _with_writer(kind)
    for kind in (
        SegmentsBeforeCommit, StepsBeforeEvaluations, FixedSizeSegments, SegmentsInDescendingOrder, IncompleteSegments,
        ResumeSegmentsNotPublished, CommitBeforeFiles, OnlyRowsSinceLastCommit, DeletesSecondRetained,
        DeletesBestCheckpoint,
        DeletesCheckpointsOfEnds, DeletesOfNewerAttempts, DeletesBeforeCommit, NeverDeletes, NoResult,
    )
} | {
    kind.__name__: kind()
    for kind in (
        IgnoresSuperseded, SelectsBeforeClaim, SelectsByListing, SelectsWithoutCheck, EndsBelowHighestStep,
        TrainsBeyondEnd, UsesHintOnly, CarriesStateOfClaim, CarriesNoEndCheckpoints, LiveRowsInOneFile,
        LiveRowsDroppedBeforeSegments, LiveRowsWithoutResumedRows, LiveRowsNotRemoved,
    )
}  # fmt: skip


PROGRAMMING_ERRORS = (AttributeError, NameError, TypeError)
"""Errors of a mutant or a search that no longer fits the product: they are not violations."""


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_found_by_fault_sweep(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "INITIAL_BACKOFF_S", 0.0)
    with pytest.raises(Exception) as caught:  # noqa: PT012 - a violation may show as any error of the writers
        for case in fault_cases(MUTANTS[name], thin=True):
            case()
    assert not isinstance(caught.value, PROGRAMMING_ERRORS), caught.value


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_found_by_state_machine(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "INITIAL_BACKOFF_S", 0.0)
    with pytest.raises(Exception) as caught:
        run_state_machine_as_test(
            type(name, (ProtocolStateMachine,), {"protocol": MUTANTS[name]}),
            settings=settings(
                deadline=None,
                stateful_step_count=40,
                max_examples=2000,
                derandomize=True,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            ),
        )
    assert not isinstance(caught.value, PROGRAMMING_ERRORS), caught.value
