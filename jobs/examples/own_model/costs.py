"""A metric: a function of the predictions and targets of a whole split that returns one number."""

import numpy as np

MISSED, FALSE_ALARM = 5.0, 1.0


def cost(probabilities: np.ndarray, targets: np.ndarray) -> float:
    """Return the mean cost of a decision. probabilities: (N,) of the second class. targets: (N,) 0 or 1."""
    predicted = probabilities > FALSE_ALARM / (MISSED + FALSE_ALARM)
    return float(np.mean(np.where(targets == 1, MISSED * ~predicted, FALSE_ALARM * predicted)))
