"""A cluster that `train` starts on this machine listens on loopback only, and survives a closed terminal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

DRIVER_SCRIPT = """
import json, os, signal, warnings
warnings.simplefilter("ignore")
from pipeline.cluster.connection import ray_connection
from pipeline.config import ScalingConfig
from tests.security.listening_sockets import listening_addresses, process_tree

with ray_connection(None, ScalingConfig(workers=1), lambda event: None, verbose=False) as ray:
    listening = {pid: sorted(listening_addresses(pid)) for pid in process_tree(os.getpid())}
    received = []
    signal.signal(signal.SIGHUP, lambda number, frame: received.append(number))
    os.killpg(0, signal.SIGHUP)  # as when a terminal is closed
    square = ray.remote(num_cpus=1, max_retries=0)(lambda x: x * x)
    print(json.dumps({"listening": listening, "received": received, "square": ray.get(square.remote(7), timeout=120)}))
"""


@pytest.fixture(scope="module")
def cluster_facts() -> Any:
    """The output of a driver that starts such a cluster, in its own session."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    ran = subprocess.run(
        [sys.executable, "-c", DRIVER_SCRIPT],
        capture_output=True,
        text=True,
        timeout=240,
        env={**environment, "PYTHONPATH": "."},
        check=False,
        start_new_session=True,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


def test_local_cluster_servers_listen_on_loopback(cluster_facts: Any) -> None:
    by_pid = {pid: addresses for pid, addresses in cluster_facts["listening"].items() if addresses}
    assert len(by_pid) > 3, "too few processes for a cluster"
    assert {address for addresses in by_pid.values() for address in addresses} == {"127.0.0.1"}


def test_closed_terminal_does_not_end_cluster_processes(cluster_facts: Any) -> None:
    assert (len(cluster_facts["received"]), cluster_facts["square"]) == (1, 49)
