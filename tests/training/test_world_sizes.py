"""The same loss curve on any number of workers: real processes against a plain torch loop."""

from __future__ import annotations

import multiprocessing
import queue
import signal
import socket
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.config import JobConfig
from pipeline.models import build_model
from pipeline.training.schedule import TrainingSchedule
from tests.training import distributed_helpers
from tests.training.distributed_helpers import CONFIGURATIONS, SIGNALS, FakeContext, make_data, make_job

Outcomes = dict[tuple[str, int], list[Any]]


@pytest.fixture(scope="module")
def outcomes() -> Outcomes:
    """Run all cases with two and three processes, and return the result of each rank, by case and world size."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    spawn = multiprocessing.get_context("spawn")
    results = spawn.Queue()
    processes = [
        spawn.Process(target=distributed_helpers.run_rank, args=(rank, address, results), daemon=True)
        for rank in range(3)
    ]
    for process in processes:
        process.start()
    outcomes_by_rank: Outcomes = {}
    expected = (len(CONFIGURATIONS) + 3) * (2 + 3) + len(SIGNALS) * 3
    while expected:
        try:
            name, world_size, rank, value = results.get(timeout=1)
        except queue.Empty:
            codes = [process.exitcode for process in processes]
            assert not any(codes), f"a rank failed; exit codes {codes}"
            continue
        expected -= 1
        outcomes_by_rank.setdefault((name, world_size), [None] * world_size)[rank] = value
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    return outcomes_by_rank


def train_with_torch(job: JobConfig) -> tuple[list[float], dict[str, Tensor]]:
    """Train by plain torch in one process on the same batches; return the loss of each step and the final weights."""
    inputs, targets = make_data(job)
    schedule, kind = TrainingSchedule(job, len(inputs)), job.task.kind
    model = build_model(
        job, (distributed_helpers.FEATURES,), {"multiclass": 3, "binary": 1, "regression": 2}[kind], 7
    ).double()
    weight: Tensor | None = None
    if job.task.class_weights == "balanced":
        counts = (
            distributed_helpers.COUNTS
            if kind == "multiclass"
            else [distributed_helpers.COUNTS[0], sum(distributed_helpers.COUNTS[1:])]
        )
        weight = torch.tensor([sum(counts) / (len(counts) * count) for count in counts], dtype=torch.float64)
    elif job.task.class_weights is not None:
        weight = torch.tensor([job.task.class_weights.get(label, 1.0) for label in range(3)], dtype=torch.float64)
    config = job.train.optimizer

    def make_optimizer() -> torch.optim.Optimizer:
        if config.kind == "adam":
            return torch.optim.Adam(model.parameters(), lr=1.0)
        return torch.optim.SGD(
            model.parameters(), 1.0, config.momentum, weight_decay=config.weight_decay, nesterov=config.nesterov
        )

    optimizer, losses = make_optimizer(), []
    for step in range(1, schedule.last_step + 1):
        if schedule.should_reset_optimizer(step):
            optimizer = make_optimizer()
        indices = distributed_helpers.global_indices(schedule, step).flatten()
        outputs, batch_targets = model(inputs[indices].double()), targets[indices]
        if kind == "multiclass":
            loss = nn.functional.cross_entropy(outputs, batch_targets, weight)
        elif kind == "binary":
            sample_weights = (
                torch.ones(len(indices), dtype=torch.float64) if weight is None else weight[batch_targets.long()]
            )
            loss = nn.functional.binary_cross_entropy_with_logits(
                outputs[:, 0], batch_targets.double(), sample_weights, reduction="sum"
            )
            loss = loss / sample_weights.sum()
        else:
            loss = nn.functional.mse_loss(outputs, batch_targets.double())
        optimizer.zero_grad()
        loss.backward()
        if job.train.clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), job.train.clip_norm)
        optimizer.param_groups[0]["lr"] = schedule.lr_at(step)
        optimizer.step()
        losses.append(loss.item())
    return losses, model.state_dict()


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_fp64_curves_match_plain_torch_for_any_world_size(name: str, outcomes: Outcomes) -> None:
    job = make_job(**CONFIGURATIONS[name])
    losses, weights = train_with_torch(job)
    results = [distributed_helpers.run_outcome(job, FakeContext()), *outcomes[name, 2], *outcomes[name, 3]]
    for rank_outcome in results:
        assert rank_outcome["loss"] == pytest.approx(losses, rel=1e-9)
        assert rank_outcome["samples"] == [
            len(distributed_helpers.global_indices(TrainingSchedule(job, 23), step))  # rows, not times members
            for step in range(1, len(losses) + 1)
        ]
        assert rank_outcome["correct"] == pytest.approx(results[0]["correct"], nan_ok=True)
        assert list(rank_outcome["weights"]) == list(weights)
        for tensor, reference in zip(rank_outcome["weights"].values(), weights.values(), strict=True):
            torch.testing.assert_close(torch.tensor(tensor, dtype=torch.float64), reference, rtol=1e-9, atol=1e-12)
        assert rank_outcome["evaluations"] == pytest.approx(results[0]["evaluations"], rel=1e-9, nan_ok=True)
    for world_size in (2, 3):
        ranks = outcomes[name, world_size]
        assert all(rank["loss"] == ranks[0]["loss"] for rank in ranks), "bit-identical"
        assert all(rank["weights"] == ranks[0]["weights"] for rank in ranks), "bit-identical"
        for rank in ranks:
            np.testing.assert_array_equal(list(rank["evaluations"].values()), list(ranks[0]["evaluations"].values()))


def test_fp32_first_gradients_match(outcomes: Outcomes) -> None:
    single = torch.tensor(distributed_helpers.first_gradient(make_job(**distributed_helpers.FLOAT32), FakeContext()))
    for gradient in (*outcomes["fp32", 2], *outcomes["fp32", 3]):
        assert float((torch.tensor(gradient) - single).norm() / single.norm()) < 1e-5


def test_ranks_with_batch_norm_have_identical_buffers(outcomes: Outcomes) -> None:
    for world_size in (2, 3):
        first, *others = outcomes["norm", world_size]
        floating = [name for name in first["weights"] if not name.endswith("num_batches_tracked")]
        assert any(name.endswith("running_mean") for name in floating)
        assert all(other["weights"][name] == first["weights"][name] for other in others for name in floating)


def test_all_ranks_stop_at_the_same_step_on_a_signal(outcomes: Outcomes) -> None:
    assert outcomes["one rank is interrupted", 3] == [(4, signal.SIGINT, False)] * 3
    assert outcomes["one rank is terminated, another interrupted", 3] == [(3, signal.SIGTERM, False)] * 3
    assert outcomes["all ranks are terminated", 3] == [(6, signal.SIGTERM, False)] * 3


def test_all_ranks_report_a_nonfinite_loss_at_its_step(outcomes: Outcomes) -> None:
    results = [
        distributed_helpers.nonfinite_message(FakeContext()),
        *outcomes["diverged", 2],
        *outcomes["diverged", 3],
    ]
    assert set(results) == {"the loss is nan at step 3, with learning rate 0.3"}
