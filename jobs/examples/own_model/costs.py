"""A metric: what the model says of a whole split, and what is true, to one number."""

import numpy as np

MISSED, FALSE_ALARM = 5.0, 1.0


def cost(probabilities: np.ndarray, targets: np.ndarray) -> float:
    """The mean price of a decision: probabilities (N,) of the second class, targets (N,) 0 or 1."""
    said = probabilities > FALSE_ALARM / (MISSED + FALSE_ALARM)
    return float(np.mean(np.where(targets == 1, MISSED * ~said, FALSE_ALARM * said)))
