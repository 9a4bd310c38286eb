"""An evaluation of one split: blocks of rows in, exact metrics of the whole split out, on any number of ranks.

Sums are made in float64 on the host, a block of many rows at a time. What cannot be summed is made from the rows of
the whole split, which all ranks gather; a split of more than `MOST_GATHERED` numbers has no such metrics.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.context import WorkerContext
from pipeline.errors import JobError
from pipeline.job import Job, own_metric
from pipeline.learn.losses import binary_cross_entropy, cross_entropy
from pipeline.learn.metrics import metrics_of
from pipeline.learn.task import Task, at_least_single

MOST_GATHERED = 2**24
"""Numbers of a split, outputs and targets together, that are held at once on every rank: 128 MiB in float64."""

FOLDED = 2**20
"""So many outputs wait on the device before they are summed."""


class Tally:
    """This rank's rows of one split. The ranks' rows, one rank after another, are the split."""

    def __init__(self, task: Task, device: torch.device) -> None:
        self._task = task
        self._metrics = metrics_of(task)
        # MPS has no float64.
        self._summed_on = torch.device("cpu") if device.type == "mps" else device
        self._gathers = bool(task.classes or task.metrics)
        self._waiting: list[tuple[Tensor, ...]] = []
        self._numbers = 0
        self._rows = 0
        self._sums: list[np.ndarray] = []
        self._kept: list[np.ndarray] = []

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        """Take a block; does not wait for the device, but once in many blocks.

        outputs: (b, K), any floating type. targets: (b,) or (b, T), as prepared.
        """
        if not len(targets):
            return
        task, outputs = self._task, at_least_single(outputs)
        columns = [outputs, targets, task.loss(outputs, targets)]
        if task.classes and not task.loss_is_log_loss:
            columns.append((binary_cross_entropy if task.kind == "binary" else cross_entropy)(outputs, targets))
        self._waiting.append(tuple(columns))
        self._numbers += outputs.numel()
        self._rows += len(targets)
        if self._numbers >= FOLDED:
            self._fold()

    def metrics(self, context: WorkerContext) -> dict[str, float]:
        """The metrics of the whole split: the task's, the user's own, and `samples`. All ranks take part.

        Raises
        ------
        WorkError: a metric of the user's own failed, on every rank alike.
        """
        self._fold()
        sums = np.sum(self._sums, axis=0) if self._sums else self._metrics.sums(*_no_rows(self._task))
        rows = self._of_all_ranks(sums, context) if context.world_size > 1 else self._own_rows()
        metrics = self._metrics.of_sums(sums)
        custom = {metric.column: math.nan for metric in self._task.metrics}
        if rows is not None and len(rows):
            outputs, targets = rows[:, : self._task.outputs], rows[:, self._task.outputs :]
            metrics |= self._metrics.of_rows(outputs, targets)
            custom |= self._own_metrics(outputs, targets)
        samples = metrics.pop("samples")
        metrics |= custom
        if context.world_size > 1:
            metrics = dict(zip(metrics, self._of_rank_0(list(metrics.values()), context), strict=True))
        return {**metrics, "samples": samples}

    def _own_metrics(self, outputs: np.ndarray, targets: np.ndarray) -> dict[str, float]:
        if not self._task.metrics:
            return {}
        predictions, true_values = self._metrics.people_see(outputs, targets)
        for values in (predictions, true_values):
            values.setflags(write=False)  # the next metric sees the same
        return {metric.column: metric(predictions, true_values) for metric in self._task.metrics}

    def _fold(self) -> None:
        """Sum what waits: one copy from the device."""
        if not self._waiting:
            return
        outputs, targets, losses, *others = _on_host(self._waiting)
        losses = losses.astype(np.float64)
        log_losses = others[0].astype(np.float64) if others else losses
        self._sums.append(self._metrics.sums(outputs, targets, losses, log_losses))
        if self._gathers:
            self._kept.append(np.concatenate([outputs, targets.reshape(len(targets), -1)], 1))
            if self._rows * row_numbers(self._task.kind, self._task.outputs) > MOST_GATHERED:
                self._gathers, self._kept = False, []
        self._waiting, self._numbers = [], 0

    def _own_rows(self) -> np.ndarray | None:
        """(N, K + T), or None where they are not needed or too many."""
        if not self._gathers:
            return None
        return np.concatenate(self._kept) if self._kept else None

    def _of_all_ranks(self, sums: np.ndarray, context: WorkerContext) -> np.ndarray | None:
        """Sum the sums over all ranks, in place, and gather their rows: (N, K + T), or None.

        Each rank writes its rows at their place among zeros, and the ranks sum: exact, and the only exchange needed.
        """
        counts = torch.zeros(context.world_size, dtype=torch.float64, device=self._summed_on)
        counts[context.rank] = self._rows
        context.all_reduce(counts)
        ends = [int(end) for end in counts.cumsum(0).tolist()]
        width = row_numbers(self._task.kind, self._task.outputs)
        gathers = bool(self._task.classes or self._task.metrics) and ends[-1] * width <= MOST_GATHERED
        vector = np.zeros(len(sums) + (ends[-1] * width if gathers else 0))
        vector[: len(sums)] = sums
        rows = vector[len(sums) :].reshape(-1, width)
        if gathers and self._kept:
            rows[ends[context.rank] - self._rows : ends[context.rank]] = np.concatenate(self._kept)
        shared = torch.from_numpy(vector).to(self._summed_on)
        context.all_reduce(shared)
        vector[:] = shared.cpu().numpy()
        sums[:] = vector[: len(sums)]
        return rows if gathers else None

    def _of_rank_0(self, values: list[float], context: WorkerContext) -> list[float]:
        """What rank 0 found counts on all: a function of the user's may draw at random, and all must end alike."""
        shared = torch.tensor(values if context.rank == 0 else [0.0] * len(values), dtype=torch.float64)
        shared = shared.to(self._summed_on)
        context.all_reduce(shared)
        return [float(value) for value in shared.tolist()]


