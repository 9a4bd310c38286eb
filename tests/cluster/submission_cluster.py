"""A Ray cluster on this machine with a dashboard and token authentication, and a TCP proxy that can be cut off."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.process_kill.run_assertions import wait_for

CURRENT_CLUSTER_FILE = "ray_current_cluster"
"""Ray's file with a cluster's address, written when the whole cluster runs."""
TOKEN = "jobs-cluster-token-0123456789abcdef"


@dataclass(frozen=True)
class JobsCluster:
    """A running cluster. Its logs are in `folder`, under `session_latest/logs`."""

    url: str
    folder: Path

    def processes(self) -> dict[int, str]:
        """Return the command lines of this cluster's processes that contain its folder, by process id."""
        return {pid: command for pid, command in list_command_lines().items() if str(self.folder) in command}


def list_command_lines() -> dict[int, str]:
    """Return the command line of every process on this machine, by process id."""
    command_lines = {}
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            command = (path / "cmdline").read_bytes().replace(b"\0", b" ")
            command_lines[int(path.name)] = command.decode(errors="replace")
    return command_lines


@contextmanager
def start_cluster(cpus: int = 2) -> Iterator[JobsCluster]:
    """Run a cluster of one node; afterwards all its processes are killed."""
    folder = Path(tempfile.mkdtemp(prefix="tyj-"))  # a short path, because it contains sockets
    dashboard, client = find_free_port(), find_free_port()
    cluster = JobsCluster(f"http://127.0.0.1:{dashboard}", folder / "ray")
    head = (
        "--head", "--port", "0", "--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard),
        "--ray-client-server-port", str(client), "--temp-dir", str(cluster.folder),
    )  # fmt: skip
    try:
        with start_node(folder, cpus, *head) as process:
            wait_for(lambda: process.poll() is not None or _is_reachable(cluster.url), 120, "a Ray cluster")
            wait_for(
                lambda: process.poll() is not None or (cluster.folder / CURRENT_CLUSTER_FILE).exists(),
                60,
                "its address",
            )
            assert process.poll() is None, (folder / "ray-start.log").read_text()
            yield cluster
    finally:
        for _ in range(40):  # workers that have not ended yet write to it
            shutil.rmtree(folder, ignore_errors=True)
            if not folder.exists():
                break
            time.sleep(0.25)


@contextmanager
def add_node(cluster: JobsCluster) -> Iterator[None]:
    """Run another node of the cluster, also on this machine."""
    address = (cluster.folder / CURRENT_CLUSTER_FILE).read_text().strip()
    with start_node(cluster.folder.parent, 1, "--address", address):
        wait_for(lambda: _get(f"{cluster.url}/nodes?view=summary").count(b'"ALIVE"') == 2, 120, "a second node")
        yield


@contextmanager
def start_node(folder: Path, cpus: int, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run `ray start` with these options; afterwards everything that it started is killed."""
    environment = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
    environment |= {"HOME": str(folder), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_worker_niceness": "0"}
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats",
        "--node-ip-address", "127.0.0.1", "--dashboard-agent-listen-port", str(find_free_port()),
        "--min-worker-port", "0", "--max-worker-port", "0", "--num-cpus", str(cpus), *options,
    ]  # fmt: skip
    with open(folder / "ray-start.log", "ab") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        yield process
    finally:
        process.kill()  # SIGTERM would take long
        process.wait()
        for pid, command_line in list_command_lines().items():
            if str(folder) in command_line:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _is_reachable(url: str) -> bool:
    try:
        return bool(_get(f"{url}/api/version"))
    except OSError:
        return False


def _get(url: str) -> bytes:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {TOKEN}"})
    with urllib.request.urlopen(request, timeout=20) as reply:
        return bytes(reply.read())


class TcpProxy:
    """A proxy to a port of this machine that can be cut off for a while."""

    def __init__(self, target_port: int) -> None:
        self.target_port, self.is_cut = target_port, False
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listening.getsockname()[1])
        self._connections: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def disconnect(self, seconds: float) -> None:
        """Close every connection, and accept no new one for some seconds."""
        self.is_cut = True
        for connection in self._connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        time.sleep(seconds)
        self.is_cut = False

    def close(self) -> None:
        self._listening.close()
        for connection in self._connections:
            connection.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            if self.is_cut:
                client.close()
                continue
            server = socket.create_connection(("127.0.0.1", self.target_port))
            self._connections += [client, server]
            for source, sink in ((client, server), (server, client)):
                threading.Thread(target=_forward, args=(source, sink), daemon=True).start()


def _forward(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    with suppress(OSError):
        sink.shutdown(socket.SHUT_WR)
