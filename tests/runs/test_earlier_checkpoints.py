"""Runs whose checkpoints contain the `state.pt` of an earlier version: they can be read but not resumed."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch

from pipeline.errors import InputError
from pipeline.runs import local_fallback
from pipeline.runs.async_writer import AsyncRunWriter, finish_ended_run
from pipeline.runs.checkpoints.checkpoint import DamagedError, find_checkpoint
from pipeline.runs.integrity import find_damage
from pipeline.runs.lease.attempt import Attempt, acquire_lease, refuse_pickled_state
from pipeline.runs.run import Run, open_run
from pipeline.storage import Storage
from tests.runs.earlier_checkpoints import contents, pickle_states
from tests.runs.factories import create_run, make_block, make_snapshot


def train(attempt: Attempt, *, end: bool = False) -> None:
    writer = AsyncRunWriter(attempt, keep=2)
    for step in (10, 20):
        writer.log_steps(make_block(step - 9, step))
        writer.commit(make_snapshot(step, best=10, is_final=end and step == 20))
        writer.finish()
    if not end:
        writer.write_exit("interrupted", None, 20)
    writer.close()
    attempt.close()


def run_of_earlier_version(storage: Path, *, end: bool = False) -> Run:
    run = create_run(str(storage))
    train(acquire_lease(run, driver="d", metadata={}), end=end)
    pickle_states(storage / "run")
    return Run(Storage.open(str(storage)), "run")


def test_an_interrupted_run_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of_earlier_version(tmp_path)
    locks = tmp_path / "locks"
    locks.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(locks))
    before = contents(tmp_path)
    for refused in (lambda: acquire_lease(run, driver="e", metadata={}), lambda: refuse_pickled_state(run)):
        with pytest.raises(InputError, match=r"started by an earlier version.*step 20 stores.*state\.pt") as caught:
            refused()
        assert caught.value.exit_code == 2
        assert caught.value.where.endswith("run/checkpoints/step-000000020-a0001")
        assert "the version that started it" in caught.value.fix
        assert "model.init_from: run@last" in caught.value.fix
    assert contents(tmp_path) == before, "no lock is left behind either"


def test_commands_that_do_not_resume_can_read_it(tmp_path: Path) -> None:
    run = run_of_earlier_version(tmp_path)
    last = find_checkpoint(run, "last")
    last.verify()
    assert torch.equal(last.load_weights()["0.weight"], torch.full((3, 4), 20.0))
    assert last.load_preprocess() == {"mean": 0.1307}
    assert find_damage(run, read_all_files=True) == []
    with pytest.raises(DamagedError, match=r"no state\.safetensors"):
        last.load_state()


def test_a_finished_run_is_completed(tmp_path: Path) -> None:
    run = run_of_earlier_version(tmp_path, end=True)
    before = contents(tmp_path / "run/metrics")
    for path in (tmp_path / "run/result.json", *(tmp_path / "run/metrics").rglob("*.parquet")):
        path.unlink()
    attempt = acquire_lease(run, driver="e", metadata={})
    assert attempt.resume_checkpoint is not None
    assert attempt.resume_checkpoint.is_final
    finish_ended_run(attempt, 2)
    assert run.has_result()
    assert contents(tmp_path / "run/metrics") == before


def test_a_finished_run_whose_end_is_damaged_is_refused(tmp_path: Path) -> None:
    """It would resume from the checkpoint before, up to the step of the end."""
    run = run_of_earlier_version(tmp_path, end=True)
    (tmp_path / "run/checkpoints/step-000000020-a0001/state.pt").write_bytes(b"")
    before = contents(tmp_path)
    with pytest.raises(InputError, match="step 10 stores"):
        acquire_lease(run, driver="e", metadata={})
    assert contents(tmp_path) == before


def test_run_without_a_valid_checkpoint_restarts(tmp_path: Path) -> None:
    run = run_of_earlier_version(tmp_path)
    for path in tmp_path.glob("run/checkpoints/*/model.safetensors"):
        path.write_bytes(b"")
    attempt = acquire_lease(run, driver="e", metadata={})
    assert attempt.resume_checkpoint is None
    assert attempt.damaged_checkpoints == ["step-000000020-a0001", "step-000000010-a0001"]
    train(attempt, end=True)
    assert run.has_result()


def test_local_save_of_an_earlier_version_is_refused_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINYARD_SPOOL", str(tmp_path / "spool"))
    run = create_run(str(tmp_path / "runs"))
    attempt = acquire_lease(run, driver="d", metadata={})
    writer = AsyncRunWriter(attempt, keep=2)
    writer.finish()
    writer._writer.save_locally(make_snapshot(10), [make_block(1, 10)], [])
    writer.close()
    attempt.close()
    (local_folder,) = (tmp_path / "spool").glob("*/run")
    pickle_states(local_folder)
    before = contents(tmp_path)
    with pytest.raises(InputError, match="step 10 stores") as caught:
        acquire_lease(run, driver="d", metadata={}, known_dead_attempt=1)
    assert contents(tmp_path) == before
    url, _, which = caught.value.fix.rpartition(" ")[2].partition("@")
    assert find_checkpoint(open_run(url, ""), which).step == 10
    assert local_fallback.has_pickled_state(run)
