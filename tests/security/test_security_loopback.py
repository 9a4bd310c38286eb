"""A cluster that `train` starts on this machine listens on loopback alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys

SCRIPT = """
import json, os, warnings
warnings.simplefilter("ignore")
from pipeline.cluster.connection import connected
from pipeline.job import Scale
from tests.security.listening import family, listening

with connected(None, Scale(workers=1), lambda event: None, verbose=False):
    print(json.dumps({pid: sorted(listening(pid)) for pid in family(os.getpid())}))
"""


def test_servers_of_a_local_cluster_listen_on_loopback() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        timeout=240,
        env={**environment, "PYTHONPATH": "."},
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    found = {pid: addresses for pid, addresses in json.loads(ran.stdout.splitlines()[-1]).items() if addresses}
    assert len(found) > 3, "these are not the processes of a cluster"
    assert {address for addresses in found.values() for address in addresses} == {"127.0.0.1"}
