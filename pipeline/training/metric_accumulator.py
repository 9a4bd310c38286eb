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

from pipeline.config import JobConfig, metric_column
from pipeline.context import WorkerContext
from pipeline.errors import JobError
from pipeline.training.losses import binary_cross_entropy, cross_entropy
from pipeline.training.metrics import make_task_metrics
from pipeline.training.task import Task, upcast_to_fp32

MAX_GATHERED_VALUES = 2**24
"""Numbers of a split, outputs and targets together, that are held at once on every rank: 128 MiB in float64."""

FLUSH_OUTPUTS = 2**20
"""So many outputs wait on the device before they are summed."""


class MetricAccumulator:
    """This rank's rows of one split. The ranks' rows, one rank after another, are the split."""

    def __init__(self, task: Task, device: torch.device) -> None:
        self._task = task
        self._task_metrics = make_task_metrics(task)
        # MPS has no float64.
        self._sum_device = torch.device("cpu") if device.type == "mps" else device
        self._keeps_rows = bool(task.num_classes or task.custom_metrics)
        self._pending: list[tuple[Tensor, ...]] = []
        self._num_pending_outputs = 0
        self._num_rows = 0
        self._sums: list[np.ndarray] = []
        self._row_blocks: list[np.ndarray] = []

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Take a block; does not wait for the device, but once in many blocks.

        outputs: (b, K), any floating type. targets: (b,) or (b, T), as prepared.
        """
        if not len(targets):
            return
        task, outputs = self._task, upcast_to_fp32(outputs)
        columns = [outputs, targets, task.loss_fn(outputs, targets)]
        if task.num_classes and not task.is_log_loss:
            columns.append((binary_cross_entropy if task.kind == "binary" else cross_entropy)(outputs, targets))
        self._pending.append(tuple(columns))
        self._num_pending_outputs += outputs.numel()
        self._num_rows += len(targets)
        if self._num_pending_outputs >= FLUSH_OUTPUTS:
            self._flush()

    def compute(self, context: WorkerContext) -> dict[str, float]:
        """The metrics of the whole split: the task's, the user's own, and `samples`. All ranks take part.

        Raises
        ------
        WorkError: a metric of the user's own failed, on every rank alike.
        """
        self._flush()
        sums = np.sum(self._sums, axis=0) if self._sums else self._task_metrics.compute_sums(*_empty_rows(self._task))
        rows = self._gather_from_all_ranks(sums, context) if context.world_size > 1 else self._local_rows()
        metrics = self._task_metrics.from_sums(sums)
        custom = {metric.column: math.nan for metric in self._task.custom_metrics}
        if rows is not None and len(rows):
            outputs, targets = rows[:, : self._task.num_outputs], rows[:, self._task.num_outputs :]
            metrics |= self._task_metrics.from_samples(outputs, targets)
            custom |= self._compute_custom_metrics(outputs, targets)
        samples = metrics.pop("samples")
        metrics |= custom
        if context.world_size > 1:
            metrics = dict(zip(metrics, self._broadcast_from_rank_0(list(metrics.values()), context), strict=True))
        return {**metrics, "samples": samples}

    def _compute_custom_metrics(self, outputs: np.ndarray, targets: np.ndarray) -> dict[str, float]:
        if not self._task.custom_metrics:
            return {}
        predictions, true_values = self._task_metrics.to_user_units(outputs, targets)
        for values in (predictions, true_values):
            values.setflags(write=False)  # the next metric sees the same
        return {metric.column: metric(predictions, true_values) for metric in self._task.custom_metrics}

    def _flush(self) -> None:
        """Sum what waits: one copy from the device."""
        if not self._pending:
            return
        outputs, targets, losses, *others = _to_host(self._pending)
        losses = losses.astype(np.float64)
        log_losses = others[0].astype(np.float64) if others else losses
        self._sums.append(self._task_metrics.compute_sums(outputs, targets, losses, log_losses))
        if self._keeps_rows:
            self._row_blocks.append(np.concatenate([outputs, targets.reshape(len(targets), -1)], 1))
            if self._num_rows * values_per_row(self._task.kind, self._task.num_outputs) > MAX_GATHERED_VALUES:
                self._keeps_rows, self._row_blocks = False, []
        self._pending, self._num_pending_outputs = [], 0

    def _local_rows(self) -> np.ndarray | None:
        """(N, K + T), or None where they are not needed or too many."""
        if not self._keeps_rows:
            return None
        return np.concatenate(self._row_blocks) if self._row_blocks else None

    def _gather_from_all_ranks(self, sums: np.ndarray, context: WorkerContext) -> np.ndarray | None:
        """Sum the sums over all ranks, in place, and gather their rows: (N, K + T), or None.

        Each rank writes its rows at their place among zeros, and the ranks sum: exact, and the only exchange needed.
        """
        counts = torch.zeros(context.world_size, dtype=torch.float64, device=self._sum_device)
        counts[context.rank] = self._num_rows
        context.all_reduce(counts)
        ends = [int(end) for end in counts.cumsum(0).tolist()]
        width = values_per_row(self._task.kind, self._task.num_outputs)
        gathers = bool(self._task.num_classes or self._task.custom_metrics) and ends[-1] * width <= MAX_GATHERED_VALUES
        vector = np.zeros(len(sums) + (ends[-1] * width if gathers else 0))
        vector[: len(sums)] = sums
        rows = vector[len(sums) :].reshape(-1, width)
        if gathers and self._row_blocks:
            rows[ends[context.rank] - self._num_rows : ends[context.rank]] = np.concatenate(self._row_blocks)
        shared = torch.from_numpy(vector).to(self._sum_device)
        context.all_reduce(shared)
        vector[:] = shared.cpu().numpy()
        sums[:] = vector[: len(sums)]
        return rows if gathers else None

    def _broadcast_from_rank_0(self, values: list[float], context: WorkerContext) -> list[float]:
        """What rank 0 found counts on all: a function of the user's may draw at random, and all must end alike."""
        shared = torch.tensor(values if context.rank == 0 else [0.0] * len(values), dtype=torch.float64)
        shared = shared.to(self._sum_device)
        context.all_reduce(shared)
        return [float(value) for value in shared.tolist()]


