"""The choice of a decision threshold on a split: exact, over all distinct probabilities."""

from __future__ import annotations

import math

import numpy as np

from pipeline.config import ThresholdRule


def choose_threshold(probabilities: np.ndarray, positive: np.ndarray, rule: ThresholdRule) -> float:
    """Return the threshold that a rule chooses; a sample is predicted positive if its probability is above it.

    Each set of predictions that a threshold can give is considered once. Of sets that are equally good, that with the
    highest threshold is chosen. The threshold is halfway between the two probabilities that it separates, so that it
    does not depend on rounding errors of either.

    Parameters
    ----------
    probabilities: of the positive class, float64 (N,), from 0 to 1.
    positive: which samples are positive, bool (N,).
    rule: f1: the largest F1 score. cost: the lowest total cost of wrong predictions. recall: the highest threshold
        with at least this recall.

    Returns
    -------
    The threshold; NaN if a probability is NaN or the samples are of one class.
    """
    if np.isnan(probabilities).any() or positive.all() or not positive.any():
        return math.nan
    values, inverse = np.unique(probabilities, return_inverse=True)
    # The counts for the thresholds below all values, between each two, and above all.
    false_negatives = np.cumsum(np.append(0, np.bincount(inverse, positive, len(values)))).astype(np.int64)
    true_negatives = np.cumsum(np.append(0, np.bincount(inverse, ~positive, len(values)))).astype(np.int64)
    true_positives, false_positives = false_negatives[-1] - false_negatives, true_negatives[-1] - true_negatives
    if rule == "f1":
        quality = 2 * true_positives / (2 * true_positives + false_positives + false_negatives)
    elif rule.cost is not None:
        quality = -(rule.cost.false_positive * false_positives + rule.cost.false_negative * false_negatives)
    else:
        quality = (true_positives / false_negatives[-1] >= rule.recall).astype(np.float64)
    cut = len(quality) - 1 - int(np.argmax(quality[::-1]))
    return _separate(float(values[cut - 1]) if cut else 0.0, float(values[cut]) if cut < len(values) else 1.0, cut == 0)


def _separate(low: float, high: float, includes_low: bool) -> float:
    """Return a number t from low to high for which low > t is false and high > t is true; with `includes_low` and
    equal numbers, one below both."""
    middle = (low + high) / 2
    if low < middle < high:
        return middle
    return math.nextafter(low, -math.inf) if includes_low and low == high else low
