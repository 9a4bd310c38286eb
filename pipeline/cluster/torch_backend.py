"""The network interface of a worker for gloo's sums.

Left alone, gloo takes the address that the machine's own name stands for, which on many machines is a loopback one that
no other machine reaches. Ray knows the address by which the nodes of its cluster see each other.

Ray Train's set-up of torch on each worker, with ours before it.

It runs on the main thread of a worker's process, where alone Python lets signals be caught; the training function does
not.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
from typing import Any

from ray.train.torch import TorchConfig

from pipeline.cluster.signals import install_notice_handlers

GLOO_INTERFACE_VARIABLE = "GLOO_SOCKET_IFNAME"
_SIOCGIFADDR = 0x8915


def set_gloo_interface() -> None:
    """Have gloo use the interface of this Ray node's address, unless somebody has said which. Linux only."""
    from ray import util

    ray_util: Any = util
    name = find_interface(ray_util.get_node_ip_address()) if sys.platform == "linux" else None
    if name is not None:
        os.environ.setdefault(GLOO_INTERFACE_VARIABLE, name)


def find_interface(address: str) -> str | None:
    """Name of the interface that has an IPv4 address; None where none has it."""
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp_socket:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                interface_address = socket.inet_ntoa(fcntl.ioctl(udp_socket.fileno(), _SIOCGIFADDR, request)[20:24])
            except OSError:  # no IPv4 address
                continue
            if interface_address == address or (interface_address.startswith("127.") and address.startswith("127.")):
                return name
    return None


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