def _to_host(blocks: Sequence[tuple[Tensor, ...]]) -> list[np.ndarray]:
    """Blocks of columns as whole columns in the host's memory, in one copy."""
    columns = [parts[0] if len(parts) == 1 else torch.cat(parts) for parts in zip(*blocks, strict=True)]
    if columns[0].device.type != "cpu":
        # In the outputs' type: classes are whole numbers far below 2^24.
        flat = torch.cat([column.reshape(-1) for column in columns]).cpu()
        parts = flat.split([column.numel() for column in columns])
        columns = [part.view(column.shape) for part, column in zip(parts, columns, strict=True)]
    return [column.numpy() for column in columns]


def _empty_rows(task: Task) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    nothing = np.empty(0)
    return np.empty((0, task.num_outputs)), nothing, nothing, nothing


def values_per_row(kind: str, outputs: int) -> int:
    """Outputs and targets of a row."""
    return outputs + (outputs if kind == "regression" else 1)


def describe_oversized_splits(job: JobConfig, num_outputs: int, num_rows: Mapping[str, int]) -> dict[str, str]:
    """Splits that are too large for metrics that need all rows at once, and a sentence on each.

    Parameters
    ----------
    outputs: of the model, for a sample.
    rows: of each split that is evaluated while training.
    """
    if not (names := _metrics_of_all_rows(job)):
        return {}
    limit = MAX_GATHERED_VALUES // values_per_row(job.task.kind, num_outputs)
    return {
        split: f"{split} has {count:,} rows, too many for {' and '.join(names)}, which need all rows at once and take "
        f"{limit:,} at most: null in the log; evaluate.limit bounds the rows"
        for split, count in num_rows.items()
        if count > limit
    }


def check_best_metric_gathered(job: JobConfig, num_outputs: int, num_rows: Mapping[str, int]) -> None:
    """Parameters as `too_large_to_gather`.

    Raises
    ------
    JobError: `best.metric` needs all rows of a split that is too large for it.
    """
    split, _, column = job.best.metric.partition("/")
    if column in _metrics_of_all_rows(job) and split in describe_oversized_splits(job, num_outputs, num_rows):
        limit = MAX_GATHERED_VALUES // values_per_row(job.task.kind, num_outputs)
        raise JobError(
            f"{column} needs all rows at once, and {split} has {num_rows[split]:,}",
            where=f"best.metric: {job.best.metric}",
            fix=f"set evaluate.limit to {limit} or less, or choose a metric that is summed, such as {split}/loss",
        )


def _metrics_of_all_rows(job: JobConfig) -> list[str]:
    """The metrics of a job that cannot be summed."""
    return [*(["auc"] if job.task.kind != "regression" else []), *map(metric_column, job.metrics)]
