"""The interface that has an address, as gloo is told of it."""

from __future__ import annotations

import socket
import sys

import pytest

from pipeline.cluster.torch_backend import find_interface

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for its interfaces")


def test_interface_of_a_local_address() -> None:
    assert find_interface("127.0.0.1") == "lo"
    assert find_interface("127.9.8.7") == "lo", "all of 127/8 is this machine"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        asking.connect(("192.0.2.1", 9))  # sends nothing: only asks which address would be used
        own_address = asking.getsockname()[0]
    assert find_interface(own_address) in {name for _, name in socket.if_nameindex()}


def test_remote_address_has_no_interface() -> None:
    assert find_interface("198.51.100.7") is None
