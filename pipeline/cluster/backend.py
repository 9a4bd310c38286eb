"""Ray Train's set-up of torch on each worker, with ours before it.

It runs on the main thread of a worker's process, where alone Python lets signals be caught; the training function does
not.
"""

from __future__ import annotations

from typing import Any

from ray.train.torch import TorchConfig

from pipeline.cluster.interfaces import use_interface_of_node
from pipeline.cluster.signals import catch_notices

_TorchBackend: Any = TorchConfig().backend_cls


class _Backend(_TorchBackend):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(catch_notices)
        worker_group.execute(use_interface_of_node)
        super().on_start(worker_group, backend_config)


class WorkerConfig(TorchConfig):
    """`TorchConfig`, whose workers take SIGTERM and SIGHUP as a notice."""

    @property
    def backend_cls(self) -> Any:
        return _Backend
