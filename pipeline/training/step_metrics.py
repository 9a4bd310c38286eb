"""A buffer of per-step metrics that stay on the device until they are flushed: logging a step never waits for it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from pipeline.training.flat_parameters import NUM_SUMS
from pipeline.training.optimizers import MIN_SCALE

MAX_BUFFERED_STEPS = 512
"""Maximum number of steps between two flushes."""
FLUSH_INTERVAL_S = 0.25
"""Maximum number of seconds between two blocks, unless a single step takes longer."""

StepColumns = dict[str, "np.ndarray[tuple[int], np.dtype[np.float64 | np.int64]]"]
"""Columns of consecutive steps: epoch, step, loss, correct, lr, samples, seconds, time (Unix seconds, UTC); with fp16
also loss_scale, and skipped: the number of updates skipped before the step since the start of the run."""


@dataclass
class _StepBlock:
    sums: Tensor | None
    """(MAX_BUFFERED_STEPS, NUM_SUMS + scalars) on the device; None on the CPU, where sums are read at once."""
    values: list[list[float]] = field(default_factory=list)
    steps: list[tuple[int, int, float, float]] = field(default_factory=list)
    copy_done: torch.cuda.Event | None = None


class StepMetricsBuffer:
    """Collects one row per step and passes on blocks of rows.

    On CUDA the copy to the host starts when a block is full or old enough; the block is passed on with the next one or
    by `flush`, when its copy is complete. On the CPU a loss that is not finite, or a loss scale that is too small, is
    passed on at its step, the same one on all ranks.

    Parameters
    ----------
    loss_sums: (NUM_SUMS,) see `FlatParameters.loss_sums`; read by every `append`.
    on_block: receives each block.
    scaler_state: see `TrainEngine.scaler_state`.
    members: networks of the ensemble. `samples` is the number of rows that each takes, and `correct` is the mean over
        the members, rounded.
    """

    def __init__(
        self,
        loss_sums: Tensor,
        on_block: Callable[[StepColumns], None],
        scaler_state: Mapping[str, Tensor] | None = None,
        members: int = 1,
    ) -> None:
        self._sums = loss_sums
        self._members = members
        self._scaler_state = dict(scaler_state or {})
        self._on_block = on_block
        self._on_cuda = loss_sums.device.type == "cuda"
        self._immediate = loss_sums.device.type == "cpu"
        self._block = self._new_block()
        self._blocks_in_copy: list[_StepBlock] = []
        self._utc_offset_s = time.time() - time.perf_counter()
        self._last_step_s = self._last_flush_s = time.perf_counter()

    @property
    def _width(self) -> int:
        return NUM_SUMS + len(self._scaler_state)

    def resume_clock(self) -> None:
        """Start the clock of the next step now: leaves the time since the last step (an evaluation) out of it."""
        self._last_step_s = time.perf_counter()

    def append(self, epoch: int, step: int, lr: float) -> None:
        """Add a row for the step whose sums are in `loss_sums` now."""
        block, now = self._block, time.perf_counter()
        is_urgent = now - self._last_flush_s > FLUSH_INTERVAL_S
        if block.sums is None:
            sums = self._sums.tolist()
            scaler_values = [tensor.item() for tensor in self._scaler_state.values()]
            block.values.append(sums + scaler_values)
            scale_too_small = bool(scaler_values) and scaler_values[0] < MIN_SCALE
            is_urgent = is_urgent or not math.isfinite(sums[0]) or scale_too_small
        else:
            row = block.sums[len(block.steps)]
            (row[:NUM_SUMS] if self._scaler_state else row).copy_(self._sums)
            for index, tensor in enumerate(self._scaler_state.values(), start=NUM_SUMS):
                row[index].copy_(tensor)
        block.steps.append((epoch, step, lr, now))
        if is_urgent or len(block.steps) == MAX_BUFFERED_STEPS:
            self._start_new_block()

    def flush(self) -> None:
        """Pass on all rows appended so far. Waits for the device."""
        self._start_new_block()
        while self._blocks_in_copy:
            self._on_block(self._to_columns(self._blocks_in_copy.pop(0)))

    def _new_block(self) -> _StepBlock:
        return _StepBlock(None if self._immediate else self._sums.new_empty((MAX_BUFFERED_STEPS, self._width)))

    def _start_new_block(self) -> None:
        """Pass on the blocks in copy, start the copy of the current block, and begin a new one."""
        self._last_flush_s = time.perf_counter()
        while self._blocks_in_copy:
            self._on_block(self._to_columns(self._blocks_in_copy.pop(0)))
        block = self._block
        if not block.steps:
            return
        if self._on_cuda and block.sums is not None:
            host = torch.empty((len(block.steps), self._width), dtype=block.sums.dtype, pin_memory=True)
            block.sums = host.copy_(block.sums[: len(block.steps)], non_blocking=True)
            block.copy_done = torch.cuda.Event()
            block.copy_done.record()
        self._blocks_in_copy.append(block)
        self._block = self._new_block()
        if self._immediate:
            self._on_block(self._to_columns(self._blocks_in_copy.pop(0)))

    def _to_columns(self, block: _StepBlock) -> StepColumns:
        if block.copy_done is not None:
            block.copy_done.synchronize()
        values = block.values if block.sums is None else block.sums[: len(block.steps)].tolist()
        sums = np.array(values, dtype=np.float64)
        epochs, steps, lrs, times = (np.array(column) for column in zip(*block.steps, strict=True))
        seconds = np.diff(times, prepend=self._last_step_s)
        self._last_step_s = float(times[-1])
        with np.errstate(divide="ignore", invalid="ignore"):
            loss = sums[:, 0] / sums[:, 1]
        return {
            "epoch": epochs,
            "step": steps,
            "loss": loss,
            "correct": np.rint(sums[:, 2] / self._members),
            "lr": lrs,
            "samples": sums[:, 3].astype(np.int64) // self._members,
            "seconds": seconds,
            "time": times + self._utc_offset_s,
            **{name: sums[:, index] for index, name in enumerate(self._scaler_state, start=NUM_SUMS)},
        }
