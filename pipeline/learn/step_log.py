"""Per-step sums, kept on the device until they are flushed: logging a step never waits for it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from pipeline.learn.flat import SUMS
from pipeline.learn.scaling import MIN_SCALE

CAPACITY = 512
"""Steps between two flushes at the most."""
FLUSH_S = 0.25
"""Seconds between two blocks at the most, unless a single step takes longer."""

Rows = dict[str, "np.ndarray[tuple[int], np.dtype[np.float64 | np.int64]]"]
"""Columns of consecutive steps: epoch, step, loss, correct, lr, samples, seconds, time (unix seconds, UTC); with fp16
loss_scale, and skipped, the updates skipped before the step since the start of the run."""


@dataclass
class _Block:
    sums: Tensor | None
    """(CAPACITY, SUMS + scalars) on the device, or None where the host reads each step's sums at once."""
    values: list[list[float]] = field(default_factory=list)
    steps: list[tuple[int, int, float, float]] = field(default_factory=list)
    ready: torch.cuda.Event | None = None


class StepLog:
    """Collects one row a step and hands over blocks of rows.

    On CUDA a block that is full or old enough starts its copy to the host, and is handed over with the next one or at
    `flush`: by then it has long arrived. On the CPU a loss that is not finite, or a loss scale that is too small, is
    handed over in its own step, which is the same one on all ranks.

    Parameters
    ----------
    scale_state: see `Trainee.scale_state`.
    """

    def __init__(
        self, flat_sums: Tensor, hand_over: Callable[[Rows], None], scale_state: Mapping[str, Tensor] | None = None
    ) -> None:
        self._sums = flat_sums
        self._scale_state = dict(scale_state or {})
        self._hand_over = hand_over
        self._on_cuda = flat_sums.device.type == "cuda"
        self._immediate = flat_sums.device.type == "cpu"
        self._block = self._new_block()
        self._copying: list[_Block] = []
        self._utc = time.time() - time.perf_counter()
        self._last = self._flushed = time.perf_counter()

    @property
    def _width(self) -> int:
        return SUMS + len(self._scale_state)

    def resume_clock(self) -> None:
        """Start the next step's seconds here: what was in between (an evaluation) is not the step's."""
        self._last = time.perf_counter()

    def record(self, epoch: int, step: int, lr: float) -> None:
        """Note the step whose sums stand in the exchange vector now."""
        block, now = self._block, time.perf_counter()
        is_urgent = now - self._flushed > FLUSH_S
        if block.sums is None:
            sums = self._sums.tolist()
            scale = [tensor.item() for tensor in self._scale_state.values()]
            block.values.append(sums + scale)
            is_urgent = is_urgent or not math.isfinite(sums[0]) or (bool(scale) and scale[0] < MIN_SCALE)
        else:
            row = block.sums[len(block.steps)]
            (row[:SUMS] if self._scale_state else row).copy_(self._sums)
            for place, tensor in enumerate(self._scale_state.values(), start=SUMS):
                row[place].copy_(tensor)
        block.steps.append((epoch, step, lr, now))
        if is_urgent or len(block.steps) == CAPACITY:
            self._rotate()

    def flush(self) -> None:
        """Hand over all rows recorded until now. Waits for the device."""
        self._rotate()
        while self._copying:
            self._hand_over(self._rows(self._copying.pop(0)))

    def _new_block(self) -> _Block:
        return _Block(None if self._immediate else self._sums.new_empty((CAPACITY, self._width)))

    def _rotate(self) -> None:
        """Start the copy of the block in hand, hand over the one before it, and begin another."""
        self._flushed = time.perf_counter()
        while self._copying:
            self._hand_over(self._rows(self._copying.pop(0)))
        block = self._block
        if not block.steps:
            return
        if self._on_cuda and block.sums is not None:
            host = torch.empty((len(block.steps), self._width), dtype=block.sums.dtype, pin_memory=True)
            block.sums = host.copy_(block.sums[: len(block.steps)], non_blocking=True)
            block.ready = torch.cuda.Event()
            block.ready.record()
        self._copying.append(block)
        self._block = self._new_block()
        if self._immediate:
            self._hand_over(self._rows(self._copying.pop(0)))

    def _rows(self, block: _Block) -> Rows:
        if block.ready is not None:
            block.ready.synchronize()
        on_host = block.values if block.sums is None else block.sums[: len(block.steps)].tolist()
        sums = np.array(on_host, dtype=np.float64)
        epochs, steps, lrs, times = (np.array(column) for column in zip(*block.steps, strict=True))
        seconds = np.diff(times, prepend=self._last)
        self._last = float(times[-1])
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
            "time": times + self._utc,
            **{name: sums[:, place] for place, name in enumerate(self._scale_state, start=SUMS)},
        }
