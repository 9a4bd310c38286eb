"""Loaders: the same batches for any number of loader processes and any world size."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import AugmentConfig, ColorJitterConfig, DataLoaderConfig
from pipeline.data import device_transfer
from pipeline.data.augment import apply_augment, sample_mixup_lambda, sample_mixup_permutation, sample_params
from pipeline.data.loader import EvalLoader, TrainLoader
from pipeline.data.sampler import GlobalBatchSampler, rank_slice
from pipeline.data.sources import DatasetPart, open_dataset
from pipeline.data.sources.images.dataset import LazyImages
from pipeline.errors import DataError, WorkError
from tests.data.image_files import make_image_files, make_image_job, write_files
from tests.devices import require_device

ROOT = Path(__file__).parents[2]

DEVICES = ["cpu", "cuda, resident", "cuda, pinned"]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    kind, _, memory = request.param.partition(", ")
    device = require_device(kind)
    if memory == "pinned":
        monkeypatch.setattr(device_transfer, "MAX_RESIDENT_FRACTION", 0.0)
    return device


def make_part(rows: int = 60, shape: tuple[int, ...] = (4, 4)) -> DatasetPart:
    inputs = np.random.default_rng(0).integers(0, 256, (rows, *shape), dtype=np.uint8)
    return DatasetPart(inputs, np.arange(rows, dtype=np.int64))


def make_train_loader(data: DatasetPart, indices: np.ndarray, **changes: Any) -> TrainLoader:
    batch_size, shuffle = changes.pop("batch_size", 7), changes.pop("shuffle", True)
    members = changes.pop("members", 1)
    sampler = GlobalBatchSampler(len(indices), batch_size, shuffle=shuffle, seed=3, members=members)
    settings: dict[str, Any] = {
        "first_step": 1,
        "last_step": 3 * sampler.steps_per_epoch,
        "rank": 0,
        "world_size": 1,
        "loader_config": DataLoaderConfig(processes=changes.pop("processes", 0)),
        "device": torch.device("cpu"),
        "augment_config": AugmentConfig(),
        "seed": 5,
        "num_classes": len(data),
    }
    return TrainLoader(data, indices, sampler, **{**settings, **changes})


def collect_batches(loader: TrainLoader) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """Return copies of the batches made when they are yielded; transfers of later batches cannot change them."""
    with loader:
        batches = [(batch.step, batch.inputs.clone(), batch.targets.clone()) for batch in loader]
    assert len(batches) == len(loader)
    return [(step, inputs.cpu().numpy(), targets.cpu().numpy()) for step, inputs, targets in batches]


def assert_same_batches(actual: list[Any], expected: list[Any]) -> None:
    assert len(actual) == len(expected) > 0
    for batch, expected_batch in zip(actual, expected, strict=True):
        assert all(
            np.array_equal(a, b) and np.asarray(a).dtype == np.asarray(b).dtype
            for a, b in zip(batch, expected_batch, strict=True)
        )


ALL_AUGMENTATIONS = AugmentConfig(
    crop=1, flip=True, rotate=20, jitter=ColorJitterConfig(brightness=0.2, contrast=0.2, saturation=0.2), mixup=0.3
)

INDICES = np.arange(3, 56, 2)
"""27 rows: three batches of 7, and one of 6."""


@pytest.mark.parametrize("shuffle", [True, False])
def test_batches_match_the_epoch_permutation(device: torch.device, shuffle: bool) -> None:
    data = make_part()
    sampler = GlobalBatchSampler(len(INDICES), 7, shuffle=shuffle, seed=3)
    expected = [
        (step, data.inputs[INDICES[sampler.batch_indices(step)]], INDICES[sampler.batch_indices(step)])
        for step in range(1, 13)
    ]
    assert_same_batches(collect_batches(make_train_loader(data, INDICES, shuffle=shuffle, device=device)), expected)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("fetch_bytes", [1, 400, 1 << 20])
def test_loader_workers_do_not_change_batches(
    device: torch.device, processes: int, fetch_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.data.loader.FETCH_BYTES", fetch_bytes)
    changes: dict[str, Any] = {"augment_config": ALL_AUGMENTATIONS, "device": device, "world_size": 4, "rank": 1}
    changes["members"] = 2
    expected = collect_batches(make_train_loader(make_part(), INDICES, **changes))
    assert_same_batches(
        collect_batches(make_train_loader(make_part(), INDICES, processes=processes, **changes)), expected
    )
    assert multiprocessing.active_children() == []


@given(
    count=st.integers(1, 30),
    batch_size=st.integers(1, 12),
    world_size=st.integers(1, 4),
    first=st.integers(1, 20),
    augment=st.sampled_from([AugmentConfig(), AugmentConfig(crop=2, flip=True), ALL_AUGMENTATIONS]),
    members=st.integers(1, 3),
)
@settings(deadline=None, max_examples=40)
def test_shares_of_all_ranks_form_the_global_batch(
    count: int, batch_size: int, world_size: int, first: int, augment: AugmentConfig, members: int
) -> None:
    changes: dict[str, Any] = {"batch_size": batch_size, "augment_config": augment, "members": members}
    whole = collect_batches(make_train_loader(make_part(), np.arange(count), last_step=25, **changes))[first - 1 :]
    ranks = [
        collect_batches(
            make_train_loader(
                *(make_part(), np.arange(count)),
                first_step=first,
                last_step=25,
                rank=rank,
                world_size=world_size,
                **changes,
            )
        )
        for rank in range(world_size)
    ]
    together = [
        (step, *(np.concatenate([ranks[rank][position][part] for rank in range(world_size)]) for part in (1, 2)))
        for position, step in enumerate(range(first, 26))
    ]
    assert_same_batches(together, whole)
    assert all(len(inputs) % members == 0 for rank in ranks for _, inputs, _ in rank), "whole rows of all members"


def test_augmentation_is_sampled_for_the_global_batch(device: torch.device) -> None:
    data, config = make_part(), AugmentConfig(crop=2, flip=True)
    plain = collect_batches(make_train_loader(data, INDICES))
    expected = [
        (
            step,
            apply_augment(config, torch.from_numpy(inputs), sample_params(config, 5, step, len(inputs))).numpy(),
            indices,
        )
        for step, inputs, indices in plain
    ]
    assert_same_batches(
        collect_batches(make_train_loader(data, INDICES, augment_config=config, device=device)), expected
    )
    assert not np.array_equal(expected[0][1], plain[0][1])


@pytest.mark.parametrize("world_size", [1, 3])
def test_mixup_partners_come_from_the_global_batch(device: torch.device, world_size: int) -> None:
    data, config = make_part(), AugmentConfig(mixup=0.4)
    for rank in range(world_size):
        changes: dict[str, Any] = {"rank": rank, "world_size": world_size, "device": device, "last_step": 4}
        plain = collect_batches(make_train_loader(data, INDICES, **changes))
        whole = collect_batches(make_train_loader(data, INDICES, last_step=4))
        mixed = collect_batches(make_train_loader(data, INDICES, augment_config=config, **changes))
        for (_, _, indices), (_, _, batch), (step, inputs, targets) in zip(plain, whole, mixed, strict=True):
            local_slice = rank_slice(len(batch), rank, world_size)
            partners = batch[sample_mixup_permutation(5, step, len(batch))][local_slice]
            lam = sample_mixup_lambda(0.4, 5, step, len(batch))[local_slice]
            expected = np.zeros((len(indices), len(data)))
            np.add.at(expected, (np.arange(len(indices)), indices), lam)
            np.add.at(expected, (np.arange(len(indices)), partners), 1 - lam)
            assert inputs.dtype == targets.dtype == np.dtype("float32")
            assert np.allclose(targets, expected, atol=1e-6)
            weights = lam[:, None, None]
            assert np.allclose(
                inputs, weights * data.inputs[indices] + (1 - weights) * data.inputs[partners], atol=1e-3
            )


def test_mixup_of_regression_targets() -> None:
    data = make_part()
    numbers = DatasetPart(data.inputs, data.targets[:, None].astype(np.float64))
    (_, _, labels), *_ = collect_batches(make_train_loader(data, INDICES, augment_config=AugmentConfig(mixup=1)))
    (_, _, mixed), *_ = collect_batches(
        make_train_loader(numbers, INDICES, augment_config=AugmentConfig(mixup=1), num_classes=0)
    )
    assert mixed.dtype == np.float64
    assert np.allclose(mixed[:, 0], labels @ np.arange(len(data)), atol=1e-4)


def test_augmenting_columns_is_rejected() -> None:
    with pytest.raises(DataError, match=r"data\.augment"):
        make_train_loader(make_part(shape=(4,)), INDICES, augment_config=AugmentConfig(flip=True))


def test_loader_without_steps_is_empty() -> None:
    for processes in (0, 1):
        loader = make_train_loader(make_part(), INDICES, first_step=5, last_step=4, processes=processes)
        assert (len(loader), list(loader)) == (0, [])


@given(
    rows=st.lists(st.integers(0, 59), min_size=1, unique=True).map(sorted),
    batch_size=st.integers(1, 20),
    world_size=st.integers(1, 4),
)
@settings(deadline=None)
def test_evaluation_yields_each_row_once(rows: list[int], batch_size: int, world_size: int) -> None:
    data, indices = make_part(), np.array(rows)
    targets_by_batch: list[torch.Tensor] = []
    for rank in range(world_size):
        loader = EvalLoader(
            *(data, indices),
            rank=rank,
            world_size=world_size,
            batch_size=batch_size,
            device=torch.device("cpu"),
        )
        batches = list(loader)
        assert len(batches) == len(loader)
        assert all(1 <= len(targets) <= batch_size for _, targets in batches)
        assert all(torch.equal(inputs, torch.from_numpy(data.inputs)[targets]) for inputs, targets in batches)
        assert len(list(loader)) == len(batches)  # can be iterated again
        targets_by_batch += [targets for _, targets in batches]
    assert torch.cat(targets_by_batch).tolist() == rows


def test_evaluation_on_each_device(device: torch.device) -> None:
    data = make_part()
    for indices in (np.arange(10, 40), INDICES):
        batches = list(EvalLoader(data, indices, rank=0, world_size=1, batch_size=8, device=device))
        assert all(inputs.device.type == targets.device.type == device.type for inputs, targets in batches)
        assert torch.equal(torch.cat([targets.cpu() for _, targets in batches]), torch.from_numpy(indices))
        assert torch.equal(torch.cat([inputs.cpu() for inputs, _ in batches]), torch.from_numpy(data.inputs[indices]))


def test_consecutive_rows_are_not_copied() -> None:
    data = make_part()
    (inputs, targets), *_ = EvalLoader(
        data, np.arange(10, 40), rank=0, world_size=1, batch_size=8, device=torch.device("cpu")
    )
    assert np.shares_memory(inputs.numpy(), data.inputs)
    assert np.shares_memory(targets.numpy(), data.targets)


def test_read_only_arrays_can_be_loaded() -> None:
    data = make_part()
    for values in (data.inputs, data.targets):
        values.flags.writeable = False
    assert len(collect_batches(make_train_loader(data, INDICES))) == 12


def test_memory_mapped_arrays_are_not_copied_on_cpu(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_transfer, "COPY_BLOCK_BYTES", 100)  # several blocks per copy to a GPU
    data = make_part()
    np.save(tmp_path / "inputs.npy", data.inputs)
    mapped = DatasetPart(np.load(tmp_path / "inputs.npy", mmap_mode="r"), data.targets)
    assert_same_batches(
        collect_batches(make_train_loader(mapped, INDICES, device=device)),
        collect_batches(make_train_loader(data, INDICES, device=device)),
    )
    on_cpu = device_transfer.to_tensors(mapped, INDICES, torch.device("cpu"))
    assert isinstance(on_cpu.inputs, torch.Tensor)
    assert np.shares_memory(on_cpu.inputs.numpy(), mapped.inputs)


@pytest.fixture
def make_image_part(tmp_path: Path) -> Callable[[float], DatasetPart]:
    """Return a function that opens the same images, in memory or decoded on demand."""
    url = write_files(tmp_path / "pictures", make_image_files(per_class=20))

    def open_part(in_memory_mb: float) -> DatasetPart:
        cache = {"in_memory_mb": in_memory_mb, "max_gb": 1e-5, "folder": str(tmp_path / "cache")}
        return open_dataset(make_image_job(url, cache=cache, resize=[9, 8])).train

    return open_part


@pytest.mark.parametrize("processes", [0, 2])
@pytest.mark.parametrize("augment", [AugmentConfig(), ALL_AUGMENTATIONS])
def test_lazy_images_match_images_in_memory(
    device: torch.device, make_image_part: Callable[[float], DatasetPart], processes: int, augment: AugmentConfig
) -> None:
    in_memory, on_demand = make_image_part(1), make_image_part(0)
    assert isinstance(on_demand.inputs, LazyImages)
    changes: dict[str, Any] = {"augment_config": augment, "device": device, "world_size": 3, "rank": 1}
    expected = collect_batches(make_train_loader(in_memory, INDICES, **changes))
    actual = collect_batches(make_train_loader(on_demand, INDICES, processes=processes, **changes))
    assert_same_batches(actual, expected)
    for indices in (np.arange(10, 40), INDICES):
        loaders = [
            EvalLoader(data, indices, rank=0, world_size=2, batch_size=8, device=device)
            for data in (in_memory, on_demand)
        ]
        for pair, lazy_pair in zip(*loaders, strict=True):
            assert all(torch.equal(values, lazy_values) for values, lazy_values in zip(pair, lazy_pair, strict=True))


@pytest.mark.parametrize("processes", [0, 1])
def test_broken_image_ends_training(
    make_image_part: Callable[[float], DatasetPart], tmp_path: Path, processes: int
) -> None:
    (tmp_path / "pictures/bee/7.png").write_bytes(b"no picture")
    on_demand = make_image_part(0)
    with (
        make_train_loader(on_demand, np.arange(60), processes=processes) as loader,
        pytest.raises(
            WorkError,
            match=r"^data\.url: .*: the image bee/7\.png is broken: not an image format of Pillow",
        ),
    ):
        for _ in loader:
            pass
    assert multiprocessing.active_children() == []


def make_endless_loader(processes: int = 2) -> TrainLoader:
    return make_train_loader(make_part(), INDICES, processes=processes, last_step=10**6)


def test_global_torch_rng_is_unchanged() -> None:
    before = torch.get_rng_state()
    collect_batches(make_train_loader(make_part(), INDICES, processes=1, augment_config=AugmentConfig(flip=True)))
    assert torch.equal(torch.get_rng_state(), before)


def test_early_close_ends_the_workers() -> None:
    with make_endless_loader() as loader:
        batches = iter(loader)
        next(batches)
        assert len(multiprocessing.active_children()) == 2
    assert multiprocessing.active_children() == []


SIGNALLED_SCRIPT = """
import os, signal, sys
sys.path.insert(0, ".")
from tests.data.test_loader import make_endless_loader
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
for number in SIGNALS:
    signal.signal(number, lambda *_: None)
