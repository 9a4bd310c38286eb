"""The schedule of a run: what happens at each step, as pure functions of the job and the number of training samples."""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass
from functools import cached_property

from pipeline.config import JobConfig, PhaseConfig
from pipeline.config.recipes import auto_batch_size

FIRST_SEGMENT_STEPS = 10
MIN_SEGMENT_STEPS = 100
APPROX_MAX_SEGMENTS = 128
"""A run's metric log has at most about this many files, and a few small ones at its start."""


@dataclass(frozen=True)
class TrainingSchedule:
    """Steps count from 1; step 0 is the untrained model."""

    job: JobConfig
    num_rows: int
    """Samples of the training split."""
    max_steps: int | None = None
    """The option `--max-steps`."""

    @cached_property
    def batch_size(self) -> int:
        """Samples of a full global batch."""
        batch_size_setting = self.job.train.batch_size
        if batch_size_setting == "auto":
            return auto_batch_size(self.num_rows)
        return self.num_rows if batch_size_setting == "all" else batch_size_setting

    @cached_property
    def steps_per_epoch(self) -> int:
        return -(-self.num_rows // self.batch_size)

    @cached_property
    def phase_ends(self) -> list[int]:
        """The last step of each phase."""
        ends, end = [], 0
        for phase in self.job.train.phases:
            end += self.phase_steps(phase)
            ends.append(end)
        return ends

    @cached_property
    def last_step(self) -> int:
        return min(self.phase_ends[-1], self.max_steps or self.phase_ends[-1])

    @property
    def segment_steps(self) -> int:
        """Number of steps per file of the metric log, once its segments have grown to full size."""
        return max(MIN_SEGMENT_STEPS, -(-self.phase_ends[-1] // APPROX_MAX_SEGMENTS))

    def phase_steps(self, phase: PhaseConfig) -> int:
        return phase.steps if phase.steps is not None else (phase.epochs or 0) * self.steps_per_epoch

    def epoch_of(self, step: int) -> int:
        """Return the epoch of a step, from 1; 0 for step 0."""
        return -(-step // self.steps_per_epoch)

    def is_epoch_end(self, step: int) -> bool:
        return step % self.steps_per_epoch == 0

    def lr_at(self, step: int) -> float:
        """Return the learning rate of a step."""
        index = bisect.bisect_left(self.phase_ends, step)
        phase = self.job.train.phases[index]
        position = step - 1 - (self.phase_ends[index - 1] if index else 0)
        return compute_lr(phase, position, self.phase_steps(phase), self.steps_per_epoch)

    def should_reset_optimizer(self, step: int) -> bool:
        """Return whether a phase begins at this step that resets the optimizer's state."""
        if step - 1 not in self.phase_ends[:-1]:
            return False
        return self.job.train.phases[self.phase_ends.index(step - 1) + 1].optimizer_state == "reset"

    def phase_of(self, step: int) -> int:
        """Return the phase of a step, from 1."""
        return bisect.bisect_left(self.phase_ends, step) + 1

    def evaluation_number(self, step: int) -> int:
        """Return the number of the next evaluation at or after a step, from 1; 0 for step 0."""
        config = self.job.evaluate
        return -(-step // (config.every_steps or (config.every_epochs or 1) * self.steps_per_epoch))

    def is_evaluation_due(self, step: int) -> bool:
        config = self.job.evaluate
        return step == self.last_step or self._is_due(step, config.every_epochs, config.every_steps)

    def is_checkpoint_due(self, step: int) -> bool:
        config = self.job.checkpoint
        return step == self.last_step or self._is_due(step, config.every_epochs, config.every_steps)

    def _is_due(self, step: int, every_epochs: int | None, every_steps: int | None) -> bool:
        if every_steps is not None:
            return step % every_steps == 0
        return self.is_epoch_end(step) and self.epoch_of(step) % (every_epochs or 1) == 0


def compute_lr(phase: PhaseConfig, position: int, length: int, steps_per_epoch: int) -> float:
    """Return the learning rate at a position (from 0) in a phase of `length` steps.

    cosine: Loshchilov and Hutter, SGDR, equation 5 without restarts. one_cycle: Smith and Topin, Super-Convergence, in
    the two-phase cosine form of torch.optim.lr_scheduler.OneCycleLR, which it equals.
    """
    if position < phase.warmup_steps:
        return phase.lr * (position + 1) / phase.warmup_steps
    done, left = position - phase.warmup_steps, max(length - phase.warmup_steps, 1)
    if phase.schedule == "step":
        return phase.lr * phase.factor ** (position // (phase.every_epochs * steps_per_epoch))
    if phase.schedule == "cosine":
        return _cosine_annealing(phase.lr, 0.0, done / left)
    if phase.schedule == "one_cycle":
        initial_lr, final_lr, peak = phase.lr / 25, phase.lr / 25 / 1e4, 0.3 * left - 1
        if done <= peak:
            return _cosine_annealing(initial_lr, phase.lr, done / peak)
        return _cosine_annealing(phase.lr, final_lr, (done - peak) / max(left - 1 - peak, 1e-12))
    return phase.lr


def _cosine_annealing(start: float, end: float, fraction: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * min(fraction, 1.0)))
