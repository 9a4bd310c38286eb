"""The sampler: global batches depend only on (seed, epoch, step), and ranks take slices of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.sampler import GlobalBatchSampler, rank_slice

SAMPLER_SIZES = {"rows": st.integers(1, 200), "batch_size": st.integers(1, 250), "seed": st.integers(0, 9)}


@given(**SAMPLER_SIZES, shuffle=st.booleans(), epoch=st.integers(1, 5))
@settings(deadline=None)
def test_epoch_contains_every_row_once(rows: int, batch_size: int, seed: int, shuffle: bool, epoch: int) -> None:
    sampler = GlobalBatchSampler(rows, batch_size, shuffle=shuffle, seed=seed)
    first = (epoch - 1) * sampler.steps_per_epoch + 1
    parts = [sampler.batch_indices(step) for step in range(first, first + sampler.steps_per_epoch)]
    assert all(len(part) == batch_size for part in parts[:-1])
    assert 1 <= len(parts[-1]) <= batch_size
    assert [sampler.epoch_and_position(first + n) for n in range(len(parts))] == [(epoch, n) for n in range(len(parts))]
    joined = np.concatenate(parts)
    assert np.array_equal(np.sort(joined), np.arange(rows))
    if not shuffle:
        assert np.array_equal(joined, np.arange(rows))


@given(**SAMPLER_SIZES, steps=st.lists(st.integers(1, 400), min_size=1, max_size=6))
@settings(deadline=None)
def test_steps_can_be_accessed_in_any_order(rows: int, batch_size: int, seed: int, steps: list[int]) -> None:
    sampler = GlobalBatchSampler(rows, batch_size, shuffle=True, seed=seed)
    for step in steps:
        new_sampler = GlobalBatchSampler(rows, batch_size, shuffle=True, seed=seed)
        assert np.array_equal(sampler.batch_indices(step), new_sampler.batch_indices(step))


@given(**SAMPLER_SIZES, members=st.integers(1, 5), shuffle=st.booleans(), epoch=st.integers(1, 3))
@settings(deadline=None)
def test_each_member_takes_each_row_once_in_its_own_order(
    rows: int, batch_size: int, seed: int, members: int, shuffle: bool, epoch: int
) -> None:
    sampler = GlobalBatchSampler(rows, batch_size, shuffle=shuffle, seed=seed, members=members)
    single = GlobalBatchSampler(rows, batch_size, shuffle=shuffle, seed=seed)
    assert sampler.steps_per_epoch == single.steps_per_epoch
    first = (epoch - 1) * sampler.steps_per_epoch + 1
    steps = range(first, first + sampler.steps_per_epoch)
    batches = [sampler.batch_indices(step).reshape(-1, members) for step in steps]
    for step, batch in zip(steps, batches, strict=True):
        assert np.array_equal(batch[:, 0], single.batch_indices(step)), "the first member has a single model's batches"
    orders = np.concatenate(batches)
    assert (np.sort(orders, 0) == np.arange(rows)[:, None]).all()
    if rows > 30:
        assert len({tuple(order) for order in orders.T}) == (members if shuffle else 1)
    fewer = GlobalBatchSampler(rows, batch_size, shuffle=shuffle, seed=seed, members=members + 1)
    assert np.array_equal(fewer.epoch_permutation(epoch).reshape(rows, -1)[:, :members], orders), (
        "the order of a member does not depend on their number"
    )


def test_epochs_and_seeds_differ() -> None:
    sampler, other_sampler = (GlobalBatchSampler(1000, 1000, shuffle=True, seed=seed) for seed in (1, 2))
    assert not np.array_equal(sampler.batch_indices(1), sampler.batch_indices(2))
    assert not np.array_equal(sampler.batch_indices(1), other_sampler.batch_indices(1))


@given(count=st.integers(0, 300), world_size=st.integers(1, 9))
def test_rank_slices_partition_the_batch(count: int, world_size: int) -> None:
    everything = np.arange(count)
    parts = [everything[rank_slice(count, rank, world_size)] for rank in range(world_size)]
    assert np.array_equal(np.concatenate(parts), everything)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(("rows", "batch_size"), [(0, 1), (1, 0)])
def test_empty_data_is_rejected(rows: int, batch_size: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        GlobalBatchSampler(rows, batch_size, shuffle=True, seed=1)
