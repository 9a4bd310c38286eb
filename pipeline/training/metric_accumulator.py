"""Exact metrics of one split, from batches of outputs and targets on any number of ranks.

Sums are computed in float64 on the host, many samples at a time. Metrics that cannot be summed are computed from the
samples of the whole split, which all ranks gather; they are NaN for a split of more than `MAX_GATHERED_VALUES` values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.config import JobConfig, TaskConfig, metric_column
from pipeline.context import WorkerContext
from pipeline.errors import JobError
from pipeline.training.losses import binary_cross_entropy, cross_entropy
from pipeline.training.metrics import ClassificationMetrics, RegressionMetrics, TaskMetrics
from pipeline.training.multilabel_metrics import MultilabelMetrics
from pipeline.training.quantile_metrics import QuantileMetrics
from pipeline.training.task import Task, upcast_to_fp32

MAX_GATHERED_VALUES = 2**24
"""Maximum number of values of a split, outputs and targets together, held on every rank: 128 MiB in float64."""

FLUSH_OUTPUTS = 2**20
"""Number of outputs that are collected on the device before they are summed."""


def make_task_metrics(task: Task) -> TaskMetrics:
    """Return the metrics of a task."""
    if task.kind == "multilabel":
        return MultilabelMetrics(task)
    if task.kind == "regression":
        return QuantileMetrics(task) if task.quantiles else RegressionMetrics(task)
    return ClassificationMetrics(task)


class MetricAccumulator:
    """Accumulates this rank's samples of one split. The slices of the ranks, in rank order, are the split."""

    def __init__(self, task: Task, device: torch.device) -> None:
        self._task = task
        self._task_metrics = make_task_metrics(task)
        # MPS has no float64.
        self._sum_device = torch.device("cpu") if device.type == "mps" else device
        self._needs_samples = task.kind != "regression" or bool(task.custom_metrics)
        self._keeps_samples = self._needs_samples
        self._pending: list[tuple[Tensor, ...]] = []
        self._num_pending_outputs = 0
        self._num_samples = 0
        self._sums: list[np.ndarray] = []
        self._sample_blocks: list[np.ndarray] = []

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Add a batch. Waits for the device only when `FLUSH_OUTPUTS` is reached.

        Parameters
        ----------
        outputs: (b, K), any floating dtype.
        targets: (b,) or (b, T), transformed.
        """
        if not len(targets):
            return
        task, outputs = self._task, upcast_to_fp32(outputs)
        columns = [outputs, targets, task.loss_fn(outputs, targets)]
        if task.num_classes and not task.is_log_loss:
            columns.append((binary_cross_entropy if task.kind == "binary" else cross_entropy)(outputs, targets))
        self._pending.append(tuple(columns))
        self._num_pending_outputs += outputs.numel()
        self._num_samples += len(targets)
        if self._num_pending_outputs >= FLUSH_OUTPUTS:
            self._flush()

    def compute(self, context: WorkerContext) -> dict[str, float]:
        """Compute the metrics of the whole split: the task's, custom ones, and `samples`. All ranks take part.

        Raises
        ------
        WorkError: a custom metric failed, on every rank alike.
        """
        self._flush()
        sums = (
            np.sum(self._sums, axis=0) if self._sums else self._task_metrics.compute_sums(*_empty_samples(self._task))
        )
        samples = self._gather_from_all_ranks(sums, context) if context.world_size > 1 else self._local_samples()
        metrics = self._task_metrics.from_sums(sums)
        custom = {metric.column: math.nan for metric in self._task.custom_metrics}
        if samples is not None and len(samples):
            outputs, targets = samples[:, : self._task.num_outputs], samples[:, self._task.num_outputs :]
            metrics |= self._task_metrics.from_samples(outputs, targets)
            custom |= self._compute_custom_metrics(outputs, targets)
        num_samples = metrics.pop("samples")
        metrics |= custom
        if context.world_size > 1:
            metrics = dict(zip(metrics, self._broadcast_from_rank_0(list(metrics.values()), context), strict=True))
        return {**metrics, "samples": num_samples}

    def _compute_custom_metrics(self, outputs: np.ndarray, targets: np.ndarray) -> dict[str, float]:
        if not self._task.custom_metrics:
            return {}
        predictions, true_values = self._task_metrics.to_user_units(outputs, targets)
        for values in (predictions, true_values):
            values.setflags(write=False)  # the next metric takes the same array
        return {metric.column: metric(predictions, true_values) for metric in self._task.custom_metrics}

    def _flush(self) -> None:
        """Sum the pending batches: one copy from the device."""
        if not self._pending:
            return
        outputs, targets, losses, *others = _to_host(self._pending)
        losses = losses.astype(np.float64)
        log_losses = others[0].astype(np.float64) if others else losses
        self._sums.append(self._task_metrics.compute_sums(outputs, targets, losses, log_losses))
        if self._keeps_samples:
            self._sample_blocks.append(np.concatenate([outputs, targets.reshape(len(targets), -1)], 1))
            if self._num_samples * values_per_sample(self._task, self._task.num_outputs) > MAX_GATHERED_VALUES:
                self._keeps_samples, self._sample_blocks = False, []
        self._pending, self._num_pending_outputs = [], 0

    def _local_samples(self) -> np.ndarray | None:
        """Return this rank's samples (N, K + T), or None if they are not needed or too many."""
        if not self._keeps_samples:
            return None
        return np.concatenate(self._sample_blocks) if self._sample_blocks else None

    def _gather_from_all_ranks(self, sums: np.ndarray, context: WorkerContext) -> np.ndarray | None:
        """All-reduce the sums, in place, and gather the samples of all ranks: (N, K + T), or None.

        Each rank writes its samples into its slice of a zero vector, and the ranks all-reduce it. This is exact.
        """
        counts = torch.zeros(context.world_size, dtype=torch.float64, device=self._sum_device)
        counts[context.rank] = self._num_samples
        context.all_reduce(counts)
        ends = [int(end) for end in counts.cumsum(0).tolist()]
        width = values_per_sample(self._task, self._task.num_outputs)
        gathers = self._needs_samples and ends[-1] * width <= MAX_GATHERED_VALUES
        vector = np.zeros(len(sums) + (ends[-1] * width if gathers else 0))
        vector[: len(sums)] = sums
        samples = vector[len(sums) :].reshape(-1, width)
        if gathers and self._sample_blocks:
            samples[ends[context.rank] - self._num_samples : ends[context.rank]] = np.concatenate(self._sample_blocks)
        shared = torch.from_numpy(vector).to(self._sum_device)
        context.all_reduce(shared)
        vector[:] = shared.cpu().numpy()
        sums[:] = vector[: len(sums)]
        return samples if gathers else None

    def _broadcast_from_rank_0(self, values: list[float], context: WorkerContext) -> list[float]:
        """Return rank 0's values on all ranks: a custom metric may use random numbers, and all ranks must agree."""
        shared = torch.tensor(values if context.rank == 0 else [0.0] * len(values), dtype=torch.float64)
        shared = shared.to(self._sum_device)
        context.all_reduce(shared)
        return [float(value) for value in shared.tolist()]


