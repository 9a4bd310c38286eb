"""Detection of missing and damaged files of a run, and its cost."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from pipeline.commands.show import show
from pipeline.runs.async_writer import AsyncRunWriter
from pipeline.runs.integrity import find_damage
from pipeline.runs.lease.attempt import acquire_lease
from pipeline.runs.run import Run
from pipeline.storage import Storage
from pipeline.storage.local import LocalBackend
from tests.runs.factories import create_run, make_block, make_evaluation, make_snapshot

MIDDLE_SEGMENT, LAST_SEGMENT = "metrics/steps/000003.parquet", "metrics/evals/000005.parquet"


@pytest.fixture(scope="module", params=["finished", "interrupted"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of 580 steps, in segments up to step 50, 100, 200, ..., 500, and in a last one if it is finished."""
    is_finished = request.param == "finished"
    run = create_run(str(tmp_path_factory.mktemp("runs")), first_cell_steps=50, cell_steps=100)
    attempt = acquire_lease(run, driver="d", metadata={})
    writer = AsyncRunWriter(attempt, keep=2)
    writer.log_steps(make_block(1, 300))
    writer.log_evaluation(make_evaluation(300))
    writer.commit(make_snapshot(300, best=300))
    writer.log_steps(make_block(301, 580))
    writer.commit(make_snapshot(580, best=300, is_final=is_finished))
    writer.finish()
    writer.close()
    attempt.close()
    return run


@pytest.mark.parametrize("name", [MIDDLE_SEGMENT, LAST_SEGMENT])
@pytest.mark.parametrize("damage", ["missing", "altered"])
def test_missing_segment_is_found_and_altered_segment_with_full_verification(
    trained: Run, name: str, damage: str
) -> None:
    path = Path(trained.url) / name
    data = path.read_bytes()
    assert find_damage(trained) == find_damage(trained, read_all_files=True) == []
    try:
        if damage == "missing":
            path.unlink()
        else:
            path.write_bytes(data[:-9] + bytes([data[-9] ^ 4]) + data[-8:])
        assert [line.split()[0] for line in show(trained.url, verify=True).damaged] == [name]
        quick = [line.split()[0] for line in show(trained.url).damaged]
        is_finished = trained.has_result()
        assert quick == ([name] if damage == "missing" or (name == LAST_SEGMENT and not is_finished) else [])
    finally:
        path.write_bytes(data)


def test_altered_checkpoint_is_found_with_full_verification(trained: Run) -> None:
    path = Path(trained.url) / "checkpoints/step-000000300-a0001/model.safetensors"
    data = path.read_bytes()
    try:
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert find_damage(trained) == []
        (line,) = find_damage(trained, read_all_files=True)
        assert "step-000000300-a0001" in line
        assert "model.safetensors was altered" in line
    finally:
        path.write_bytes(data)


class CountingBackend(LocalBackend):
    """Local storage that counts the requests for the metric log."""

    def __init__(self) -> None:
        self.requests: Counter[str] = Counter()

    def read(self, path: str) -> bytes:
        if "/metrics/" in path:
            self.requests["read"] += 1
        return super().read(path)

    def list(self, path: str) -> list[str]:
        if "/metrics/" in path:
            self.requests["list"] += 1
        return super().list(path)

    def exists(self, path: str) -> bool:
        if "/metrics/" in path:
            self.requests["exists"] += 1
        return super().exists(path)


@pytest.mark.parametrize("num_segments", [1, 60])
def test_requests_of_show_are_independent_of_log_length(tmp_path: Path, num_segments: int) -> None:
    run = create_run(str(tmp_path), cell_steps=10)
    attempt = acquire_lease(run, driver="d", metadata={})
    writer = AsyncRunWriter(attempt, keep=2)
    writer.log_steps(make_block(1, 10 * num_segments))
    writer.commit(make_snapshot(10 * num_segments))
    writer.finish()
    writer.close()
    attempt.close()
    assert len(run.storage.list("metrics/steps")) == num_segments
    backend = CountingBackend()
    assert find_damage(Run(Storage(backend, str(tmp_path), str(tmp_path)), "run")) == []
    assert backend.requests == {"read": 2, "list": 2}
