"""Evaluation: the same metrics on any number of ranks, the choice of the best step, and failing metrics."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from pipeline.config import METRICS
from pipeline.errors import JobError, NotFiniteError, WorkError
from pipeline.training import metric_accumulator
from pipeline.training.loop import TrainProgress, evaluate
from tests.training.distributed_helpers import (
    FakeContext,
    eval_batches,
    make_data,
    make_engine,
    make_job,
    on_ranks,
    run,
)

CUSTOM_METRICS = "tests.training.custom_metrics"
TASKS: dict[str, Any] = {
    "multiclass": {},
    "weighted": {"kind": "multiclass", "class_weights": "balanced"},
    "binary": {"kind": "binary"},
    "threshold": {"kind": "binary", "threshold": "f1"},
    "regression": {"kind": "regression", "loss": "mae"},
}


@given(world_size=st.sampled_from([2, 3, 30]), size=st.sampled_from([1, 4, 30]))
@settings(deadline=None, max_examples=6)
@pytest.mark.parametrize("kind", TASKS)
def test_metrics_are_independent_of_the_number_of_ranks(kind: str, world_size: int, size: int) -> None:
    job = make_job(task=TASKS[kind], metrics=[f"{CUSTOM_METRICS}:order"])
    engine, data = make_engine(job), make_data(job)
    single = evaluate(engine, eval_batches(data, 0, 1, 23), FakeContext())
    assert list(single) == [*job.metric_columns(2), "samples"]
    assert not any(map(math.isnan, single.values()))
    ranks = on_ranks(
        world_size, lambda context: evaluate(engine, eval_batches(data, context.rank, world_size, size), context)
    )
    assert ranks[0] == pytest.approx(single, rel=1e-12)
    assert all(rank == ranks[0] for rank in ranks)


def test_logged_metrics_match_scikit_learn(device: torch.device) -> None:
    job = make_job(task="binary", train={"phases": [{"epochs": 2, "lr": 0.1}]})
    result, (inputs, targets) = run(job, device=device), make_data(job)
    probabilities = torch.sigmoid(result.engine.predict_logits(inputs.to(device)))[:, 0].cpu().numpy()
    row = result.recorder.evaluations[-1]
    assert row["auc"] == pytest.approx(sk.roc_auc_score(targets, probabilities), abs=1e-12)
    assert row["f1"] == pytest.approx(sk.f1_score(targets, probabilities > 0.5), abs=1e-12)
    assert row["log_loss"] == pytest.approx(sk.log_loss(targets, probabilities), rel=1e-12)
    assert row["baseline_accuracy"] == float(targets.double().mean())


def test_ranks_agree_on_a_random_metric() -> None:
    job = make_job(metrics=[f"{CUSTOM_METRICS}:draws"])
    engine, data = make_engine(job), make_data(job)
    ranks = on_ranks(3, lambda context: evaluate(engine, eval_batches(data, context.rank, 3), context))
    assert len({rank["draws"] for rank in ranks}) == 1


@pytest.mark.parametrize("limit", [23 * 4 - 1, 23 * 4])
def test_ranks_agree_on_what_is_too_large_to_gather(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(metric_accumulator, "MAX_GATHERED_VALUES", limit)
    engine, data = make_engine(make_job()), make_data(make_job())
    for world_size in (1, 3):
        for rank in on_ranks(
            world_size, lambda context: evaluate(engine, eval_batches(data, context.rank, context.world_size), context)
        ):
            assert math.isnan(rank["auc"]) == (limit < 23 * 4)
            assert rank["samples"] == 23


def test_any_metric_may_select_the_best_evaluation() -> None:
    result = run(make_job(best={"metric": "val/balanced_accuracy"}))
    rows = result.recorder.evaluations[1:]
    best = max(rows, key=lambda row: (row["balanced_accuracy"], -row["step"]))
    progress = result.progress
    assert (progress.best_step, progress.best_value) == (best["step"], best["balanced_accuracy"])
    assert progress.best_metrics == {f"val/{name}": best[name] for name in METRICS["multiclass"]}
    assert TrainProgress(**progress.to_json()) == progress


def test_custom_metric_may_select_the_best_evaluation() -> None:
    result = run(make_job(metrics=[f"{CUSTOM_METRICS}:draws"], best={"metric": "val/draws", "mode": "max"}))
    assert result.progress.best_value == max(row["draws"] for row in result.recorder.evaluations[1:])


def test_undefined_metric_is_never_the_best() -> None:
    job = make_job(task="binary", best={"metric": "val/auc"})
    inputs, targets = make_data(job)
    result = run(job, data=(inputs, torch.zeros_like(targets)))
    assert result.progress.best_step is None
    assert "val/auc" not in (result.progress.metrics or {})
    assert result.progress.evaluations_since_best == 3


def test_failing_custom_metric_is_bad_input_before_training_and_a_work_error_later() -> None:
    with pytest.raises(JobError, match="no cost of 23 rows") as early:
        run(make_job(metrics=[f"{CUSTOM_METRICS}:raises"]))
    assert (early.value.exit_code, early.value.where) == (2, f"metrics: {CUSTOM_METRICS}:raises")
    start = TrainProgress(step=5), make_engine(make_job()).flat.state_dict(), make_engine(make_job()).state_dict()
    with pytest.raises(WorkError, match="no cost of 23 rows") as late:
        run(make_job(metrics=[f"{CUSTOM_METRICS}:raises"]), start=start)
    assert late.value.exit_code == 1
    assert not isinstance(late.value, NotFiniteError)


def test_half_precision_outputs_are_evaluated(device: torch.device) -> None:
    job = make_job(train={"precision": "bf16"})
    engine, data = make_engine(job, device=device), make_data(job, device)
    metrics = evaluate(engine, eval_batches(data, 0, 1), FakeContext())
    probabilities = engine.predict_logits(data[0]).double().softmax(1).cpu().numpy()
    assert metrics["auc"] == pytest.approx(sk.roc_auc_score(data[1].cpu(), probabilities, multi_class="ovr"), abs=1e-12)
    assert np.isfinite(metrics["loss"])
