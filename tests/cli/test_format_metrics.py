"""Metrics, baselines and advice as text."""

from __future__ import annotations

import math

import pytest

from pipeline.format_metrics import (
    baseline_warning,
    format_divergence_advice,
    format_headline,
    format_metric_table,
    format_number,
)

CLASSIFICATION_METRICS = {
    "val/loss": 0.143224,
    "val/accuracy": 0.88,
    "val/correct": 88.0,
    "val/auc": 0.5,
    "val/baseline_accuracy": 0.88,
}
REGRESSION_METRICS = {"val/loss": 0.21, "val/rmse": 3.1, "val/mae": 2.5, "val/r2": 0.82, "val/baseline_rmse": 7.0}


def test_headline_has_main_metrics_and_the_best_metric() -> None:
    assert format_headline(CLASSIFICATION_METRICS) == "val loss 0.1432  accuracy 0.8800"
    assert format_headline(CLASSIFICATION_METRICS, "val/auc") == "val loss 0.1432  accuracy 0.8800  auc 0.5000"
    assert format_headline(REGRESSION_METRICS, "val/loss") == "val loss 0.2100  rmse 3.1000  r2 0.8200"
    assert (
        format_headline({"train/loss": 1.0, **REGRESSION_METRICS})
        == "train loss 1.0000  val loss 0.2100  rmse 3.1000  r2 0.8200"
    )
    assert format_headline({}) == ""


def test_table_shows_each_metric_next_to_its_baseline() -> None:
    assert format_metric_table({"train/loss": 1.0, **CLASSIFICATION_METRICS, "val/f1": math.nan}, "val") == [
        "loss      0.1432",
        "accuracy  0.8800 (majority class: 0.8800)",
        "auc       0.5000",
    ]
    assert format_metric_table(REGRESSION_METRICS, "val")[1:3] == [
        "rmse  3.1000 (always the mean: 7.0000)",
        "mae   2.5000",
    ]
    assert format_metric_table(REGRESSION_METRICS, "test") == []
    several = {"val/rmse": 0.5, "val/baseline_rmse": 1.0, "val/rmse_temp_C": 4.0, "val/baseline_rmse_temp_C": 8.0}
    assert format_metric_table(several, "val") == [
        "rmse         0.5000 (in standard deviations; always the mean: 1.0000)",
        "rmse_temp_C  4.0000 (always the mean: 8.0000)",
    ]


@pytest.mark.parametrize(("accuracy", "is_warned"), [(0.87, True), (0.88, True), (0.8801, False)])
def test_baseline_warning_for_the_majority_class(accuracy: float, is_warned: bool) -> None:
    warning = baseline_warning({**CLASSIFICATION_METRICS, "val/accuracy": accuracy}, "val")
    assert warning == ("on val no better than always answering the majority class" if is_warned else "")


@pytest.mark.parametrize(("rmse", "is_warned"), [(7.1, True), (7.0, True), (6.9, False)])
def test_baseline_warning_for_the_mean(rmse: float, is_warned: bool) -> None:
    assert bool(baseline_warning({**REGRESSION_METRICS, "val/rmse": rmse}, "val")) == is_warned
    assert baseline_warning({"val/rmse": rmse}, "val") == ""
    assert baseline_warning({"val/baseline_rmse": 7.0}, "val"), "NaN is not recorded"


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0.0000"), (0.5, "0.5000"), (0.00001234, "1.234e-05"), (-123456.7, "-1.235e+05")]
)
def test_number_formatting(value: float, text: str) -> None:
    assert format_number(value) == text


def test_advice_for_a_diverged_run_never_suggests_bad_checkpoints() -> None:
    assert format_divergence_advice("r", None, None).endswith("the changed job is a new run")
    assert format_divergence_advice("r", 40, 60).endswith(
        "model.init_from: r@best starts it from the best checkpoint, of step 40"
    )
    assert format_divergence_advice("r", None, 60).endswith(
        "model.init_from: r@last starts it from the last checkpoint, of step 60"
    )
    worse = format_divergence_advice("r", 40, 60, "no evaluation is better than before training (val/loss 0.6400)")
    assert "init_from" not in worse
    assert "(val/loss 0.6400), so no checkpoint is worth starting from" in worse