def _to_host(blocks: Sequence[tuple[Tensor, ...]]) -> list[np.ndarray]:
    """Concatenate batches of columns on the host, in one copy from the device."""
    columns = [batches[0] if len(batches) == 1 else torch.cat(batches) for batches in zip(*blocks, strict=True)]
    if columns[0].device.type != "cpu":
        # In the dtype of the outputs: class indices are integers far below 2^24.
        flat = torch.cat([column.reshape(-1) for column in columns]).cpu()
        flat_columns = flat.split([column.numel() for column in columns])
        columns = [flat_column.view(column.shape) for flat_column, column in zip(flat_columns, columns, strict=True)]
    return [column.numpy() for column in columns]


def _empty_samples(task: Task) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    empty = np.empty(0)
    return np.empty((0, task.num_outputs)), empty, empty, empty


def values_per_sample(task: Task | TaskConfig, outputs: int) -> int:
    """Return the number of values of a sample: its outputs and targets."""
    has_target_per_output = task.kind == "multilabel" or (task.kind == "regression" and not task.quantiles)
    return outputs + (outputs if has_target_per_output else 1)


def describe_oversized_splits(job: JobConfig, num_outputs: int, num_rows: Mapping[str, int]) -> dict[str, str]:
    """Return a message for each split that is too large for metrics that need all samples at once.

    Parameters
    ----------
    num_outputs: number of outputs of the model per sample.
    num_rows: number of samples evaluated of each split during training.
    """
    if not (names := _gathered_metrics(job)):
        return {}
    listed = " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
    limit = MAX_GATHERED_VALUES // values_per_sample(job.task, num_outputs)
    return {
        split: f"{split} has {count:,} samples, too many for {listed}, which need all samples at once and "
        f"take at most {limit:,}: null in the log; evaluate.limit limits the samples"
        for split, count in num_rows.items()
        if count > limit
    }


def check_best_metric_gathered(job: JobConfig, num_outputs: int, num_rows: Mapping[str, int]) -> None:
    """Check that `best.metric` can be computed; parameters as for `describe_oversized_splits`.

    Raises
    ------
    JobError: `best.metric` needs all samples of a split that is too large for it.
    """
    split, _, column = job.best.metric.partition("/")
    if column in _gathered_metrics(job) and split in describe_oversized_splits(job, num_outputs, num_rows):
        limit = MAX_GATHERED_VALUES // values_per_sample(job.task, num_outputs)
        raise JobError(
            f"{column} needs all samples at once, and {split} has {num_rows[split]:,}, which is too many",
            where=f"best.metric: {job.best.metric}",
            fix=f"set evaluate.limit to {limit} or less, or choose a metric that is summed, such as {split}/loss",
        )


def check_threshold_gathered(job: JobConfig, num_outputs: int, num_rows: Mapping[str, int]) -> None:
    """Check that the validation split is not too large to choose a threshold; parameters as for
    `describe_oversized_splits`.

    Raises
    ------
    JobError: it is.
    """
    if job.task.threshold_rule is not None and "val" in describe_oversized_splits(job, num_outputs, num_rows):
        limit = MAX_GATHERED_VALUES // values_per_sample(job.task, num_outputs)
        raise JobError(
            f"a rule chooses the threshold from all rows of val at once, and {num_rows['val']:,} are too many",
            where="task.threshold",
            fix=f"set evaluate.limit to {limit} or less, or give the threshold as a number",
        )


def _gathered_metrics(job: JobConfig) -> list[str]:
    """Return the metrics of a job that cannot be summed."""
    ranked = ["auc", "average_precision"] if job.task.kind != "regression" else []
    return list(dict.fromkeys([*ranked, *map(metric_column, job.metrics)]))
