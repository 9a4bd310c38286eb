"""`scale:` where the work runs."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pipeline.job.node import Node, Positive

IN_PLACE_WORKERS = 0
"""`scale.workers` for a run in this process, without Ray."""


class WorkerRange(Node):
    """As many workers as there are, within limits."""

    min: Positive
    max: Positive

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min ({self.min}) must not exceed max ({self.max})")
        return self


class Scale(Node):
    """Where the work runs. Changes speed, and results only by rounding."""

    workers: Annotated[int, Field(ge=0)] | WorkerRange = IN_PLACE_WORKERS
    """0: in this process. n: n Ray Train workers. {min: 1, max: 4}: as many as there are."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: cuda, then mps, then cpu."""
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1
    threads: Positive | Literal["auto"] = "auto"
    """Arithmetic threads a worker. auto: cpus_per_worker, and more for large models in this process: one for each 33
    million multiply-adds of a batch's forward pass, up to every core."""
    retries: Annotated[int, Field(ge=0)] = 3
    """Restarts after lost workers, counted anew whenever a checkpoint was made in between."""
    wait_s: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"
    """After a loss: seconds to wait for room for all workers again. Then a range goes on with as many as fit, and a
    fixed number gives up (the same command goes on). auto: 60 for a range, 900 for a fixed number."""
    hang_s: Annotated[float, Field(gt=0)] | None = 300
    """Seconds without any progress after which a worker is taken for hung: its stacks are saved, and it is started
    again (in this process: the command ends, and goes on where it is typed again). null: never. Waiting for another
    process that prepares the same data is progress as long as that one makes any; a function that returns the data may
    take as long as it likes."""
