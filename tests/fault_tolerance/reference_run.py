"""`train` with plain processes and gloo instead of Ray:

python -m tests.fault_tolerance.reference_run STORAGE PORT
"""

from __future__ import annotations

import multiprocessing
import sys
from typing import Any

import torch
import torch.distributed as dist

from pipeline import train
from pipeline.cluster import driver
from pipeline.config import ScalingConfig
from pipeline.context import SingleProcessContext, T
from pipeline.worker import WorkerSpec, run_worker


class GlooContext(SingleProcessContext):
    """The context of one plain process among several."""

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__()
        self.rank = self.local_rank = rank
        self.world_size = world_size

    def all_reduce(self, vector: torch.Tensor) -> None:
        dist.all_reduce(vector)

    def broadcast(self, value: T | None) -> T:
        values: list[Any] = [value]
        dist.broadcast_object_list(values, src=0)
        received: T = values[0]
        return received


def run_rank(worker_spec: WorkerSpec, rank: int, world_size: int, port: int) -> None:
    """Train as one rank."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    run_worker(worker_spec, GlooContext(rank, world_size))
    dist.destroy_process_group()


def main(storage: str, port: int) -> None:
    """Train `job.yaml` of the working directory."""

    def train_on_processes(create_run: driver.CreateRunFn, scale: ScalingConfig, *_: Any, **__: Any) -> None:
        assert isinstance(scale.workers, int)
        worker_spec, _journal = create_run()
        others = [
            multiprocessing.get_context("spawn").Process(target=run_rank, args=(worker_spec, rank, scale.workers, port))
            for rank in range(1, scale.workers)
        ]
        for other in others:
            other.start()
        run_rank(worker_spec, 0, scale.workers, port)
        for other in others:
            other.join()
            assert other.exitcode == 0

    driver.train_on_workers = train_on_processes
    assert train("job.yaml", storage=storage).status == "finished"


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