batches = iter(make_endless_loader(processes=1))
next(batches)
for number in SIGNALS:
    os.killpg(0, number)
import multiprocessing, subprocess
child = multiprocessing.active_children()[0].pid
subprocess.run(["kill", str(child)], check=True)  # Ray sends it to each process of a job that is stopped
for _ in range(30_000):  # more than is prefetched
    last = next(batches)
print(last.step)
"""


def test_workers_ignore_group_signals_and_end_with_the_process() -> None:
    # Ctrl-C and a shell's kill signal the whole process group, but the worker has to finish its step and save.
    done = subprocess.run(
        [sys.executable, "-c", SIGNALLED_SCRIPT],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        start_new_session=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "30001\n", "")


def test_killed_loader_worker_is_an_error() -> None:
    with make_endless_loader() as loader:
        batches = iter(loader)
        next(batches)
        assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL  # torch's handler would raise anywhere
        child = multiprocessing.active_children()[0]
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        with pytest.raises(WorkError, match=r"data\.loader\.processes"):
            for _ in batches:
                pass


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def has_exited(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.skipif(sys.platform != "linux", reason="only on Linux do they exit at once; elsewhere within five seconds")
def test_loader_workers_exit_when_their_parent_is_killed() -> None:
    program = """
import multiprocessing, sys, time
import torch.utils.data
torch.utils.data._utils.worker.MP_STATUS_CHECK_INTERVAL = 3600  # torch's check would end them too, after five seconds
sys.path.insert(0, ".")
from tests.data.test_loader import make_endless_loader
batches = iter(make_endless_loader())
next(batches)
print(*[child.pid for child in multiprocessing.active_children()], flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        pids = [int(pid) for pid in worker.stdout.readline().split()]
        worker.kill()
    assert len(pids) == 2
    assert wait_until(lambda: all(has_exited(pid) for pid in pids), seconds=60)
