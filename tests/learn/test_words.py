"""What people read of metrics."""

from __future__ import annotations

import math

import pytest

from pipeline.learn.words import divergence_advice, no_better_words, number, short_words, table_lines

CLASSES = {
    "val/loss": 0.143224,
    "val/accuracy": 0.88,
    "val/correct": 88.0,
    "val/auc": 0.5,
    "val/baseline_accuracy": 0.88,
}
VALUES = {"val/loss": 0.21, "val/rmse": 3.1, "val/mae": 2.5, "val/r2": 0.82, "val/baseline_rmse": 7.0}


def test_a_short_line_has_the_headlines_and_the_metric_that_decides() -> None:
    assert short_words(CLASSES) == "val loss 0.1432  accuracy 0.8800"
    assert short_words(CLASSES, "val/auc") == "val loss 0.1432  accuracy 0.8800  auc 0.5000"
    assert short_words(VALUES, "val/loss") == "val loss 0.2100  rmse 3.1000  r2 0.8200"
    assert short_words({"train/loss": 1.0, **VALUES}) == "train loss 1.0000  val loss 0.2100  rmse 3.1000  r2 0.8200"
    assert short_words({}) == ""


def test_a_table_has_each_metric_of_a_split_beside_its_baseline() -> None:
    assert table_lines({"train/loss": 1.0, **CLASSES, "val/f1": math.nan}, "val") == [
        "loss      0.1432",
        "accuracy  0.8800 (majority class: 0.8800)",
        "auc       0.5000",
    ]
    assert table_lines(VALUES, "val")[1:3] == ["rmse  3.1000 (always the mean: 7.0000)", "mae   2.5000"]
    assert table_lines(VALUES, "test") == []
    several = {"val/rmse": 0.5, "val/baseline_rmse": 1.0, "val/rmse_temp_C": 4.0, "val/baseline_rmse_temp_C": 8.0}
    assert table_lines(several, "val") == [
        "rmse         0.5000 (in standard deviations; always the mean: 1.0000)",
        "rmse_temp_C  4.0000 (always the mean: 8.0000)",
    ]


@pytest.mark.parametrize(("accuracy", "warns"), [(0.87, True), (0.88, True), (0.8801, False)])
def test_a_model_no_better_than_the_majority_class_is_told(accuracy: float, warns: bool) -> None:
    words = no_better_words({**CLASSES, "val/accuracy": accuracy}, "val")
    assert words == ("on val no better than always answering the majority class" if warns else "")


@pytest.mark.parametrize(("rmse", "warns"), [(7.1, True), (7.0, True), (6.9, False)])
def test_a_model_no_better_than_the_mean_is_told(rmse: float, warns: bool) -> None:
    assert bool(no_better_words({**VALUES, "val/rmse": rmse}, "val")) == warns
    assert no_better_words({"val/rmse": rmse}, "val") == ""
    assert no_better_words({"val/baseline_rmse": 7.0}, "val"), "an error that is not finite is not on record"


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0.0000"), (0.5, "0.5000"), (0.00001234, "1.234e-05"), (-123456.7, "-1.235e+05")]
)
def test_numbers_show_their_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_advice_for_a_run_that_diverged_never_names_what_is_no_good() -> None:
    assert divergence_advice("r", None, None).endswith("the changed job is a new run")
    assert divergence_advice("r", 40, 60).endswith(
        "model.init_from: r@best begins it at the best checkpoint, of step 40"
    )
    assert divergence_advice("r", None, 60).endswith(
        "model.init_from: r@last begins it at the last checkpoint, of step 60"
    )
    worse = divergence_advice("r", 40, 60, "no evaluation is better than before training (val/loss 0.6400)")
    assert "init_from" not in worse
    assert "(val/loss 0.6400), so no checkpoint is worth going on from" in worse
