"""The search of `test_record_protocol` has teeth: leave out any clause of the protocol, and it finds a violation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from pipeline.record import decisions, saving
from pipeline.record.attempt import Attempt, choose_base, take
from pipeline.record.cells import Cell, CellLayout, Columns, EvaluationRow, Rows, StepBlock, encode
from pipeline.record.checkpoint import Checkpoint, DamagedError
from pipeline.record.entries import Claim, Commit, Entry, JournalState
from pipeline.record.journal import Journal
from pipeline.record.live import LiveWriter
from pipeline.record.run import Run
from pipeline.record.writer import EVALUATIONS, STEPS, Snapshot, Writer
from pipeline.storage import faults
from tests.record.record_lives import CELLS, KEEP, Faithful
from tests.record.record_machine import Machine
from tests.record.record_sweeps import sweep


class Mutant(Faithful):
    """A protocol whose writer is another."""

    writer_type: type[Writer]

    def writer(self, attempt: Attempt) -> Writer:
        return self.writer_type(attempt, layout=CELLS, keep=KEEP, columns=Columns())


def _with_writer(writer: type[Writer]) -> Faithful:
    mutant = Mutant()
    mutant.writer_type = writer
    return mutant


class CellsBeforeTheCommit(Writer):
    def _check_finite(self, snapshot: Snapshot) -> None:
        for cell in self.rows.cells(snapshot.step, end=snapshot.end):
            self._write_cell(cell)


class StepsBeforeEvaluations(Writer):
    def _write_cell(self, cell: Cell) -> None:
        self._run.storage.replace(f"{STEPS}/{cell.name}", encode(cell.steps))
        self._run.storage.replace(f"{EVALUATIONS}/{cell.name}", encode(cell.evaluations))


class CellsOfOneSize(Writer):
    """As an earlier version would, which knows no others."""

    def __init__(self, attempt: Attempt, *, layout: CellLayout, keep: int, columns: Columns) -> None:
        super().__init__(attempt, layout=CellLayout(layout.most, layout.most), keep=keep, columns=columns)


class CellsDescending(Writer):
    def _publish(self, step: int, *, end: bool) -> None:
        for cell in reversed(list(self.rows.cells(step, end=end))):
            self._write_cell(cell)
        if not end:
            self.rows.drop(step)


class IncompleteCells(Writer):
    def _publish(self, step: int, *, end: bool) -> None:
        for cell in self.rows.cells(step, end=True):
            self._write_cell(cell)
        if not end:
            self.rows.drop(step)


class BaseNotPublished(Writer):
    def begin(self) -> None:
        if self.attempt.base is not None:
            self.rows.load(self.attempt.base.rows(), self.attempt.base.first_cell)
            self.rows.drop(self.attempt.base.step)


class CommitBeforeItsFiles(Writer):
    """The entry first, the checkpoint's files after it."""

    def commit(self, snapshot: Snapshot, blocks: Sequence[StepBlock], evaluations: Sequence[EvaluationRow]) -> None:
        delayed: list[tuple[Any, ...]] = []
        original = saving.write_checkpoint
        append = self.attempt.append

        def append_then_write(entry: Entry) -> None:
            append(entry)
            saving.write_checkpoint = original
            for words in delayed:
                original(*words)

        saving.write_checkpoint = lambda *words: delayed.append(words)
        self.attempt.append = append_then_write  # type: ignore[method-assign]
        try:
            super().commit(snapshot, blocks, evaluations)
        finally:
            saving.write_checkpoint = original
            self.attempt.append = append  # type: ignore[method-assign]


class RowsSinceTheLastCommitOnly(Writer):
    def commit(self, snapshot: Snapshot, blocks: Sequence[StepBlock], evaluations: Sequence[EvaluationRow]) -> None:
        super().commit(snapshot, blocks, evaluations)
        if not snapshot.end:
            self.rows.first_cell = CELLS.complete(snapshot.step)
            self.rows.steps = self.rows.steps.slice(0, 0)
            self.rows.evaluations = self.rows.evaluations.slice(0, 0)


class DeletesTheOtherKept(Writer):
    def _retain(self, commit: Commit) -> None:
        super()._retain(replace(commit, kept=commit.kept[:1]))


class DeletesTheBest(Writer):
    def _retain(self, commit: Commit) -> None:
        super()._retain(replace(commit, kept=tuple((name, None) for name, _ in commit.kept)))


class DeletesWhatEndsKeep(Writer):
    def _retain(self, commit: Commit) -> None:
        state, self.attempt.state = self.attempt.state, JournalState()
        super()._retain(commit)
        self.attempt.state = state


class DeletesOfHigherAttempts(Writer):
    def _retain(self, commit: Commit) -> None:
        spare = decisions.spared(commit.kept, self.attempt.state)
        for name in self._run.storage.list(saving.FOLDER):
            if name not in spare:
                saving.delete_checkpoint(self._run.storage, name)


class DeletesBeforeTheCommit(Writer):
    def _check_finite(self, snapshot: Snapshot) -> None:
        for name in self._run.storage.list(saving.FOLDER):
            saving.delete_checkpoint(self._run.storage, name)


class NeverDeletes(Writer):
    def _retain(self, commit: Commit) -> None:
        return


class NoResult(Writer):
    def complete(self) -> None:
        return


class IgnoresThatItIsSuperseded(Faithful):
    def writer(self, attempt: Attempt) -> Writer:
        def append(entry: Entry) -> None:
            while not attempt.run.journal.append(entry):
                attempt.state = attempt.run.journal.state()
                entry = replace(entry, number=attempt.state.number + 1, before=attempt.state)
            attempt.state = decisions.apply(attempt.state, entry)

        attempt.append = append  # type: ignore[method-assign]
        return super().writer(attempt)


