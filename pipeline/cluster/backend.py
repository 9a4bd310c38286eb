"""Ray Train's set-up of torch on each worker, with ours before it.

It runs on the main thread of a worker's process, where alone Python lets signals be caught; the training function does
not.
"""

from __future__ import annotations

from typing import Any

from ray.train.torch import TorchConfig

from pipeline.cluster.interfaces import set_gloo_interface
from pipeline.cluster.signals import install_notice_handlers

_TorchBackend: Any = TorchConfig().backend_cls


class _TrainyardTorchBackend(_TorchBackend):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(install_notice_handlers)
        worker_group.execute(set_gloo_interface)
        super().on_start(worker_group, backend_config)


class WorkerTorchConfig(TorchConfig):
    """`TorchConfig`, whose workers take SIGTERM and SIGHUP as a notice."""

    @property
    def backend_cls(self) -> Any:
        return _TrainyardTorchBackend
