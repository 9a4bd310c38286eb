"""Real Ray clusters of several nodes on this machine, whose nodes can be killed.

Each node has its own loopback address and temporary folder. Its processes are found by a mark in their environment. All
processes of a cluster are killed at the end of its `with` block.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

RAY = str(Path(sys.executable).with_name("ray"))
REPOSITORY = Path(__file__).resolve().parents[2]
MARK_VARIABLE = "TRAINYARD_TEST_NODE"
RAYLET_COMMAND = "raylet/raylet "
OBJECT_STORE_BYTES = 80 * 1024 * 1024

HEALTH_CHECK_ENV = {
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "4",
}
"""A node that stops answering is declared dead after about ten seconds (by default after 25 to 65)."""


def ray_environment(token: str) -> dict[str, str]:
    """Return environment variables for every process of a cluster and its drivers."""
    return {
        **HEALTH_CHECK_ENV,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
        # The defaults of 10 to 60 s are not enough on a busy machine.
        "RAY_raylet_start_wait_time_s": "200",
        "RAY_agent_register_timeout_ms": "200000",
        "RAY_worker_register_timeout_seconds": "200",
        "SPT_NOENV": "1",  # else a process title overwrites the environment, which contains the mark
    }


@dataclass(frozen=True)
class NodePlacement:
    """Where a node's processes run: an address, and a prefix of each command that runs it there."""

    address: str
    prefix: Sequence[str] = ()

    def environment(self) -> dict[str, str]:
        return {"NO_PROXY": "*", "no_proxy": "*", "PYTHONPATH": str(REPOSITORY)}


@dataclass
class Node:
    """One node of a cluster."""

    placement: NodePlacement
    mark: str = field(default_factory=lambda: secrets.token_hex(6))
    folder: str = field(default_factory=lambda: tempfile.mkdtemp(prefix="ty-", dir="/tmp"))
    is_lost: bool = False
    """Whether a test has damaged the node, so that it is replaced before the next one."""

    def start(self, cpus: float, token: str, head: str) -> None:
        """Run `ray start`: the head if `head` is at this node's address, else a node that joins the head."""
        own_address, _, port = head.partition(":")
        is_head = own_address == self.placement.address
        role = ["--head", f"--port={port}", "--include-dashboard=false"] if is_head else [f"--address={head}"]
        command = [
            *(*self.placement.prefix, RAY, "start", *role),
            *(f"--node-ip-address={self.placement.address}", f"--num-cpus={cpus}", f"--temp-dir={self.folder}"),
            *(f"--object-store-memory={OBJECT_STORE_BYTES}", "--disable-usage-stats", "--include-log-monitor=false"),
        ]
        environment = {**os.environ, **ray_environment(token), **self.placement.environment(), MARK_VARIABLE: self.mark}
        completed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        assert completed.returncode == 0, (completed.stdout + completed.stderr)[-500:]

    def processes(self, text: str = "") -> set[int]:
        """Return the ids of this node's processes whose command line contains `text`."""
        return {pid for pid, command in _node_processes(self).items() if text in command}

    def signal(self, number: int, text: str = "") -> set[int]:
        """Send a signal to these processes, and return their ids."""
        pids = self.processes(text)
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        self.is_lost = True
        return pids

    def kill_raylet(self) -> None:
        """Kill the raylet with SIGKILL; its workers end themselves when they notice."""
        assert self.signal(signal.SIGKILL, RAYLET_COMMAND)

    def kill(self) -> None:
        """Kill all processes, as if the machine lost its power."""
        while self.signal(signal.SIGKILL):
            time.sleep(0.05)

    def remove(self) -> None:
        """Kill all processes and delete the files."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


class RayCluster:
    """A head without CPUs, where drivers run, and nodes that can be added and killed."""

    def __init__(self, head: NodePlacement, placements: Sequence[NodePlacement], cpus: int = 1) -> None:
        self.token = secrets.token_hex(16)
        self.address = f"{head.address}:{find_free_port()}"
        self.nodes: dict[str, Node] = {}
        """By address, with the head."""
        self._cpus = cpus
        self._head, self._placements = head, placements

    def __enter__(self) -> RayCluster:
        try:
            self.restore()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._remove()

    @property
    def head(self) -> Node:
        return self.nodes[self._head.address]

    def add_node(self, placement: NodePlacement) -> Node:
        """Start a new node at this placement. A new head starts a new cluster."""
        if placement.address in self.nodes:
            self.nodes[placement.address].remove()
        node = self.nodes[placement.address] = Node(placement)
        node.start(0 if placement is self._head else self._cpus, self.token, self.address)
        return node

    def restore(self) -> None:
        """Replace what tests have damaged: the whole cluster if the head is lost, else lost nodes."""
        existing = self.nodes.get(self._head.address)
        if existing is None or existing.is_lost:
            self._remove()
            self.add_node(self._head)
        for placement in self._placements:
            if self._is_lost(placement):
                self.add_node(placement)

    def keep_nodes(self, count: int) -> None:
        """Kill nodes so that `count` are left besides the head."""
        for placement in self._placements[count:]:
            self.nodes[placement.address].kill()

    def node_of(self, pid: int) -> Node:
        """Return the node of a process."""
        (node,) = [node for node in self.nodes.values() if pid in node.processes()]
        return node

    def workers(self) -> dict[int, Node]:
        """Return the nodes of Ray Train's workers, by process id."""
        return {pid: node for node in self.nodes.values() for pid in node.processes("RayTrainWorker")}

    def environment(self) -> dict[str, str]:
        """Return the environment of a driver on the head."""
        return {**os.environ, **ray_environment(self.token), **self._head.environment()}

    def command(self, arguments: Sequence[str]) -> list[str]:
        """Return the command that runs these arguments on the head."""
        return [*self._head.prefix, *arguments]

    def _is_lost(self, placement: NodePlacement) -> bool:
        return placement.address not in self.nodes or self.nodes[placement.address].is_lost

    def _remove(self) -> None:
        for node in self.nodes.values():
            node.remove()
        self.nodes.clear()


def find_free_port() -> int:
    """Return a port that no process listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def loopback_placements(count: int) -> list[NodePlacement]:
    """Return placements at addresses of this machine that no other test uses."""
    net = f"127.{secrets.randbelow(200) + 20}.{secrets.randbelow(250) + 1}"
    return [NodePlacement(f"{net}.{number + 1}") for number in range(count)]


def _node_processes(node: Node) -> Mapping[int, str]:
    """Return the command lines of a node's processes, by process id. The node's mark is in their environment, or their
    output goes to its folder: Ray starts workers with the driver's environment."""
    mark, command_lines = f"{MARK_VARIABLE}={node.mark}\0".encode(), {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            is_of_node = os.readlink(path / "fd/1").startswith(f"{node.folder}/") or (
                mark in (path / "environ").read_bytes() + b"\0"
            )
            command = (path / "cmdline").read_text().replace("\0", " ") if is_of_node else ""
        except OSError:
            continue
        if command:  # empty for a process that has ended and was not waited for
            command_lines[int(path.name)] = command
    return command_lines
