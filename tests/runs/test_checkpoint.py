"""Checkpoints: written files are read back, and damage is detected."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.errors import StorageError
from pipeline.runs.async_writer import AsyncRunWriter
from pipeline.runs.checkpoints.checkpoint import Checkpoint, DamagedError, find_checkpoint, find_first_valid
from pipeline.runs.checkpoints.format import decode_tensors, delete_checkpoint, encode_tensors, write_checkpoint
from pipeline.runs.journal.entries import BestCheckpoint
from pipeline.runs.lease.attempt import Attempt, acquire_lease
from pipeline.runs.run import Run
from tests.runs.factories import create_run, make_block, make_snapshot

CHECKPOINT_NAME = "step-000000010-a0001"
METADATA = {"step": 10, "epoch": 1, "end": False, "position": {"x": [1, 2.5]}, "metrics": {"val/loss": 0.1}}
METADATA |= {"best": None, "first_cell": 3}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = create_run(str(tmp_path))
    files = {"a.bin": b"content", "b.bin": b""}
    write_checkpoint(run.storage, CHECKPOINT_NAME, files, METADATA)
    return run


def checkpoint_folder(run: Run) -> Path:
    local = run.storage.local_path
    assert local is not None
    return local / "checkpoints" / CHECKPOINT_NAME


def test_checkpoint_round_trip(run: Run) -> None:
    checkpoint = Checkpoint(run, CHECKPOINT_NAME)
    checkpoint.verify()
    assert (checkpoint.step, checkpoint.epoch, checkpoint.is_final, checkpoint.first_segment) == (10, 1, False, 3)
    assert checkpoint.position == {"x": [1, 2.5]}
    assert checkpoint.metrics == {"val/loss": 0.1}
    assert checkpoint.best is None
    assert checkpoint.read("a.bin") == b"content"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("a.bin", b"conten", "6 bytes instead of 7"),
        ("a.bin", b"Content", "altered"),
        ("a.bin", None, "missing"),
        ("b.bin", b"x", "1 bytes instead of 0"),
        ("manifest.json", None, "no manifest"),
        ("manifest.json", b"{", "manifest is damaged"),
        ("manifest.json", b"\xff", "manifest is damaged"),
        ("manifest.json", b"[]", "manifest is damaged"),
        ("manifest.json", b"{}", "altered"),
    ],
)
def test_damage_is_detected(run: Run, file: str, content: bytes | None, message: str) -> None:
    if content is None:
        (checkpoint_folder(run) / file).unlink()
    else:
        (checkpoint_folder(run) / file).write_bytes(content)
    with pytest.raises(DamagedError, match=message) as caught:
        Checkpoint(run, CHECKPOINT_NAME).verify()
    assert caught.value.exit_code == 2
    assert find_first_valid(run, ((CHECKPOINT_NAME, None),)) == (None, [CHECKPOINT_NAME])


def test_inconsistent_manifest_is_detected(run: Run) -> None:
    path = checkpoint_folder(run) / "manifest.json"
    tree = json.loads(path.read_text())
    path.write_text(json.dumps({**tree, "step": 11}))
    with pytest.raises(DamagedError, match="altered"):
        Checkpoint(run, CHECKPOINT_NAME)


def test_deleted_checkpoint_leaves_nothing(run: Run) -> None:
    delete_checkpoint(run.storage, CHECKPOINT_NAME)
    assert not checkpoint_folder(run).exists()
    delete_checkpoint(run.storage, CHECKPOINT_NAME)


def test_checkpoint_is_valid_only_with_its_best(run: Run) -> None:
    write_checkpoint(run.storage, "step-000000020-a0001", {"a": b"1"}, METADATA)
    checkpoint, damaged = find_first_valid(
        run, (("step-000000020-a0001", "step-000000015-a0001"), (CHECKPOINT_NAME, CHECKPOINT_NAME))
    )
    assert checkpoint is not None
    assert checkpoint.name == CHECKPOINT_NAME
    assert damaged == ["step-000000015-a0001"]


def test_weights_are_deterministic_safetensors(tmp_path: Path) -> None:
    flat = torch.arange(12.0)
    tied = torch.ones(2, 2)
    weights = {
        "1.weight": flat[:8].view(2, 4),
        "1.bias": flat[8:],
        "head": tied,
        "tail": tied,
        "t": torch.ones(3, 2).T,
        "count": torch.tensor(7),
        "half": torch.ones(2, dtype=torch.bfloat16),
    }
    data = encode_tensors(weights)
    assert data == encode_tensors({name: tensor.clone() for name, tensor in weights.items()})
    (tmp_path / "w.safetensors").write_bytes(data)
    loaded = load_file(tmp_path / "w.safetensors")
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)


def test_state_keeps_types_shapes_and_bits() -> None:
    halves = torch.tensor([0x7FC1, 0x8000, 0x0001, 0xFF80], dtype=torch.uint16).view(torch.bfloat16)
    state = {
        "optimizer.momentum": torch.tensor([0.1, -0.0, float("nan"), float("-inf"), 1e-45]),
        "optimizer.step": torch.tensor(7.0),
        "scale.skipped": torch.tensor(2**62 + 1),
        "scale.good_steps": torch.tensor(3, dtype=torch.int32),
        "double": torch.tensor([[1 / 3]], dtype=torch.float64),
        "flag": torch.tensor([True, False]),
        "halves": halves,
        "empty": torch.zeros(0, 3),
        "also.empty": torch.zeros(0),
    }
    data = encode_tensors(state)
    assert data == encode_tensors({name: tensor.clone() for name, tensor in state.items()})
    loaded = decode_tensors(data)
    assert loaded.keys() == state.keys()
    for name, tensor in state.items():
        assert (loaded[name].dtype, loaded[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(loaded[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name
    assert decode_tensors(encode_tensors({})) == {}


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Run, Attempt]:
    run = create_run(str(tmp_path))
    attempt = acquire_lease(run, driver="d", metadata={})
    writer = AsyncRunWriter(attempt, keep=2)
    for last, best in ((10, 10), (20, 10), (30, 25), (40, 25)):
        writer.log_steps(make_block(last - 9, last))
        extra = {"best_weights": {"0.weight": torch.full((3, 4), 25.0)}} if last == 30 else {}
        writer.commit(make_snapshot(last, best=best, **extra))
    writer.finish()
    writer.close()
    attempt.close()
    return run, attempt


def test_checkpoints_are_found_by_user_reference(trained: tuple[Run, Attempt]) -> None:
    run, _ = trained
    last, best = find_checkpoint(run, "last"), find_checkpoint(run, "best")
    assert (last.step, best.step) == (40, 25)
    assert find_checkpoint(run, "30").name == "step-000000030-a0001"
    assert torch.equal(best.load_weights()["0.weight"], torch.full((3, 4), 25.0))
    assert best.load_preprocess() == {"mean": 0.1307}
    assert last.best == BestCheckpoint(metric="val/loss", step=25, value=0.04, checkpoint=best.name)
    for reference in ("99", "newest", "-1"):
        with pytest.raises(StorageError, match="steps 25, 30, 40"):
            find_checkpoint(run, reference)
    with pytest.raises(StorageError, match="no checkpoint yet"):
        find_checkpoint(create_run(run.root_url, "other"), "last")


def test_state_loads_without_running_code(trained: tuple[Run, Attempt]) -> None:
    run, _ = trained
    state = find_checkpoint(run, "last").load_state()
    assert state["optimizer.step"].dtype == torch.int64
    assert state["optimizer.step"].item() == 40
    assert torch.equal(state["optimizer.momentum"], torch.full((12,), 0.5))
    assert run.storage.list("checkpoints") == [f"step-0000000{step}-a0001" for step in (25, 30, 40)]
    assert run.storage.list("checkpoints/step-000000040-a0001") == [
        "manifest.json", "model.safetensors", "preprocess.json", "rows.parquet", "state.safetensors",
    ]  # fmt: skip
    assert run.storage.list("checkpoints/step-000000025-a0001") == [
        "manifest.json", "model.safetensors", "preprocess.json",
    ]  # fmt: skip
