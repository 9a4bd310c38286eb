"""What of a run's directory is missing or damaged, found by looking at what the journal says must be there.

A resume checks the checkpoint that it goes on from, byte for byte, and writes again what it can; this names the rest.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pipeline.errors import StorageError
from pipeline.record.checkpoint import Checkpoint, DamagedError
from pipeline.record.columns import Columns, decode
from pipeline.record.entries import JournalState
from pipeline.record.run import RESULT, VIEW, Run
from pipeline.record.saving import FOLDER, MANIFEST
from pipeline.record.standing import view_file
from pipeline.record.values import from_json
from pipeline.record.writer import EVALUATIONS, STEPS, result_file

REPAIR = "the same train command writes it again"
MOST_ROWS_A_STEP = 100
"""Rows of evaluations in a cell are at most so many times its steps: one for each split that is evaluated."""


def damage(run: Run) -> list[str]:
    """What is missing or damaged, one line each; the files of checkpoints are looked for, and only a resume reads them.

    The cells are read whole, a few bytes a step: nothing less would find a flipped bit.

    Raises
    ------
    StorageError: the journal or `job.yaml` itself cannot be used.
    """
    state = run.journal.state()
    found = [*_journal(run), *_cells(run, state), *_checkpoints(run, state), *_end(run, state)]
    if not found or run.journal.state().number == state.number:
        return found
    return damage(run)  # it went on meanwhile: what was deleted had its time


def _journal(run: Run) -> Iterator[str]:
    """An entry that was deleted. The run goes on without it, for later ones carry what it said; but Trainyard deletes
    none. Only here are all their names listed, a request for each thousand on an object store."""
    number = run.journal.first_missing()
    if number is not None:
        yield f"journal/{number:08d}.json is missing, though later ones are there"


def _cells(run: Run, state: JournalState) -> list[str]:
    facts = run.facts()
    size = int(facts["cell_steps"])
    last, is_over = state.published_step, False
    commit = state.commit
    if commit is not None and commit.end and run.view().get("status") == "finished":  # written after its cells
        last, is_over = commit.step, True
    count = max(1, -(-last // size)) if is_over else last // size
    columns = Columns.from_facts(facts)
    schemas = {EVALUATIONS: columns.evaluation_schema(), STEPS: columns.step_schema()}

    def look(cell: tuple[str, int]) -> str:
        table, index = cell
        path = f"{table}/{index:06d}.parquet"
        first = index * size + 1
        end = min(first + size - 1, last)
        try:
            rows = decode(run.storage.read(path), schemas[table], MOST_ROWS_A_STEP * (size + 1), path)
        except FileNotFoundError:
            return f"{path} is missing"
        except StorageError as error:
            return f"{path} is damaged ({error.what})"
        steps = rows["step"].to_numpy()
        if table == STEPS:
            is_right = np.array_equal(steps, np.arange(first, end + 1))
        else:
            is_right = bool(np.all((steps >= (first if index else 0)) & (steps <= end)))
        return "" if is_right else f"{path} is damaged (its steps are not {first} to {end})"

    looked = run.storage.each(look, [(table, index) for index in range(count) for table in schemas])
    return [line for line in looked if line]


def _checkpoints(run: Run, state: JournalState) -> Iterator[str]:
    commit = state.commit
    names = {name for pair in commit.kept for name in pair if name is not None} if commit is not None else set()
    for name in sorted(names):
        folder = f"{FOLDER}/{name}"
        try:
            checkpoint = Checkpoint(run, name)
        except DamagedError as error:
            yield f"{folder}/{MANIFEST}: {error.what}"
            continue
        there = set(run.storage.list(folder))
        yield from (f"{folder}/{file} is missing" for file in checkpoint.files if file not in there)


def _end(run: Run, state: JournalState) -> Iterator[str]:
    """What is written at the end, as a function of the journal alone."""
    commit = state.commit
    if commit is None or not commit.end or not state.is_over:
        return
    try:
        if run.storage.read(RESULT) != result_file(run.name, commit):
            yield f"{RESULT} is damaged; {REPAIR}"
    except FileNotFoundError:
        yield f"{RESULT} is missing; {REPAIR}"
    if not has_view(run, state):
        yield f"{VIEW} is missing or damaged; {REPAIR}"


def has_end(run: Run) -> bool:
    """Whether all that follows from an end is there as it must be."""
    return not any(_end(run, run.journal.state())) and run.view().get("status") == "finished"


def has_view(run: Run, state: JournalState) -> bool:
    """Whether `run.json` says what the journal does. A run that was copied elsewhere keeps the URL it had."""
    wanted, found = from_json(view_file(run, state, "finished")), run.view()
    return {**wanted, "url": ""} == {**found, "url": ""}
