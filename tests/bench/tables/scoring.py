"""One score for every method: AUC and accuracy of its probabilities, or R2 of its predictions, on the test rows."""

from __future__ import annotations

import numpy as np
from sklearn.metrics import r2_score, roc_auc_score

Scores = dict[str, float]


def score_classes(labels: np.ndarray, classes: list[str], probabilities: np.ndarray) -> Scores:
    """Return AUC (two classes: of the later one; more: the mean over one class against the rest) and accuracy.

    Parameters
    ----------
    labels: text (N,).
    classes: the names of the columns of `probabilities`.
    probabilities: float (N, C).

    Raises
    ------
    ValueError: a probability is not finite.
    """
    if not np.isfinite(probabilities).all():
        raise ValueError("a probability is not finite")
    columns = range(1, 2) if len(classes) == 2 else range(len(classes))
    of_class = [labels == classes[column] for column in columns]
    aucs = [
        float(roc_auc_score(truth, probabilities[:, column]))
        for column, truth in zip(columns, of_class, strict=True)
        if truth.any() and not truth.all()
    ]
    predicted = np.array(classes)[probabilities.argmax(1)]
    return {"auc": float(np.mean(aucs)), "accuracy": float(np.mean(predicted == labels))}


def score_numbers(labels: np.ndarray, predictions: np.ndarray) -> Scores:
    """Return R2 of float (N,) predictions.

    Raises
    ------
    ValueError: a prediction is not finite.
    """
    if not np.isfinite(predictions).all():
        raise ValueError("a prediction is not finite")
    return {"r2": float(r2_score(labels, predictions))}
