"""The training loop in one process: order of events, end of a run, and resume. On the CPU and on CUDA.

Tests of what the loop does at a step of a loss that is not finite are for the CPU: on CUDA losses are read later.
"""

from __future__ import annotations

import math
import signal
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import METRICS, JobConfig
from pipeline.errors import NotFiniteError
from pipeline.training.loop import StopBounds, TrainProgress, check_finite, evaluate, fit
from pipeline.training.optimizers import INITIAL_SCALE
from pipeline.training.schedule import TrainingSchedule
from pipeline.training.step_metrics import MAX_BUFFERED_STEPS, StepColumns, StepMetricsBuffer
from tests.training.distributed_helpers import (
    CPU,
    FakeContext,
    InMemoryRecorder,
    eval_batches,
    make_data,
    make_engine,
    make_job,
    on_ranks,
    rank_batches,
    run,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation")  # on CUDA

CUSTOM_METRICS = "tests.training.custom_metrics"

NUM_STEPS = 15
"""Three epochs of 23 samples in batches of 5."""


def make_never_improving_job(**best: Any) -> JobConfig:
    """Return a job whose learning rate is too small for any accuracy to change."""
    return make_job(best=best, train={"phases": [{"steps": 20, "lr": 1e-9}]}, evaluate={"every_steps": 2})


# ------------------------------------------------------------------------------------- order of events


def test_each_step_is_logged_once_and_each_evaluation_before_its_checkpoint() -> None:
    recorder = run(make_job(), splits=("train", "val")).recorder
    assert recorder.column("step") == list(range(1, NUM_STEPS + 1))
    assert recorder.column("epoch") == [1] * 5 + [2] * 5 + [3] * 5
    assert recorder.column("samples") == [5, 5, 5, 5, 3] * 3
    assert [(row["epoch"], row["step"], row["split"]) for row in recorder.evaluations] == [
        (epoch, step, split) for epoch, step in ((0, 0), (1, 5), (2, 10), (3, 15)) for split in ("train", "val")
    ]
    assert [(progress.step, end) for progress, end in recorder.saves] == [(5, False), (10, False), (15, True)]
    assert recorder.calls[2:6] == ["rows to 5", "evaluation train at 5", "evaluation val at 5", "save at 5"]
    assert recorder.calls[-4:] == ["rows to 15", "evaluation train at 15", "evaluation val at 15", "end at 15"]


def test_evaluates_before_the_first_step_and_at_the_end(device: torch.device) -> None:
    recorder = run(make_job(evaluate={"every_steps": 1000}), max_steps=4, device=device).recorder
    assert [row["step"] for row in recorder.evaluations] == [0, 4]
    assert [(progress.step, end) for progress, end in recorder.saves] == [(4, True)]


def test_requested_checkpoint_has_its_step_and_latest_metrics(device: torch.device) -> None:
    recorder = run(make_job(checkpoint={"every_steps": 1000}), extra_saves=(7,), device=device).recorder
    (progress, end), *_ = recorder.saves
    assert (progress.step, end) == (7, False)
    assert progress.metrics == {f"val/{name}": recorder.evaluations[1][name] for name in METRICS["multiclass"]}


def test_learning_rates_and_resets_follow_the_schedule(device: torch.device) -> None:
    phases = [{"steps": 3, "lr": 0.2}, {"steps": 3, "lr": 0.1, "optimizer_state": "reset"}]
    job = make_job(train={"phases": phases, "optimizer": {"momentum": 0.9}}, checkpoint={"every_steps": 1})
    with_reset = run(job, device=device).recorder
    assert with_reset.column("lr") == [0.2] * 3 + [0.1] * 3
    job = make_job(train={"phases": [phases[0], {"steps": 3, "lr": 0.1}], "optimizer": {"momentum": 0.9}})
    without_reset = run(job, device=device).recorder
    assert without_reset.column("loss")[:4] == with_reset.column("loss")[:4]
    assert without_reset.column("loss")[4:] != with_reset.column("loss")[4:]


def test_too_few_batches_are_an_error() -> None:
    job = make_job()
    schedule, engine, data = TrainingSchedule(job, 23), make_engine(job), make_data(job)
    batches = list(rank_batches(schedule, data, 1, 0, 1))[:4]
    with pytest.raises(AssertionError, match="the batches ended"):
        fit(engine, schedule, batches, {}, InMemoryRecorder(), FakeContext(), TrainProgress(), StopBounds())


# ------------------------------------------------------------------------------------ interrupt and resume


@pytest.mark.parametrize(
    "tree",
    [
        {"train": {"optimizer": {"kind": "adam"}}, "best": {"metric": "val/accuracy", "mode": "max"}},
        {"train": {"precision": "fp16", "optimizer": {"momentum": 0.9}}, "task": {"loss": f"{CUSTOM_METRICS}:steep"}},
        {"model": {"hidden": [8], "dropout": 0.5, "batch_norm": True}},
        {
            "model": {"hidden": [8], "dropout": 0.5, "ensemble": 3, "numeric_embedding": "periodic"},
            "train": {"optimizer": {"kind": "adamw", "weight_decay": 0.1, "decay": "weights"}},
        },
    ],
    ids=["adam", "fp16", "dropout", "ensemble"],
)
@given(at=st.integers(1, NUM_STEPS))
@settings(deadline=None, max_examples=8)
def test_interrupt_at_any_step_changes_nothing(tree: dict[str, Any], at: int, device: torch.device) -> None:
    job = make_job(**tree)
    whole, context = run(job, device=device), FakeContext()
    context.signals = {at: signal.SIGTERM}
    first = run(job, context, device=device)
    progress, end = first.recorder.saves[-1]
    assert progress.step == at
    assert (first.signal_number, end) == ((0, True) if at == NUM_STEPS else (signal.SIGTERM, False))
    weights, state = first.recorder.snapshots[-1]
    saved = TrainProgress(**TrainProgress(**progress.to_json()).to_json())
    rows, evaluations = first.recorder.rows, first.recorder.evaluations
    if not end:
        second = run(job, start=(saved, weights, state), device=device)
        progress, weights = second.progress, second.engine.flat.state_dict()
        rows, evaluations = rows + second.recorder.rows, evaluations + second.recorder.evaluations
    assert progress == whole.progress
    assert all(torch.equal(weights[name], tensor) for name, tensor in whole.engine.flat.state_dict().items())
    for ours, theirs in ((rows, whole.recorder.rows), (evaluations, whole.recorder.evaluations)):
        durable = [{name: value for name, value in row.items() if name not in ("seconds", "time")} for row in ours]
        assert durable == [{name: row[name] for name in durable[0]} for row in theirs]


@pytest.mark.parametrize("at", [1, 4, 5])
def test_signal_saves_and_exits(at: int, device: torch.device) -> None:
    context = FakeContext()
    context.signals = {at: signal.SIGINT}
    result = run(make_job(), context, device=device)
    assert result.signal_number == signal.SIGINT
    assert result.progress.step == at
    assert result.recorder.column("step") == list(range(1, at + 1))
    assert [progress.step for progress, _ in result.recorder.saves] == [at]
    assert [row["step"] for row in result.recorder.evaluations] == ([0, 5] if at == 5 else [0])


# --------------------------------------------------------------------------------------- best and last step


@given(
    values=st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, math.nan, math.inf]), max_size=8),
    mode=st.sampled_from(["min", "max"]),
)
def test_best_is_the_earliest_of_equals_and_never_step_0(values: list[float], mode: str) -> None:
    metric = {"min": "val/loss", "max": "val/accuracy"}[mode]
    schedule = TrainingSchedule(make_job(best={"metric": metric}), 23)
    progress = TrainProgress().after_evaluation(0, {metric: -1.0 if mode == "min" else 2.0}, schedule)
    assert (progress.best_step, progress.evaluations_since_best) == (None, 0)
    for step, value in enumerate(values, start=1):
        progress = progress.after_evaluation(step, {metric: value}, schedule)
    finite = [value for value in values if math.isfinite(value)]
    if finite:
        best = min(finite) if mode == "min" else max(finite)
        assert (progress.best_step, progress.best_value) == (values.index(best) + 1, best)
        assert progress.evaluations_since_best == len(values) - (values.index(best) + 1)
    else:
        assert (progress.best_step, progress.best_value) == (None, None)
        assert progress.evaluations_since_best == len(values)
    assert all(math.isfinite(value) for value in (progress.metrics or {}).values())


