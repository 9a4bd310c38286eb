"""The choice of a decision threshold, against every set of predictions that a threshold can give."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from pipeline.config import ThresholdConfig, ThresholdRule
from pipeline.config.files import build_job
from pipeline.errors import JobError
from pipeline.training.threshold import choose_threshold

scores = st.one_of(
    st.floats(0, 1), st.sampled_from([0.0, 0.25, 0.5, 1.0, 5e-324, math.nextafter(0.5, 1), math.nextafter(1, 0)])
)
rules: st.SearchStrategy[ThresholdRule] = st.one_of(
    st.just("f1"),
    st.builds(
        lambda positive, negative: ThresholdConfig.model_validate(
            {"cost": {"false_positive": float(positive), "false_negative": float(negative)}}
        ),
        st.integers(1, 20),
        st.integers(1, 20),
    ),
    st.builds(lambda recall: ThresholdConfig(recall=recall), st.sampled_from([0.1, 0.5, 0.7, 0.9, 1.0])),
)


def measure_quality(rule: ThresholdRule, positive: np.ndarray, predicted: np.ndarray) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if rule == "f1":
            return float(sk.f1_score(positive, predicted))
        (_, false_positives), (false_negatives, _) = sk.confusion_matrix(positive, predicted, labels=[False, True])
        if rule.cost is not None:
            return -float(rule.cost.false_positive * false_positives + rule.cost.false_negative * false_negatives)
        assert rule.recall is not None
        return float(sk.recall_score(positive, predicted) >= rule.recall)


@given(st.lists(st.tuples(scores, st.booleans()), min_size=2, max_size=25), rules)
@settings(deadline=None, max_examples=300)
def test_no_threshold_is_better(samples: list[tuple[float, bool]], rule: ThresholdRule) -> None:
    probabilities, positive = np.array([score for score, _ in samples]), np.array([label for _, label in samples])
    threshold = choose_threshold(probabilities, positive, rule)
    if positive.all() or not positive.any():
        assert math.isnan(threshold)
        return
    predicted = probabilities > threshold
    quality = measure_quality(rule, positive, predicted)
    for candidate in [-1.0, *np.unique(probabilities)]:
        others = probabilities > candidate
        other_quality = measure_quality(rule, positive, others)
        assert other_quality <= quality
        if other_quality == quality:
            assert others.sum() >= predicted.sum(), "of equally good sets of predictions, the smallest"


@given(st.integers(0, 2**32 - 1), rules)
@settings(deadline=None, max_examples=50)
def test_rounding_errors_and_the_order_of_samples_do_not_matter(seed: int, rule: ThresholdRule) -> None:
    generator = np.random.default_rng(seed)
    probabilities, positive = generator.uniform(size=100), generator.random(100) < 0.3
    threshold = choose_threshold(probabilities, positive, rule)
    if math.isnan(threshold):
        return
    order = generator.permutation(100)
    assert choose_threshold(probabilities[order], positive[order], rule) == threshold
    rounded = probabilities * (1 + generator.choice([-1e-12, 1e-12], 100))
    assert ((rounded > threshold) == (probabilities > threshold)).all()


def test_probability_that_is_not_a_number_gives_none() -> None:
    assert math.isnan(choose_threshold(np.array([0.1, math.nan]), np.array([True, False]), "f1"))


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ({"kind": "multiclass", "threshold": 0.3}, "threshold goes with kind: binary"),
        ({"kind": "regression", "threshold": "f1"}, "threshold goes with kind: binary"),
        ({"kind": "binary", "threshold": 1.0}, "task.threshold: must be less than 1"),
        ({"kind": "binary", "threshold": "auc"}, "task.threshold: must be a number or 'f1', not 'auc'"),
        ({"kind": "binary", "threshold": {}}, "task.threshold: give either cost or recall"),
        ({"kind": "binary", "threshold": {"recall": 2.0}}, "task.threshold.recall: must be less than or equal to 1"),
        (
            {"kind": "binary", "threshold": {"cost": {"false_positive": 1}}},
            "task.threshold.cost.false_negative: missing",
        ),
    ],
)
def test_rules_that_cannot_be_used_are_refused(task: dict[str, object], words: str) -> None:
    with pytest.raises(JobError) as refused:
        build_job({"name": "t", "task": task}, "here")
    assert words in str(refused.value)


@pytest.mark.parametrize(
    "threshold", [0.3, "f1", {"recall": 0.9}, {"cost": {"false_positive": 1, "false_negative": 5}}]
)
def test_every_rule_can_be_written(threshold: object) -> None:
    job = build_job({"name": "t", "task": {"kind": "binary", "threshold": threshold}}, "here")
    assert (job.task.threshold_rule is None) == isinstance(threshold, float)
    assert ("threshold" in job.metric_columns()) != isinstance(threshold, float)