class TrustsTheHint(Journal):
    """The number in `run.json` taken for the newest, with no look beyond it."""

    searches = 0

    def _find_newest(self) -> Entry | None:
        self.searches += 1
        assert self.searches < 20, "the number after it is taken again and again"
        hint = self._hint()
        return self.entry(hint) if hint > self._state.number else None if hint else super()._find_newest()


class SearchesNoFurther(Faithful):
    """A claimant that takes the entry which `run.json` names for the newest."""

    def claim(self, run: Run, template: Claim, dead: int | None) -> Attempt:
        run.journal = TrustsTheHint(run.storage, run.journal._hint)
        return super().claim(run, template, dead)


class CarriesWhatTheClaimDid(Faithful):
    """Commits that leave out their attempt's own."""

    def writer(self, attempt: Attempt) -> Writer:
        append, before = attempt.append, attempt.state
        attempt.append = lambda entry: append(replace(entry, before=before))  # type: ignore[method-assign]
        return super().writer(attempt)


class CarriesNoEnds(Faithful):
    """What ends keep is left out of what entries carry."""

    def claim(self, run: Run, template: Claim, dead: int | None) -> Attempt:
        attempt = super().claim(run, template, dead)
        attempt.state = replace(attempt.state, kept_by_ends=())
        return attempt


class BaseBeforeTheClaim(Faithful):
    def claim(self, run: Run, template: Claim, dead: int | None) -> Attempt:
        before = Attempt(run, 0, "", run.journal.state())
        choose_base(before)
        attempt = take(run, template, dead)
        attempt.base, attempt.kept = before.base, before.kept
        return attempt


class BaseByListing(Faithful):
    def claim(self, run: Run, template: Claim, dead: int | None) -> Attempt:
        attempt = take(run, template, dead)
        for name in reversed(run.storage.list(saving.FOLDER)):
            try:
                attempt.base = Checkpoint(run, name)
                attempt.base.verify()
                attempt.base.rows()
            except DamagedError:
                attempt.base = None
                continue
            attempt.kept = ((name, attempt.base.best.checkpoint if attempt.base.best else None),)
            break
        return attempt


class BaseUnchecked(Faithful):
    def claim(self, run: Run, template: Claim, dead: int | None) -> Attempt:
        attempt = take(run, template, dead)
        commit = attempt.state.commit
        if commit is not None:
            attempt.base, attempt.kept = Checkpoint(run, commit.checkpoint), commit.kept
        return attempt


class LiveRowsInOneFile(Faithful):
    """Whichever attempt writes them."""

    def live_writer(self, attempt: Attempt) -> LiveWriter:
        return LiveWriter(attempt.run, 1, CELLS, Columns())


class LiveRowsDroppedBeforeTheirCells(Faithful):
    """As soon as they fill a cell."""

    def live_writer(self, attempt: Attempt) -> LiveWriter:
        class Hasty(LiveWriter):
            def steps(self, rows: StepBlock) -> None:
                super().steps(rows)
                self._first_step = CELLS.first_step(CELLS.complete(int(rows["step"][-1])))

        return Hasty(attempt.run, attempt.number, CELLS, Columns())


class LiveRowsWithoutThoseOfTheBase(Faithful):
    def live_writer(self, attempt: Attempt) -> LiveWriter:
        class Forgetful(LiveWriter):
            def begin(self, rows: Rows) -> None:
                super().begin(rows)
                self._rows.steps = rows.steps.slice(0, 0)

        return Forgetful(attempt.run, attempt.number, CELLS, Columns())


class LiveRowsStay(Faithful):
    def remove_live_rows(self, run: Run) -> None:
        return


class EndsBelowTheHighestStep(Faithful):
    def floor(self, attempt: Attempt) -> int:
        return 0


class GoesBeyondTheEnd(Faithful):
    def bound(self, attempt: Attempt) -> int | None:
        return None


MUTANTS: dict[str, Faithful] = {
    kind.__name__: _with_writer(kind)
    for kind in (
        CellsBeforeTheCommit, StepsBeforeEvaluations, CellsOfOneSize, CellsDescending, IncompleteCells,
        BaseNotPublished, CommitBeforeItsFiles, RowsSinceTheLastCommitOnly, DeletesTheOtherKept, DeletesTheBest,
        DeletesWhatEndsKeep, DeletesOfHigherAttempts, DeletesBeforeTheCommit, NeverDeletes, NoResult,
    )
} | {
    kind.__name__: kind()
    for kind in (
        IgnoresThatItIsSuperseded, BaseBeforeTheClaim, BaseByListing, BaseUnchecked, EndsBelowTheHighestStep,
        GoesBeyondTheEnd, SearchesNoFurther, CarriesWhatTheClaimDid, CarriesNoEnds, LiveRowsInOneFile,
        LiveRowsDroppedBeforeTheirCells, LiveRowsWithoutThoseOfTheBase, LiveRowsStay,
    )
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_a_clause_left_out_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "FIRST_PAUSE_S", 0.0)
    with pytest.raises(Exception):  # noqa: B017, PT012 - a violation may show as any error of the writers
        for case in sweep(MUTANTS[name], thin=True):
            case()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", MUTANTS)
def test_a_clause_left_out_is_found_by_the_search_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "FIRST_PAUSE_S", 0.0)
    with pytest.raises(Exception):  # noqa: B017 - as above
        run_state_machine_as_test(
            type(name, (Machine,), {"protocol": MUTANTS[name]}),
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
