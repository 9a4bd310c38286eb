"""Metrics of the user's own: plain functions of what a whole split was predicted to be, and what it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.errors import JobError, WorkError
from pipeline.job import metric_column
from pipeline.own_code import import_user_function, wrap_user_error


@dataclass(frozen=True)
class CustomMetric:
    """`module:function` of (outputs, targets), both of a whole split in its order, read-only -> a number.

    outputs: float64. multiclass: probabilities (N, classes). binary: probabilities of class 1 (N,). regression: values
        in the targets' unit, (N,), or (N, T) where a target has several columns.
    targets: classes int64 (N,), or float64 values in their unit, (N,) or (N, T).
    """

    name: str
    metric_fn: Callable[..., Any]

    @classmethod
    def from_name(cls, name: str) -> CustomMetric:
        """Raises
        ------
        JobError: there is no such function.
        """
        return cls(name, import_user_function(name, where=f"metrics: {name}", error=JobError))

    @property
    def column(self) -> str:
        return metric_column(self.name)

    def __call__(self, outputs: np.ndarray, targets: np.ndarray) -> float:
        """Raises
        ------
        WorkError: the function raised something itself, or gives no number.
        """
        try:
            return float(self.metric_fn(outputs, targets))
        except Exception as raised:  # whatever the user's function raises is the user's to see
            raise wrap_user_error(raised, f"metrics: {self.name}", WorkError) from raised
