"""What of a run's directory is missing or damaged, found by looking at what the journal says must be there.

A resume checks the checkpoint that it goes on from, byte for byte, and writes again what it can; this names the rest.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from pipeline.errors import StorageError
from pipeline.record.cells import CellLayout
from pipeline.record.checkpoint import Checkpoint, DamagedError
from pipeline.record.columns import Columns, decode
from pipeline.record.entries import Commit, JournalState
from pipeline.record.run import RESULT, VIEW, Run
from pipeline.record.saving import FOLDER, MANIFEST
from pipeline.record.standing import view_file
from pipeline.record.values import from_json
from pipeline.record.watch import beats
from pipeline.record.writer import EVALUATIONS, STEPS, result_file

REPAIR = "the same train command writes it again"
MOST_CELLS = 10_000
"""A run has fewer than 200, unless somebody has altered what it says of itself."""
MOST_ROWS_A_STEP = 100
"""Rows of evaluations in a cell are at most so many times its steps: one for each split that is evaluated."""


def damage(run: Run, *, every_file: bool = False) -> list[str]:
    """What is missing or damaged, one line each.

    Files of the metric log and of checkpoints are looked for by name, and the log's last cell is read, so the cost does
    not grow with the run.

    Parameters
    ----------
    every_file: read all cells and all kept checkpoints too, for nothing less would find a flipped bit.

    Raises
    ------
    StorageError: the journal or `job.yaml` itself cannot be used.
    """
    state = run.journal.state()
    # Once an end is committed, a later attempt may be writing what follows from it.
    is_settled = state.is_over or state.claim is None or not beats(run, state.claim)
    problems = [*_journal(run), *(_end(run, state) if is_settled else ())]
    if state.commit is not None:
        checkpoints, damaged = _checkpoints(run, state.commit, every_file)
        published = max((checkpoint.first_cell for checkpoint in checkpoints), default=0)
        problems = [*_cells(run, state, published, every_file), *damaged, *problems]
    if not problems or run.journal.state().number == state.number:
        return problems
    return damage(run, every_file=every_file)  # it went on meanwhile: what was deleted had its time


def _journal(run: Run) -> Iterator[str]:
    """An entry that was deleted. The run goes on without it, for later ones carry what it said; but Trainyard deletes
    none. Only here are all their names listed, a request for each thousand on an object store."""
    number = run.journal.first_missing()
    if number is not None:
        yield f"journal/{number:08d}.json is missing, though later ones are there"


def _cells(run: Run, state: JournalState, published: int, every_file: bool) -> list[str]:
    """Cells of the log that are missing or damaged.

    Parameters
    ----------
    published: cells that were there for certain when the newest checkpoint was made.
    """
    metadata, commit = run.facts(), state.commit
    assert commit is not None
    layout, metric_schema = CellLayout.from_facts(metadata), Columns.from_facts(metadata)
    schemas = {STEPS: metric_schema.step_schema(), EVALUATIONS: metric_schema.evaluation_schema()}
    listed = {table: set(run.storage.list(table)) for table in schemas}  # a cell's steps are written last
    numbers = [int(name[:-8]) for name in listed[STEPS] if re.fullmatch(r"[0-9]{6,9}\.parquet", name)]
    count = max([published, layout.complete(state.published_step), *(number + 1 for number in numbers)])
    if commit.end and run.view().get("status") == "finished":  # written after its cells
        count = layout.cell_of(commit.step) + 1
    count = min(count, MOST_CELLS)

    def look(cell: tuple[int, str]) -> str:
        index, table = cell
        path = f"{table}/{index:06d}.parquet"
        first, end = layout.first_step(index), layout.last_step(index)
        if commit.end:
            end = min(end, commit.step)
        try:
            rows = decode(run.storage.read(path), schemas[table], MOST_ROWS_A_STEP * (layout.most + 1), path)
        except FileNotFoundError:
            return f"{path} is missing"
        except StorageError as error:
            return f"{path} is damaged ({error.what})"
        steps = rows["step"].to_numpy()
        if table == STEPS:
            is_right = len(steps) == end - first + 1 and np.array_equal(steps, np.arange(first, end + 1))
        else:
            is_right = bool(np.all((steps >= (first if index else 0)) & (steps <= end)))
        return "" if is_right else f"{path} is damaged (its steps are not {first} to {end})"

    expected = [(index, table) for index in range(count) for table in (EVALUATIONS, STEPS)]
    missing = {(index, table) for index, table in expected if f"{index:06d}.parquet" not in listed[table]}
    read = [cell for cell in expected if cell not in missing and (every_file or cell[0] == count - 1)]
    lines = dict(zip(read, run.storage.each(look, read), strict=True))
    lines |= {(index, table): f"{table}/{index:06d}.parquet is missing" for index, table in missing}
    return [lines[cell] for cell in expected if lines.get(cell)]


def _checkpoints(run: Run, commit: Commit, every_file: bool) -> tuple[list[Checkpoint], list[str]]:
    """The kept checkpoints that have a manifest, newest first, and a line for each fault of any of them."""
    checkpoints, lines = [], []
    for name in dict.fromkeys(name for pair in commit.kept for name in pair if name is not None):
        folder = f"{FOLDER}/{name}"
        try:
            checkpoint = Checkpoint(run, name)
        except DamagedError as error:
            lines.append(f"{folder}/{MANIFEST}: {error.what}")
            continue
        checkpoints.append(checkpoint)
        listed = set(run.storage.list(folder))
        missing = [file for file in checkpoint.files if file not in listed]
        lines += [f"{folder}/{file} is missing" for file in missing]
        if every_file and not missing:
            try:
                checkpoint.verify()
            except DamagedError as error:
                lines.append(f"{folder}: {error.what}")
    return checkpoints, lines


def _end(run: Run, state: JournalState) -> Iterator[str]:
    """What is written at the end, as a function of the journal alone."""
    commit = state.commit
    if commit is None or not commit.end:
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
    expected, actual = from_json(view_file(run, state, "finished")), run.view()
    return {**expected, "url": ""} == {**actual, "url": ""}
