"""Global batches: a function of (seed, epoch, step), and their shares."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.sampler import GlobalBatches, share

SIZES = {"rows": st.integers(1, 200), "batch_size": st.integers(1, 250), "seed": st.integers(0, 9)}


@given(**SIZES, shuffle=st.booleans(), epoch=st.integers(1, 5))
@settings(deadline=None)
def test_an_epoch_is_every_row_once(rows: int, batch_size: int, seed: int, shuffle: bool, epoch: int) -> None:
    batches = GlobalBatches(rows, batch_size, shuffle=shuffle, seed=seed)
    first = (epoch - 1) * batches.steps_per_epoch + 1
    parts = [batches.indices(step) for step in range(first, first + batches.steps_per_epoch)]
    assert all(len(part) == batch_size for part in parts[:-1])
    assert 1 <= len(parts[-1]) <= batch_size
    assert [batches.locate(first + n) for n in range(len(parts))] == [(epoch, n) for n in range(len(parts))]
    together = np.concatenate(parts)
    assert np.array_equal(np.sort(together), np.arange(rows))
    if not shuffle:
        assert np.array_equal(together, np.arange(rows))


@given(**SIZES, steps=st.lists(st.integers(1, 400), min_size=1, max_size=6))
@settings(deadline=None)
def test_any_step_can_be_asked_for_at_any_time(rows: int, batch_size: int, seed: int, steps: list[int]) -> None:
    seeking = GlobalBatches(rows, batch_size, shuffle=True, seed=seed)
    for step in steps:
        fresh = GlobalBatches(rows, batch_size, shuffle=True, seed=seed)
        assert np.array_equal(seeking.indices(step), fresh.indices(step))


def test_epochs_and_seeds_differ() -> None:
    batches, other = (GlobalBatches(1000, 1000, shuffle=True, seed=seed) for seed in (1, 2))
    assert not np.array_equal(batches.indices(1), batches.indices(2))
    assert not np.array_equal(batches.indices(1), other.indices(1))


@given(count=st.integers(0, 300), world_size=st.integers(1, 9))
def test_shares_partition(count: int, world_size: int) -> None:
    everything = np.arange(count)
    parts = [everything[share(count, rank, world_size)] for rank in range(world_size)]
    assert np.array_equal(np.concatenate(parts), everything)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(("rows", "batch_size"), [(0, 1), (1, 0)])
def test_nothing_to_batch_is_refused(rows: int, batch_size: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        GlobalBatches(rows, batch_size, shuffle=True, seed=1)
