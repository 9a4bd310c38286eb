"""The schedule: learning rates against torch's schedulers, epochs and intervals against plain counting."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from pipeline.config import JobConfig
from pipeline.config.files import build_job
from pipeline.runs.metric_log.segments import SegmentLayout
from pipeline.training.schedule import APPROX_MAX_SEGMENTS, FIRST_SEGMENT_STEPS, MIN_SEGMENT_STEPS, TrainingSchedule


def make_schedule(rows: int = 10, max_steps: int | None = None, **train: Any) -> TrainingSchedule:
    return TrainingSchedule(make_job(train={"batch_size": 5, **train}), rows, max_steps)


def make_job(**tree: Any) -> JobConfig:
    return build_job({"name": "plan", **tree}, "here")


def torch_learning_rates(steps: int, build: Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that there are no optimizer steps
        scheduler, lrs = build(optimizer), []
        for _ in range(steps):
            lrs.append(optimizer.param_groups[0]["lr"])
            scheduler.step()
    return lrs


SCHEDULES: list[tuple[dict[str, Any], Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]]] = [
    ({}, lambda o: lr_scheduler.ConstantLR(o, factor=1.0)),
    ({"schedule": "cosine"}, lambda o: lr_scheduler.LambdaLR(o, lambda step: cosine_factor(step, 40))),
    ({"schedule": "step", "every_epochs": 3, "factor": 0.5}, lambda o: lr_scheduler.StepLR(o, 6, 0.5)),
    ({"schedule": "one_cycle"}, lambda o: lr_scheduler.OneCycleLR(o, 0.3, total_steps=40, cycle_momentum=False)),
    ({"warmup_steps": 8}, lambda o: lr_scheduler.LinearLR(o, 1 / 8, 1.0, total_iters=7)),
]


def cosine_factor(step: int, steps: int) -> float:
    return float((1 + torch.cos(torch.tensor(torch.pi * step / steps, dtype=torch.float64))) / 2)


@pytest.mark.parametrize(
    ("phase", "reference"), SCHEDULES, ids=lambda value: "torch" if callable(value) else str(value)[:40]
)
def test_schedules_match_torch(
    phase: dict[str, Any], reference: Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]
) -> None:
    schedule = make_schedule(phases=[{"steps": 40, "lr": 0.3, **phase}])
    assert [schedule.lr_at(step) for step in range(1, 41)] == pytest.approx(
        torch_learning_rates(40, reference), rel=1e-12
    )


def test_cosine_matches_torchs_closed_form() -> None:
    schedule = make_schedule(phases=[{"steps": 25, "lr": 0.3, "schedule": "cosine"}])
    reference = torch_learning_rates(25, lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=25))
    assert [schedule.lr_at(step) for step in range(1, 26)] == pytest.approx(reference, rel=1e-9)


@given(steps=st.integers(1, 60))
def test_one_cycle_of_any_length_matches_torch(steps: int) -> None:
    schedule = make_schedule(phases=[{"steps": steps, "lr": 0.3, "schedule": "one_cycle"}])
    reference = torch_learning_rates(
        steps, lambda o: lr_scheduler.OneCycleLR(o, 0.3, total_steps=max(steps, 1), cycle_momentum=False)
    )
    assert [schedule.lr_at(step) for step in range(1, steps + 1)] == pytest.approx(reference, rel=1e-9)


def test_warmup_leads_into_its_schedule_and_phases_restart() -> None:
    schedule = make_schedule(
        phases=[{"steps": 6, "lr": 0.8, "schedule": "cosine", "warmup_steps": 2}, {"steps": 2, "lr": 0.1}]
    )
    lrs = [schedule.lr_at(step) for step in range(1, 9)]
    assert lrs[:3] == pytest.approx([0.4, 0.8, 0.8])
    assert lrs[3:6] == pytest.approx([0.8 * cosine_factor(k, 4) for k in (1, 2, 3)])
    assert lrs[6:] == [0.1, 0.1]


def test_phases_are_given_in_epochs_or_steps() -> None:
    schedule = make_schedule(rows=11, phases=[{"epochs": 2, "lr": 1}, {"steps": 5, "lr": 2}, {"epochs": 1, "lr": 3}])
    assert schedule.steps_per_epoch == 3
    assert schedule.phase_ends == [6, 11, 14]
    assert [schedule.lr_at(step) for step in (1, 6, 7, 11, 12, 14)] == [1, 1, 2, 2, 3, 3]
    assert schedule.last_step == 14


def test_optimizer_reset_only_at_the_first_step_of_a_phase() -> None:
    reset = {"optimizer_state": "reset"}
    schedule = make_schedule(
        phases=[{"steps": 3, "lr": 1, **reset}, {"steps": 2, "lr": 1}, {"steps": 2, "lr": 1, **reset}]
    )
    assert [step for step in range(1, 8) if schedule.should_reset_optimizer(step)] == [6]


@pytest.mark.parametrize(
    ("evaluate", "steps"),
    [
        ({}, [3, 6, 9, 12, 14]),
        ({"every_epochs": 2}, [6, 12, 14]),
        ({"every_steps": 4}, [4, 8, 12, 14]),
        ({"every_steps": 100}, [14]),
    ],
)
def test_evaluations_and_checkpoints_are_due_at_intervals_and_at_the_end(
    evaluate: dict[str, int], steps: list[int]
) -> None:
    train = {"batch_size": 4, "phases": [{"steps": 14, "lr": 1}]}
    schedule = TrainingSchedule(make_job(train=train, evaluate=evaluate, checkpoint=evaluate), 11)
    assert [step for step in range(1, 15) if schedule.is_evaluation_due(step)] == steps
    assert [step for step in range(1, 15) if schedule.is_checkpoint_due(step)] == steps


def test_max_steps_ends_early_without_changing_the_schedule() -> None:
    whole = make_schedule(phases=[{"steps": 40, "lr": 0.3, "schedule": "cosine"}])
    short = make_schedule(max_steps=7, phases=[{"steps": 40, "lr": 0.3, "schedule": "cosine"}])
    assert (short.last_step, whole.last_step) == (7, 40)
    assert [short.lr_at(step) for step in range(1, 8)] == [whole.lr_at(step) for step in range(1, 8)]
    assert short.is_evaluation_due(7)
    assert short.segment_steps == whole.segment_steps
    assert make_schedule(max_steps=99, phases=[{"steps": 40, "lr": 0.3}]).last_step == 40


@given(rows=st.integers(1, 400), batch=st.integers(1, 500) | st.just("all"), epochs=st.integers(1, 5))
def test_epoch_count_is_independent_of_the_batch_size(rows: int, batch: int | str, epochs: int) -> None:
    schedule = make_schedule(rows=rows, batch_size=batch, phases=[{"epochs": epochs, "lr": 1}])
    size = rows if batch == "all" else int(batch)
    expected = [epoch for epoch in range(1, epochs + 1) for _ in range(0, rows, size)]
    assert [schedule.epoch_of(step) for step in range(1, schedule.last_step + 1)] == expected
    assert [
        schedule.epoch_of(step) for step in range(1, schedule.last_step + 1) if schedule.is_evaluation_due(step)
    ] == list(range(1, epochs + 1))
    assert schedule.epoch_of(0) == 0


@given(steps=st.integers(1, 10**7))
def test_metric_log_has_a_bounded_number_of_segments(steps: int) -> None:
    schedule = make_schedule(phases=[{"steps": steps, "lr": 1}])
    assert schedule.segment_steps >= MIN_SEGMENT_STEPS > FIRST_SEGMENT_STEPS
    assert SegmentLayout(FIRST_SEGMENT_STEPS, schedule.segment_steps).segment_of(steps) <= APPROX_MAX_SEGMENTS + 20


@pytest.mark.parametrize("evaluate", [{"every_steps": 3}, {"every_epochs": 2}, {}, {"every_steps": 100}])
def test_evaluations_and_phases_are_numbered(evaluate: dict[str, int]) -> None:
    phases = [{"epochs": 3, "lr": 1}, {"steps": 5, "lr": 0.1}]
    schedule = TrainingSchedule(make_job(train={"batch_size": 5, "phases": phases}, evaluate=evaluate), 17)
    evaluated = [step for step in range(1, schedule.last_step + 1) if schedule.is_evaluation_due(step)]
    assert [schedule.evaluation_number(step) for step in (0, *evaluated)] == list(range(len(evaluated) + 1))
    assert [schedule.phase_of(step) for step in range(18)] == [1] * 13 + [2] * 5
