"""Damage to any file of a stored run. A resume gives the result of an undamaged run or reports what is wrong, and
`show --verify` names what cannot be restored."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from pipeline import train
from pipeline.commands.show import show
from pipeline.errors import InputError
from pipeline.runs.checkpoints.checkpoint import Checkpoint, DamagedError
from pipeline.runs.run import open_run
from tests.process_kill.run_assertions import final_state
from tests.security.corruption import ExampleRuns

CopyRun = Callable[[str], Path]


def files_of(run: Path) -> list[str]:
    return sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file() and ".tmp" not in path.parts)


def damage(data: bytes, how: str, where: float, bit: int) -> bytes | None:
    """Return the damaged content, or None for a deleted file."""
    offset = min(int(where * len(data)), max(0, len(data) - 1))
    if how == "delete":
        return None
    if how == "truncate":
        return data[:offset]
    if how == "flip" and data:
        return data[:offset] + bytes([data[offset] ^ 1 << bit]) + data[offset + 1 :]
    if how == "zeros":
        return bytes(len(data))
    return b"\xff\x00garbage" * 3


damage_kinds = st.tuples(
    st.sampled_from(["flip", "flip", "flip", "truncate", "delete", "zeros", "garbage"]),
    st.floats(0, 1, exclude_max=True),
    st.integers(0, 7),
)
numbers = itertools.count()


def check_damaged(
    example_runs: ExampleRuns, folder: Path, which: str, choice: float, how: tuple[str, float, int]
) -> str:
    """Damage one file of a copied run, resume it, and return what happened."""
    source = example_runs.interrupted if which == "interrupted" else example_runs.finished
    storage = folder / str(next(numbers))
    run = Path(shutil.copytree(source, storage / source.name))
    names = files_of(run)
    name = names[int(choice * len(names))]
    content = damage((run / name).read_bytes(), *how)
    if content is None:
        (run / name).unlink()
    else:
        (run / name).write_bytes(content)
    description = f"{which}, {name}, {how}"
    try:
        try:
            train(example_runs.job, storage=str(storage))
        except InputError as error:
            refusal: InputError | None = error
        else:
            refusal = None
        if refusal is not None:
            assert refusal.where, description
            assert "Traceback" not in str(refusal), description
            return "refused"
        damaged_files = show(source.name, str(storage), verify=True).damaged
        expected = final_state(example_runs.finished)
        try:
            state: dict[str, Any] = final_state(run)
        except Exception:  # pyarrow and safetensors may raise anything for a damaged file
            state = {}
        if state != expected and name.startswith("checkpoints/"):  # of a finished run: detected when it is read
            with pytest.raises(DamagedError):
                Checkpoint(open_run(str(run), ""), name.split("/")[1]).verify()
            return "detected"
        if state != expected:
            assert any(name in line for line in damaged_files), f"{description}: silent"
            differ = {key for key in expected if state and expected[key] != state[key]}
            assert differ <= {"steps", "evals"}, f"{description}: {differ}"
            return "named"
        return "restored"
    finally:
        shutil.rmtree(storage)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    which=st.sampled_from(["interrupted", "interrupted", "finished"]),
    choice=st.floats(0, 1, exclude_max=True),
    how=damage_kinds,
)
def test_any_damage_is_repaired_or_named(
    example_runs: ExampleRuns, tmp_path: Path, which: str, choice: float, how: tuple[str, float, int]
) -> None:
    check_damaged(example_runs, tmp_path, which, choice, how)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(which=st.sampled_from(["interrupted", "finished"]), choice=st.floats(0, 1, exclude_max=True), how=damage_kinds)
def test_many_damages_are_repaired_or_named(
    example_runs: ExampleRuns, tmp_path: Path, which: str, choice: float, how: tuple[str, float, int]
) -> None:
    check_damaged(example_runs, tmp_path, which, choice, how)
