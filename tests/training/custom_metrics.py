"""Custom losses and metrics, valid and invalid."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def sum_of_outputs(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return outputs.sum(1)


def no_gradient(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return finite losses whose gradient is always NaN."""
    return 1 + torch.sqrt((outputs - outputs.detach()).square()).sum(1)


def steep(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return losses whose gradient overflows fp16 at the initial loss scale and at some lower ones."""
    return 300 * torch.nn.functional.cross_entropy(outputs, targets, reduction="none")


CALLS: list[tuple[np.ndarray, np.ndarray]] = []
"""Arguments of the calls of `remembers`."""


def remembers(outputs: np.ndarray, targets: np.ndarray) -> np.floating[Any]:
    CALLS.append((outputs, targets))
    return np.float32(len(targets))


def raises(outputs: np.ndarray, targets: np.ndarray) -> float:
    raise ValueError(f"no cost of {len(targets)} rows")


def changes(outputs: np.ndarray, targets: np.ndarray) -> float:
    outputs[:] = 0
    return 0.0


def gives_many(outputs: np.ndarray, targets: np.ndarray) -> Any:
    return outputs


def draws(outputs: np.ndarray, targets: np.ndarray) -> float:
    """Return a random number, another one at every call."""
    return float(np.random.default_rng().random())


def order(outputs: np.ndarray, targets: np.ndarray) -> float:
    """Return a number that depends on the order of the samples."""
    rows = np.arange(len(targets))
    return float(sum((rows * values.reshape(len(rows), -1).T).sum() for values in (outputs, targets)))
