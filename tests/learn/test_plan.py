"""The plan: what happens at each step, against torch's schedulers and plain counting."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from pipeline.job import Job
from pipeline.job_file import build_job
from pipeline.learn.plan import FIRST_CELL_STEPS, MAX_CELLS, MIN_CELL_STEPS, Plan
from pipeline.record.cells import CellLayout


def plan(rows: int = 10, max_steps: int | None = None, **train: Any) -> Plan:
    return Plan(job(train={"batch_size": 5, **train}), rows, max_steps)


def job(**tree: Any) -> Job:
    return build_job({"name": "plan", **tree}, "here")


def torch_rates(steps: int, build: Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch counts optimizer steps, of which there are none here
        scheduler, rates = build(optimizer), []
        for _ in range(steps):
            rates.append(optimizer.param_groups[0]["lr"])
            scheduler.step()
    return rates


SCHEDULES: list[tuple[dict[str, Any], Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]]] = [
    ({}, lambda o: lr_scheduler.ConstantLR(o, factor=1.0)),
    ({"schedule": "cosine"}, lambda o: lr_scheduler.LambdaLR(o, lambda step: cosine(step, 40))),
    ({"schedule": "step", "every_epochs": 3, "factor": 0.5}, lambda o: lr_scheduler.StepLR(o, 6, 0.5)),
    ({"schedule": "one_cycle"}, lambda o: lr_scheduler.OneCycleLR(o, 0.3, total_steps=40, cycle_momentum=False)),
    ({"warmup_steps": 8}, lambda o: lr_scheduler.LinearLR(o, 1 / 8, 1.0, total_iters=7)),
]


def cosine(step: int, steps: int) -> float:
    return float((1 + torch.cos(torch.tensor(torch.pi * step / steps, dtype=torch.float64))) / 2)


@pytest.mark.parametrize(
    ("schedule", "reference"), SCHEDULES, ids=lambda value: "torch" if callable(value) else str(value)[:40]
)
def test_schedules_are_those_of_torch(
    schedule: dict[str, Any], reference: Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]
) -> None:
    ours = plan(phases=[{"steps": 40, "lr": 0.3, **schedule}])
    assert [ours.lr(step) for step in range(1, 41)] == pytest.approx(torch_rates(40, reference), rel=1e-12)


def test_cosine_is_torchs_closed_form() -> None:
    ours = plan(phases=[{"steps": 25, "lr": 0.3, "schedule": "cosine"}])
    reference = torch_rates(25, lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=25))
    assert [ours.lr(step) for step in range(1, 26)] == pytest.approx(reference, rel=1e-9)


@given(steps=st.integers(1, 60))
def test_one_cycle_of_any_length_is_torchs(steps: int) -> None:
    ours = plan(phases=[{"steps": steps, "lr": 0.3, "schedule": "one_cycle"}])
    reference = torch_rates(
        steps, lambda o: lr_scheduler.OneCycleLR(o, 0.3, total_steps=max(steps, 1), cycle_momentum=False)
    )
    assert [ours.lr(step) for step in range(1, steps + 1)] == pytest.approx(reference, rel=1e-9)


def test_a_warm_up_leads_into_its_schedule_and_phases_begin_anew() -> None:
    ours = plan(phases=[{"steps": 6, "lr": 0.8, "schedule": "cosine", "warmup_steps": 2}, {"steps": 2, "lr": 0.1}])
    rates = [ours.lr(step) for step in range(1, 9)]
    assert rates[:3] == pytest.approx([0.4, 0.8, 0.8])
    assert rates[3:6] == pytest.approx([0.8 * cosine(k, 4) for k in (1, 2, 3)])
    assert rates[6:] == [0.1, 0.1]


def test_phases_count_epochs_or_steps() -> None:
    ours = plan(rows=11, phases=[{"epochs": 2, "lr": 1}, {"steps": 5, "lr": 2}, {"epochs": 1, "lr": 3}])
    assert ours.steps_per_epoch == 3
    assert ours.phase_ends == [6, 11, 14]
    assert [ours.lr(step) for step in (1, 6, 7, 11, 12, 14)] == [1, 1, 2, 2, 3, 3]
    assert ours.last_step == 14


def test_only_a_phase_that_says_so_resets_and_only_at_its_first_step() -> None:
    reset = {"optimizer_state": "reset"}
    ours = plan(phases=[{"steps": 3, "lr": 1, **reset}, {"steps": 2, "lr": 1}, {"steps": 2, "lr": 1, **reset}])
    assert [step for step in range(1, 8) if ours.resets_optimizer_before(step)] == [6]


@pytest.mark.parametrize(
    ("evaluate", "steps"),
    [
        ({}, [3, 6, 9, 12, 14]),
        ({"every_epochs": 2}, [6, 12, 14]),
        ({"every_steps": 4}, [4, 8, 12, 14]),
        ({"every_steps": 100}, [14]),
    ],
)
def test_evaluations_and_saves_are_due_at_intervals_and_at_the_end(evaluate: dict[str, int], steps: list[int]) -> None:
    train = {"batch_size": 4, "phases": [{"steps": 14, "lr": 1}]}
    ours = Plan(job(train=train, evaluate=evaluate, checkpoint=evaluate), 11)
    assert [step for step in range(1, 15) if ours.evaluates_after(step)] == steps
    assert [step for step in range(1, 15) if ours.saves_after(step)] == steps


def test_max_steps_ends_early_and_leaves_the_schedule_alone() -> None:
    whole = plan(phases=[{"steps": 40, "lr": 0.3, "schedule": "cosine"}])
    short = plan(max_steps=7, phases=[{"steps": 40, "lr": 0.3, "schedule": "cosine"}])
    assert (short.last_step, whole.last_step) == (7, 40)
    assert [short.lr(step) for step in range(1, 8)] == [whole.lr(step) for step in range(1, 8)]
    assert short.evaluates_after(7)
    assert short.cell_steps == whole.cell_steps
    assert plan(max_steps=99, phases=[{"steps": 40, "lr": 0.3}]).last_step == 40


@given(rows=st.integers(1, 400), batch=st.integers(1, 500) | st.just("all"), epochs=st.integers(1, 5))
def test_epochs_are_counted_whatever_the_batch(rows: int, batch: int | str, epochs: int) -> None:
    ours = plan(rows=rows, batch_size=batch, phases=[{"epochs": epochs, "lr": 1}])
    size = rows if batch == "all" else int(batch)
    expected = [epoch for epoch in range(1, epochs + 1) for _ in range(0, rows, size)]
    assert [ours.epoch(step) for step in range(1, ours.last_step + 1)] == expected
    assert [ours.epoch(step) for step in range(1, ours.last_step + 1) if ours.evaluates_after(step)] == list(
        range(1, epochs + 1)
    )
    assert ours.epoch(0) == 0


@given(steps=st.integers(1, 10**7))
def test_a_metric_log_has_a_bounded_number_of_cells(steps: int) -> None:
    ours = plan(phases=[{"steps": steps, "lr": 1}])
    assert ours.cell_steps >= MIN_CELL_STEPS > FIRST_CELL_STEPS
    assert CellLayout(FIRST_CELL_STEPS, ours.cell_steps).cell_of(steps) <= MAX_CELLS + 20


@pytest.mark.parametrize("when", [{"every_steps": 3}, {"every_epochs": 2}, {}, {"every_steps": 100}])
def test_evaluations_and_phases_are_numbered(when: dict[str, int]) -> None:
    phases = [{"epochs": 3, "lr": 1}, {"steps": 5, "lr": 0.1}]
    ours = Plan(job(train={"batch_size": 5, "phases": phases}, evaluate=when), 17)
    evaluated = [step for step in range(1, ours.last_step + 1) if ours.evaluates_after(step)]
    assert [ours.evaluation(step) for step in (0, *evaluated)] == list(range(len(evaluated) + 1))
    assert [ours.phase(step) for step in range(18)] == [1] * 13 + [2] * 5
