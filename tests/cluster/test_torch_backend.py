"""The network interface that has an address, which gloo is to use."""

from __future__ import annotations

import socket
import sys

import pytest

from pipeline.cluster.torch_backend import find_interface

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="interfaces are listed on Linux only")


def test_interface_of_a_local_address() -> None:
    assert find_interface("127.0.0.1") == "lo"
    assert find_interface("127.9.8.7") == "lo", "all addresses of 127/8 are this machine"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp_socket:
        udp_socket.connect(("192.0.2.1", 9))  # sends nothing, but chooses the local address
        local_address = udp_socket.getsockname()[0]
    assert find_interface(local_address) in {name for _, name in socket.if_nameindex()}


def test_remote_address_has_no_interface() -> None:
    assert find_interface("198.51.100.7") is None