def test_metric_that_is_not_evaluated_has_no_best_and_no_patience() -> None:
    schedule = TrainingSchedule(make_job(best={"patience": 1}), 23)
    progress = (
        TrainProgress()
        .after_evaluation(5, {"train/loss": 1.0}, schedule)
        .after_evaluation(6, {"train/loss": 2.0}, schedule)
    )
    assert (progress.best_step, progress.is_patience_exhausted(schedule)) == (None, False)


def test_patience_stops_early_and_keeps_the_best(device: torch.device) -> None:
    result = run(make_never_improving_job(metric="val/accuracy", mode="max", patience=3), device=device)
    assert [row["step"] for row in result.recorder.evaluations] == [0, 2, 4, 6, 8]
    progress, end = result.recorder.saves[-1]
    assert end
    assert (progress.step, progress.best_step, progress.evaluations_since_best) == (8, 2, 3)
    assert result.recorder.column("step") == list(range(1, 9))
    assert result.progress == progress


def test_no_early_stop_below_the_highest_recorded_step() -> None:
    job = make_never_improving_job(metric="val/accuracy", mode="max", patience=3)
    result = run(job, stop_bounds=StopBounds(highest_step=11), extra_saves=(9, 11))
    assert result.progress.step == 12, "the first evaluation at or after the highest step"
    assert result.recorder.evaluations[-1]["step"] == 12
    rarely = job.model_copy(update={"evaluate": job.evaluate.model_copy(update={"every_steps": 3})})
    assert run(rarely, stop_bounds=StopBounds(highest_step=13), extra_saves=(13,)).progress.step == 15
    assert run(job, stop_bounds=StopBounds(highest_step=8)).progress.step == 8


