"""Per-step sums, kept on the device until they are flushed: logging a step never waits for it."""

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
"""Steps between two flushes at the most."""
FLUSH_INTERVAL_S = 0.25
"""Seconds between two blocks at the most, unless a single step takes longer."""

StepColumns = dict[str, "np.ndarray[tuple[int], np.dtype[np.float64 | np.int64]]"]
"""Columns of consecutive steps: epoch, step, loss, correct, lr, samples, seconds, time (unix seconds, UTC); with fp16
loss_scale, and skipped, the updates skipped before the step since the start of the run."""


@dataclass
class _StepBlock:
    sums: Tensor | None
    """(CAPACITY, SUMS + scalars) on the device, or None where the host reads each step's sums at once."""
    values: list[list[float]] = field(default_factory=list)
    steps: list[tuple[int, int, float, float]] = field(default_factory=list)
    copy_done: torch.cuda.Event | None = None


class StepMetricsBuffer:
    """Collects one row a step and hands over blocks of rows.

    On CUDA a block that is full or old enough starts its copy to the host, and is handed over with the next one or at
    `flush`: by then it has long arrived. On the CPU a loss that is not finite, or a loss scale that is too small, is
    handed over in its own step, which is the same one on all ranks.

    Parameters
    ----------
    scale_state: see `Trainee.scale_state`.
    """

    def __init__(
        self,
        loss_sums: Tensor,
        on_block: Callable[[StepColumns], None],
        scaler_state: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._sums = loss_sums
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
        """Start the next step's seconds here: what was in between (an evaluation) is not the step's."""
        self._last_step_s = time.perf_counter()

    def append(self, epoch: int, step: int, lr: float) -> None:
        """Note the step whose sums stand in the exchange vector now."""
        block, now = self._block, time.perf_counter()
        is_urgent = now - self._last_flush_s > FLUSH_INTERVAL_S
        if block.sums is None:
            sums = self._sums.tolist()
            scale = [tensor.item() for tensor in self._scaler_state.values()]
            block.values.append(sums + scale)
            is_urgent = is_urgent or not math.isfinite(sums[0]) or (bool(scale) and scale[0] < MIN_SCALE)
        else:
            row = block.sums[len(block.steps)]
            (row[:NUM_SUMS] if self._scaler_state else row).copy_(self._sums)
            for place, tensor in enumerate(self._scaler_state.values(), start=NUM_SUMS):
                row[place].copy_(tensor)
        block.steps.append((epoch, step, lr, now))
        if is_urgent or len(block.steps) == MAX_BUFFERED_STEPS:
            self._start_new_block()

    def flush(self) -> None:
        """Hand over all rows recorded until now. Waits for the device."""
        self._start_new_block()
        while self._blocks_in_copy:
            self._on_block(self._to_columns(self._blocks_in_copy.pop(0)))

    def _new_block(self) -> _StepBlock:
        return _StepBlock(None if self._immediate else self._sums.new_empty((MAX_BUFFERED_STEPS, self._width)))

    def _start_new_block(self) -> None:
        """Start the copy of the block in hand, hand over the one before it, and begin another."""
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
        on_host = block.values if block.sums is None else block.sums[: len(block.steps)].tolist()
        sums = np.array(on_host, dtype=np.float64)
        epochs, steps, lrs, times = (np.array(column) for column in zip(*block.steps, strict=True))
        seconds = np.diff(times, prepend=self._last_step_s)
        self._last_step_s = float(times[-1])
        with np.errstate(divide="ignore", invalid="ignore"):
            loss = sums[:, 0] / sums[:, 1]
        return {
            "epoch": epochs,
            "step": steps,
            "loss": loss,
            "correct": sums[:, 2],
            "lr": lrs,
            "samples": sums[:, 3].astype(np.int64),
            "seconds": seconds,
            "time": times + self._utc_offset_s,
            **{name: sums[:, place] for place, name in enumerate(self._scaler_state, start=NUM_SUMS)},
        }
