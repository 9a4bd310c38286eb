"""What to change in a job whose loss became NaN or infinite."""

from __future__ import annotations

from pipeline.config import JobConfig

LR_FACTOR = 0.1
CLIP_NORM = 1.0
"""What the advice suggests: this factor on the learning rate, and this norm of the gradient."""


def suggest_stable_settings(job: JobConfig, phase: int) -> str:
    """Return what to change in a job that diverged in a phase, as settings with values.

    Parameters
    ----------
    phase: from 1.
    """
    lr = job.train.phases[phase - 1].lr
    settings = [f"lower train.phases.{phase - 1}.lr from {lr:g} to {LR_FACTOR * lr:g}"]
    if job.train.clip_norm is None:
        settings.append(f"train.clip_norm: {CLIP_NORM:g}")
    if job.data.normalize == "none":
        settings.append("data.normalize: auto")
    if job.task.kind == "regression" and not job.task.scale_targets:
        settings.append("task.scale_targets: true")
    first, *others = settings
    return f"{first}, or set {' or '.join(others)}" if others else first