@pytest.mark.parametrize("ended_at", [4, 7, 12])
def test_recorded_end_is_final(ended_at: int) -> None:
    result = run(
        make_never_improving_job(metric="val/accuracy", mode="max", patience=3),
        stop_bounds=StopBounds(ended_at, ended_at),
    )
    assert result.progress.step == ended_at
    assert result.recorder.saves[-1][1]
    assert result.recorder.evaluations[-1]["step"] == ended_at


# -------------------------------------------------------------------------------------------- not finite


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nonfinite_loss_stops_at_its_step(bad: float) -> None:
    job = make_job(
        train={"phases": [{"steps": 4, "lr": 0.25}, {"steps": 9, "lr": 0.125}]}, checkpoint={"every_steps": 3}
    )
    schedule, engine, (inputs, targets) = TrainingSchedule(job, 23), make_engine(job), make_data(job)
    batches = list(rank_batches(schedule, (inputs, targets), 1, 0, 1))
    batches[6].inputs[0, 0] = bad
    recorder = InMemoryRecorder(engine)
    with pytest.raises(NotFiniteError) as caught:
        fit(engine, schedule, batches, {}, recorder, FakeContext(), TrainProgress(), StopBounds())
    assert str(caught.value).startswith("step 7: the loss is ")
    assert "at step 7, with learning rate 0.125" in caught.value.what
    assert caught.value.fix == "last saved: 6"
    assert caught.value.exit_code == 1
    assert [progress.step for progress, _ in recorder.saves] == [3, 6]
    assert recorder.column("step") == list(range(1, 8)), "the step itself is logged"
    assert all(torch.isfinite(tensor).all() for tensor in engine.flat.state_dict().values()), (
        "the optimizer step is not taken"
    )


