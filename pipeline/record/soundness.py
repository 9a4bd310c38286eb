"""What of a run's directory is missing or damaged, found by looking at what the journal says must be there.

A resume checks the checkpoint that it goes on from, byte for byte, and writes again what it can; this names the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from pipeline.errors import StorageError
from pipeline.record import decisions
from pipeline.record.checkpoint import Checkpoint, DamagedError
from pipeline.record.columns import Columns, decode
from pipeline.record.entries import Commit, Entry
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
    entries = run.journal.read()
    found = [*_cells(run, entries), *_checkpoints(run, entries), *_end(run, entries)]
    if not found or len(run.journal.read()) == len(entries):
        return found
    return damage(run)  # it went on meanwhile: what was deleted had its time


def published_step(entries: Sequence[Entry]) -> int:
    """The step up to which all complete cells were published for certain: they follow a commit, and whoever wrote
    them went on to another commit after that."""
    commits = [entry for entry in entries if isinstance(entry, Commit)]
    return max((one.step for one, after in pairwise(commits) if one.attempt == after.attempt), default=0)


def _cells(run: Run, entries: Sequence[Entry]) -> list[str]:
    facts = run.facts()
    size = int(facts["cell_steps"])
    last, is_over = published_step(entries), False
    commit = decisions.newest_commit(entries)
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


def _checkpoints(run: Run, entries: Sequence[Entry]) -> Iterator[str]:
    commit = decisions.newest_commit(entries)
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


def _end(run: Run, entries: Sequence[Entry]) -> Iterator[str]:
    """What is written at the end, as a function of the journal alone."""
    commit = decisions.newest_commit(entries)
    if commit is None or not commit.end or not decisions.is_over(entries):
        return
    try:
        if run.storage.read(RESULT) != result_file(run.name, commit):
            yield f"{RESULT} is damaged; {REPAIR}"
    except FileNotFoundError:
        yield f"{RESULT} is missing; {REPAIR}"
    if not has_view(run, entries):
        yield f"{VIEW} is missing or damaged; {REPAIR}"


def has_end(run: Run) -> bool:
    """Whether all that follows from an end is there as it must be."""
    entries = run.journal.read()
    return not any(_end(run, entries)) and run.view().get("status") == "finished"


def has_view(run: Run, entries: Sequence[Entry]) -> bool:
    """Whether `run.json` says what the journal does. A run that was copied elsewhere keeps the URL it had."""
    wanted, found = from_json(view_file(run, entries, "finished")), run.view()
    return {**wanted, "url": ""} == {**found, "url": ""}
