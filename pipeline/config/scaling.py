"""`scale:` workers, devices, retries."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pipeline.config.base import ConfigNode, Positive

IN_PLACE_WORKERS = 0
"""`scale.workers` for a run in this process, without Ray."""


class WorkerRange(ConfigNode):
    """As many workers as the cluster has resources for, within limits."""

    min: Positive
    """The smallest number of workers; with resources for fewer, the run waits."""
    max: Positive
    """The largest number of workers."""

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min ({self.min}) must not exceed max ({self.max})")
        return self


class ScalingConfig(ConfigNode):
    """Where to run. Changes speed, and results only by rounding."""

    workers: Annotated[int, Field(ge=0)] | WorkerRange = IN_PLACE_WORKERS
    """0: in this process. n: n Ray Train workers. {min: 1, max: 4}: as many as there are resources for."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """The device to compute on; auto: cuda if there is one, else mps, else cpu."""
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1
    """CPU cores that Ray reserves for each worker."""
    threads: Positive | Literal["auto"] = "auto"
    """Compute threads per worker. auto: cpus_per_worker, and more for large models in this process: one for each 33
    million multiply-adds of a batch's forward pass, up to the number of cores."""
    retries: Annotated[int, Field(ge=0)] = 3
    """Consecutive worker failures after which the run is restarted; the count starts again when a checkpoint was
    saved."""
    wait_s: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"
    """Seconds to wait for resources for all workers after a worker failure. Then a range continues with as many as fit,
    and a fixed number gives up (the same command resumes the run). auto: 60 for a range, 900 for a fixed number."""
    hang_s: Annotated[float, Field(gt=0)] | None = 300
    """Seconds without any progress after which a worker counts as hung: its stacks are saved and it is restarted (in
    this process: the command ends, and resumes when it is run again). null: never. Waiting for another process that
    prepares the same data is progress as long as that process makes any; a function that returns the data may take as
    long as it likes."""
