"""Ray Train's set-up of torch on each worker, preceded by signal handlers and the choice of gloo's network interface.

Both run on the main thread of a worker's process, the only one on which Python can install signal handlers. The
training function runs on another thread.

By default gloo uses the address that the machine's host name resolves to. On many machines that is a loopback address,
which no other machine can connect to. Ray has the address that the nodes of its cluster use.
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

_TorchBackend: Any = TorchConfig().backend_cls


class _TrainyardTorchBackend(_TorchBackend):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(install_notice_handlers)
        worker_group.execute(set_gloo_interface)
        super().on_start(worker_group, backend_config)


class WorkerTorchConfig(TorchConfig):
    """A `TorchConfig` whose workers treat SIGTERM and SIGHUP as a notice, and whose gloo uses Ray's interface."""

    @property
    def backend_cls(self) -> Any:
        return _TrainyardTorchBackend


def set_gloo_interface() -> None:
    """Have gloo use the interface of this Ray node's address, unless the user chose one. Linux only."""
    from ray import util

    ray_util: Any = util
    name = find_interface(ray_util.get_node_ip_address()) if sys.platform == "linux" else None
    if name is not None:
        os.environ.setdefault(GLOO_INTERFACE_VARIABLE, name)


def find_interface(address: str) -> str | None:
    """Return the name of the network interface that has an IPv4 address, or None."""
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