def test_first_nonfinite_row_is_named() -> None:
    rows: StepColumns = {
        "step": np.array([4, 5, 6]),
        "loss": np.array([1.0, np.inf, np.nan]),
        "lr": np.array([0.1, 0.2, 0.3]),
    }
    with pytest.raises(NotFiniteError, match=r"step 5: the loss is inf at step 5, with learning rate 0\.2"):
        check_finite(rows, "none")
    check_finite({name: column[:1] for name, column in rows.items()}, "none")


def test_fp16_skips_and_counts_overflows(device: torch.device) -> None:
    result = run(make_job(train={"precision": "fp16"}, task={"loss": f"{CUSTOM_METRICS}:steep"}), device=device)
    scales, skipped = result.recorder.column("loss_scale"), result.recorder.column("skipped")
    assert scales[0] == INITIAL_SCALE
    assert skipped[-1] > 0
    assert skipped == [sum(after < before for before, after in pairwise(scales[: at + 1])) for at in range(NUM_STEPS)]


@pytest.mark.parametrize("model", [{"hidden": [8]}, {"hidden": []}])
def test_persistent_overflow_stops_fp16(model: dict[str, Any]) -> None:
    tree = {
        "task": {"loss": f"{CUSTOM_METRICS}:no_gradient"},
        "model": model,
        "train": {"phases": [{"steps": 90, "lr": 0.5}]},
    }
    with pytest.raises(NotFiniteError, match="step 2: the loss is nan"):
        run(make_job(**tree | {"train": {**tree["train"], "precision": "fp32"}}))
    engine = make_engine(job := make_job(**tree | {"train": {**tree["train"], "precision": "fp16"}}))
    with pytest.raises(NotFiniteError) as caught:
        run(job, engine=engine)
    assert "are not finite at step 32, with learning rate 0.5: 31 updates were skipped" in caught.value.what
    assert "train.precision: bf16" in caught.value.fix
    names = engine.flat.find_nonfinite_grads()
    assert names == list(engine.flat.param_sizes)


# ------------------------------------------------------------------------------------------- step metrics