def _on_host(blocks: Sequence[tuple[Tensor, ...]]) -> list[np.ndarray]:
    """Blocks of columns as whole columns in the host's memory, in one copy."""
    columns = [parts[0] if len(parts) == 1 else torch.cat(parts) for parts in zip(*blocks, strict=True)]
    if columns[0].device.type != "cpu":
        # In the outputs' type: classes are whole numbers far below 2^24.
        flat = torch.cat([column.reshape(-1) for column in columns]).cpu()
        parts = flat.split([column.numel() for column in columns])
        columns = [part.view(column.shape) for part, column in zip(parts, columns, strict=True)]
    return [column.numpy() for column in columns]


def _no_rows(task: Task) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    nothing = np.empty(0)
    return np.empty((0, task.outputs)), nothing, nothing, nothing


def row_numbers(kind: str, outputs: int) -> int:
    """Outputs and targets of a row."""
    return outputs + (outputs if kind == "regression" else 1)


def too_large_to_gather(job: Job, outputs: int, rows: Mapping[str, int]) -> dict[str, str]:
    """Splits that are too large for metrics that need all rows at once, and a sentence on each.

    Parameters
    ----------
    outputs: of the model, for a sample.
    rows: of each split that is evaluated while training.
    """
    if not (names := _gathered(job)):
        return {}
    limit = MOST_GATHERED // row_numbers(job.task.kind, outputs)
    return {
        split: f"{split} has {count:,} rows, too many for {' and '.join(names)}, which need all rows at once and take "
        f"{limit:,} at most: null in the log; evaluate.limit bounds the rows"
        for split, count in rows.items()
        if count > limit
    }


def check_best_is_gathered(job: Job, outputs: int, rows: Mapping[str, int]) -> None:
    """Parameters as `too_large_to_gather`.

    Raises
    ------
    JobError: `best.metric` needs all rows of a split that is too large for it.
    """
    split, _, column = job.best.metric.partition("/")
    if column in _gathered(job) and split in too_large_to_gather(job, outputs, rows):
        limit = MOST_GATHERED // row_numbers(job.task.kind, outputs)
        raise JobError(
            f"{column} needs all rows at once, and {split} has {rows[split]:,}",
            where=f"best.metric: {job.best.metric}",
            fix=f"set evaluate.limit to {limit} or less, or choose a metric that is summed, such as {split}/loss",
        )


def _gathered(job: Job) -> list[str]:
    """The metrics of a job that cannot be summed."""
    return [*(["auc"] if job.task.kind != "regression" else []), *map(own_metric, job.metrics)]
