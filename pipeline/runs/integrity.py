"""Find files of a run's directory that are missing or damaged, compared with what the journal requires.

A resume verifies the checkpoint that it starts from, byte for byte, and rewrites what it can; this reports the rest.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from pipeline.errors import StorageError
from pipeline.runs.checkpoints.checkpoint import Checkpoint, DamagedError
from pipeline.runs.checkpoints.format import CHECKPOINTS_FOLDER, MANIFEST_FILE
from pipeline.runs.journal.entries import Commit, JournalState
from pipeline.runs.lease.liveness import is_heartbeat_fresh
from pipeline.runs.metric_log.schema import MetricSchema, decode_table
from pipeline.runs.metric_log.segments import SegmentLayout
from pipeline.runs.run import RESULT_FILE, SUMMARY_FILE, Run
from pipeline.runs.serialization import from_json
from pipeline.runs.status import encode_summary
from pipeline.runs.writer import EVALUATIONS_FOLDER, STEPS_FOLDER, encode_result

REPAIR_HINT = "the same train command writes it again"
MAX_SEGMENTS = 10_000
"""A run has fewer than 200, unless its metadata was altered."""
MAX_EVALUATION_ROWS_PER_STEP = 100
"""Maximum number of evaluation rows of a segment per step: one per evaluated split."""


def find_damage(run: Run, *, read_all_files: bool = False) -> list[str]:
    """Return what is missing or damaged, one line each.

    Files of the metric log and of checkpoints are looked up by name, and only the last segment of the log is read, so
    the cost does not grow with the run.

    Parameters
    ----------
    read_all_files: also read all segments and all retained checkpoints, which is the only way to find a flipped bit.

    Raises
    ------
    StorageError: the journal or `job.yaml` itself cannot be used.
    """
    state = run.journal.read_state()
    # After the final commit, a later attempt may be writing the files that follow from it.
    is_settled = state.is_over or state.claim is None or not is_heartbeat_fresh(run, state.claim)
    problems = [*_check_journal(run), *(_check_final_files(run, state) if is_settled else ())]
    if state.commit is not None:
        checkpoints, damaged = _check_checkpoints(run, state.commit, read_all_files)
        published = max((checkpoint.first_segment for checkpoint in checkpoints), default=0)
        problems = [*_check_segments(run, state, published, read_all_files), *damaged, *problems]
    if not problems or run.journal.read_state().number == state.number:
        return problems
    # The run progressed meanwhile: files may have been deleted as intended.
    return find_damage(run, read_all_files=read_all_files)


def _check_journal(run: Run) -> Iterator[str]:
    """Report a deleted entry. The run works without it, because later entries carry its content; but Trainyard never
    deletes entries. Only this check lists all their names, with one request per thousand on an object store."""
    number = run.journal.find_missing_number()
    if number is not None:
        yield f"journal/{number:08d}.json is missing, but later entries exist"


def _check_segments(run: Run, state: JournalState, num_published: int, read_all_files: bool) -> list[str]:
    """Return a line for each segment file of the log that is missing or damaged.

    Parameters
    ----------
    num_published: segments that were certainly written before the newest checkpoint.
    """
    metadata, commit = run.read_metadata(), state.commit
    assert commit is not None
    layout, metric_schema = SegmentLayout.from_metadata(metadata), MetricSchema.from_metadata(metadata)
    schemas = {STEPS_FOLDER: metric_schema.step_schema(), EVALUATIONS_FOLDER: metric_schema.evaluation_schema()}
    listed = {table: set(run.storage.list(table)) for table in schemas}  # the steps of a segment are written last
    numbers = [int(name[:-8]) for name in listed[STEPS_FOLDER] if re.fullmatch(r"[0-9]{6,9}\.parquet", name)]
    count = max([num_published, layout.count_complete(state.published_step), *(number + 1 for number in numbers)])
    if commit.end and run.read_summary().get("status") == "finished":  # written after its segments
        count = layout.segment_of(commit.step) + 1
    count = min(count, MAX_SEGMENTS)

    def check_segment(file: tuple[int, str]) -> str:
        index, table = file
        path = f"{table}/{index:06d}.parquet"
        first, end = layout.first_step(index), layout.last_step(index)
        if commit.end:
            end = min(end, commit.step)
        try:
            rows = decode_table(
                run.storage.read(path),
                schemas[table],
                MAX_EVALUATION_ROWS_PER_STEP * (layout.max_segment_steps + 1),
                path,
            )
        except FileNotFoundError:
            return f"{path} is missing"
        except StorageError as error:
            return f"{path} is damaged ({error.what})"
        steps = rows["step"].to_numpy()
        if table == STEPS_FOLDER:
            is_valid = len(steps) == end - first + 1 and np.array_equal(steps, np.arange(first, end + 1))
        else:
            is_valid = bool(np.all((steps >= (first if index else 0)) & (steps <= end)))
        return "" if is_valid else f"{path} is damaged (its steps are not {first} to {end})"

    expected = [(index, table) for index in range(count) for table in (EVALUATIONS_FOLDER, STEPS_FOLDER)]
    missing = {(index, table) for index, table in expected if f"{index:06d}.parquet" not in listed[table]}
    to_read = [file for file in expected if file not in missing and (read_all_files or file[0] == count - 1)]
    lines = dict(zip(to_read, run.storage.map_concurrent(check_segment, to_read), strict=True))
    lines |= {(index, table): f"{table}/{index:06d}.parquet is missing" for index, table in missing}
    return [lines[file] for file in expected if lines.get(file)]


def _check_checkpoints(run: Run, commit: Commit, read_all_files: bool) -> tuple[list[Checkpoint], list[str]]:
    """Return the retained checkpoints that have a manifest, newest first, and one line per problem of any of them."""
    checkpoints, lines = [], []
    for name in dict.fromkeys(name for pair in commit.kept for name in pair if name is not None):
        folder = f"{CHECKPOINTS_FOLDER}/{name}"
        try:
            checkpoint = Checkpoint(run, name)
        except DamagedError as error:
            lines.append(f"{folder}/{MANIFEST_FILE}: {error.what}")
            continue
        checkpoints.append(checkpoint)
        listed = set(run.storage.list(folder))
        missing = [file for file in checkpoint.files if file not in listed]
        lines += [f"{folder}/{file} is missing" for file in missing]
        if read_all_files and not missing:
            try:
                checkpoint.verify()
            except DamagedError as error:
                lines.append(f"{folder}: {error.what}")
    return checkpoints, lines


def _check_final_files(run: Run, state: JournalState) -> Iterator[str]:
    """Check the files that are written after the final commit, as a function of the journal alone."""
    commit = state.commit
    if commit is None or not commit.end:
        return
    try:
        if run.storage.read(RESULT_FILE) != encode_result(run.name, commit):
            yield f"{RESULT_FILE} is damaged; {REPAIR_HINT}"
    except FileNotFoundError:
        yield f"{RESULT_FILE} is missing; {REPAIR_HINT}"
    if not is_summary_current(run, state):
        yield f"{SUMMARY_FILE} is missing or damaged; {REPAIR_HINT}"


def is_finalized(run: Run) -> bool:
    """Whether all files that follow from the final commit exist and are correct."""
    return not any(_check_final_files(run, run.journal.read_state())) and run.read_summary().get("status") == "finished"


def is_summary_current(run: Run, state: JournalState) -> bool:
    """Whether `run.json` agrees with the journal. The URL is ignored: a copied run keeps that of the original."""
    expected, actual = from_json(encode_summary(run, state, "finished")), run.read_summary()
    return {**expected, "url": ""} == {**actual, "url": ""}