@given(
    flushes=st.sets(st.integers(1, 40)),
    waits=st.sets(st.integers(1, 40)),
    capacity=st.sampled_from([1, 2, 7, MAX_BUFFERED_STEPS]),
    count=st.integers(0, 40),
)
@settings(deadline=None, max_examples=40)
@pytest.mark.parametrize("immediate", [True, False], ids=["read at once", "read at the flush"])
def test_flushed_rows_are_gapless(
    immediate: bool, flushes: set[int], waits: set[int], capacity: int, count: int, device: torch.device
) -> None:
    patch = pytest.MonkeyPatch()
    patch.setattr("pipeline.training.step_metrics.MAX_BUFFERED_STEPS", capacity)
    try:
        sums, flushed = torch.zeros(4, dtype=torch.float64, device=device), list[StepColumns]()
        buffer = StepMetricsBuffer(sums, flushed.append)
        if not immediate:  # as on CUDA
            buffer._immediate = False
            buffer._block = buffer._new_block()
        for step in range(1, count + 1):
            sums.copy_(torch.tensor([3.0 * step, 2.0, 1.0, 2.0 + step]))
            if step in waits:
                buffer.resume_clock()
            buffer.append(1 + step // 10, step, 1 / step)
            if step in flushes:
                buffer.flush()
        buffer.flush()
        buffer.flush()
    finally:
        patch.undo()
    rows = {
        name: [value for block in flushed for value in block[name].tolist()] for name in (flushed[0] if flushed else {})
    }
    if count:
        steps = list(range(1, count + 1))
        assert rows["step"] == steps
        assert rows["loss"] == [1.5 * step for step in steps]
        assert rows["samples"] == [2 + step for step in steps]
        assert rows["lr"] == [1 / step for step in steps]
        assert rows["epoch"] == [1 + step // 10 for step in steps]
        assert rows["time"] == sorted(rows["time"])
        if not waits:
            assert sum(rows["seconds"][1:]) == pytest.approx(rows["time"][-1] - rows["time"][0], abs=1e-5)
    assert all(len(block["step"]) for block in flushed)


def test_counts_of_an_ensemble_are_those_of_rows() -> None:
    """`samples` are rows, not rows times members; `correct` is the mean over the members, rounded."""
    flushed: list[StepColumns] = []
    buffer = StepMetricsBuffer(torch.tensor([6.0, 12.0, 8.0, 12.0]), flushed.append, members=3)
    buffer.append(1, 1, 0.1)
    buffer.flush()
    (row,) = flushed
    assert [row[name].tolist() for name in ("loss", "correct", "samples")] == [[0.5], [3.0], [4]]
    rows = run(make_job(model={"hidden": [8], "ensemble": 3})).recorder.rows
    assert [row["samples"] for row in rows[:5]] == [5, 5, 5, 5, 3]
    assert all(0 <= row["correct"] <= row["samples"] for row in rows)


def test_evaluation_time_is_not_in_the_next_step() -> None:
    flushed: list[StepColumns] = []
    buffer = StepMetricsBuffer(torch.ones(4), flushed.append)
    buffer.append(1, 1, 0.1)
    buffer.flush()
    buffer._last_step_s -= 100.0  # an evaluation of 100 seconds
    buffer.resume_clock()
    buffer.append(1, 2, 0.1)
    buffer.flush()
    assert 0 <= flushed[1]["seconds"][0] < 10


def test_step_columns_have_their_dtypes() -> None:
    rows = run(make_job()).recorder.rows[0]
    whole = {"epoch", "step", "samples"}
    assert {name for name, value in rows.items() if isinstance(value, int)} == whole
    assert set(rows) == whole | {"loss", "correct", "lr", "seconds", "time"}


# ------------------------------------------------------------------------------------------- evaluation


@given(world_size=st.sampled_from([1, 2, 3, 5, 30]), size=st.integers(1, 30))
@settings(deadline=None, max_examples=15)
@pytest.mark.parametrize("kind", ["multiclass", "weighted", "binary", "regression"])
@pytest.mark.parametrize("precision", ["fp64", "fp32"])
def test_evaluation_uses_each_sample_once(
    precision: str, kind: str, world_size: int, size: int, device: torch.device
) -> None:
    task: Any = {"kind": "multiclass", "class_weights": "balanced"} if kind == "weighted" else kind
    job = make_job(task=task, train={"precision": precision})
    engine, data = make_engine(job, device=device), make_data(job, device)
    results = on_ranks(
        world_size, lambda context: evaluate(engine, eval_batches(data, context.rank, world_size, size), context)
    )
    result = results[0]
    assert all(other == result for other in results[1:]), "all ranks have the same metrics"
    outputs = engine.predict_logits(data[0])
    losses = engine.task.loss_fn(outputs, data[1]).double()
    weights = engine.task.sample_weights(data[1])
    weights = torch.ones(23, dtype=torch.float64, device=device) if weights is None else weights.double()
    assert result["samples"] == 23
    tolerance = 1e-12 if precision == "fp64" else 1e-6
    assert result["loss"] == pytest.approx(float((losses * weights).sum() / weights.sum()), rel=tolerance)
    if kind == "regression":
        assert result["mae"] == pytest.approx(float((outputs.double() - data[1].double()).abs().mean()), rel=tolerance)
    else:
        predictions = outputs.argmax(1) if kind != "binary" else (outputs[:, 0] > 0)
        assert result["correct"] == int((predictions == data[1]).sum())
        assert result["accuracy"] == result["correct"] / 23


def test_empty_evaluation_is_nan() -> None:
    result = evaluate(make_engine(make_job()), [], FakeContext())
    assert result["samples"] == 0
    assert math.isnan(result["loss"])
    assert math.isnan(result["accuracy"])


def test_regression_has_no_correct_count() -> None:
    job = make_job(task="regression", train={"phases": [{"epochs": 1, "lr": 0.01}]})
    result = run(job)
    assert list(result.progress.metrics or {}) == [f"val/{name}" for name in job.metric_columns(2)]
    assert all(math.isnan(value) for value in result.recorder.column("correct"))
    assert result.engine.device == CPU
