"""Several virtual hosts on this machine: network namespaces with their own addresses, whose links can be set down.

Each host has a network interface to the cluster and one to the storage, and its own host name and boot id, so that no
process can prove anything about a process on another host. They share the file system, as hosts with a mounted one do.
The switches are in a namespace too, so the machine's own network is not changed.
"""

from __future__ import annotations

import functools
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from tests.fault_tolerance.nodes import NodePlacement

NETWORKS = {"cluster": "10.99.0", "storage": "10.99.1"}
S3_PORT = 9000
BUCKET = "trainyard-hosts"
S3_URL = f"s3://{BUCKET}/runs"
S3_ENV_VARS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}

S3_SERVER_SCRIPT = """
import sys, threading
from moto.server import ThreadedMotoServer
ThreadedMotoServer(ip_address=sys.argv[1], port=int(sys.argv[2]), verbose=False).start()
import boto3
boto3.client("s3", endpoint_url=f"http://{sys.argv[1]}:{sys.argv[2]}").create_bucket(Bucket=sys.argv[3])
print("ready", flush=True)
threading.Event().wait()
"""

S3_COPY_SCRIPT = """
import sys
from pathlib import Path
import boto3
endpoint, bucket, folder = sys.argv[1:]
client = boto3.client("s3", endpoint_url=endpoint)
for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket):
    for item in page.get("Contents", []):
        path = Path(folder) / item["Key"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(client.get_object(Bucket=bucket, Key=item["Key"])["Body"].read())
"""


@functools.cache
def unavailable_reason() -> str:
    """Return why this machine cannot have virtual hosts; empty if it can."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "network namespaces need Linux and root"
    if missing := [tool for tool in ("ip", "unshare", "mount") if shutil.which(tool) is None]:
        return f"no {', '.join(missing)} on this machine"
    try:
        with VirtualHosts(1):
            return ""
    except subprocess.CalledProcessError as error:
        return f"this machine allows no network namespaces: {error.stderr.strip() or error}"


class VirtualHosts:
    """A number of virtual hosts, and the switches between them."""

    def __init__(self, count: int) -> None:
        self.token = secrets.token_hex(3)
        self.count = count
        self._folder = Path(tempfile.mkdtemp(prefix="ty-", dir="/tmp"))
        self._namespaces: list[str] = []

    def __enter__(self) -> VirtualHosts:
        try:
            self._make()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._remove()

    def placement(self, host: int) -> NodePlacement:
        """Return the placement of a Ray node on this host (0, 1, ...)."""
        return NodePlacement(self.address(host, "cluster"), self._prefix(host))

    def address(self, host: int, net: str) -> str:
        return f"{NETWORKS[net]}.{host + 1}"

    def disconnect(self, host: int, net: str = "cluster") -> None:
        """Set this host's link to a switch down."""
        self._set_link(host, net, "down")

    def reconnect(self, host: int, net: str = "cluster") -> None:
        """Set the link up again."""
        self._set_link(host, net, "up")

    def reconnect_all(self) -> None:
        """Set all links up."""
        for host in range(self.count):
            for net in NETWORKS:
                self.reconnect(host, net)

    def host_of(self, address: str) -> int:
        """Return the host of a Ray node's address."""
        return int(address.rpartition(".")[2]) - 1

    def _make(self) -> None:
        switch = self._add("switch")
        for net in NETWORKS:
            _run_ip("-n", switch, "link", "add", net, "type", "bridge")
            _run_ip("-n", switch, "link", "set", net, "up")
        for host in range(self.count):
            name = self._add(str(host))
            _run_ip("-n", name, "link", "set", "lo", "up")
            for net in NETWORKS:
                port = f"{net}{host}"
                _run_ip("-n", switch, "link", "add", port, "type", "veth", "peer", "name", f"{net}0", "netns", name)
                _run_ip("-n", switch, "link", "set", port, "master", net, "up")
                _run_ip("-n", name, "address", "add", f"{self.address(host, net)}/24", "dev", f"{net}0")
                _run_ip("-n", name, "link", "set", f"{net}0", "up")
            (self._folder / str(host)).write_text(f"00000000-0000-4000-8000-{self.token}{host:06x}\n")
        subprocess.run([*self._prefix(0), "true"], check=True, capture_output=True, text=True)

    def _prefix(self, host: int) -> list[str]:
        """Return the prefix of a command that runs it on a host."""
        boot_id = "/proc/sys/kernel/random/boot_id"
        enter = f'hostname host{host}; mount --bind {self._folder / str(host)} {boot_id}; exec "$@"'
        return ["ip", "netns", "exec", self._name(str(host)), "unshare", "--uts", "sh", "-e", "-c", enter, "sh"]

    def _set_link(self, host: int, net: str, state: str) -> None:
        _run_ip("-n", self._name("switch"), "link", "set", f"{net}{host}", state)

    def _name(self, suffix: str) -> str:
        return f"ty{self.token}-{suffix}"

    def _add(self, suffix: str) -> str:
        _run_ip("netns", "add", self._name(suffix))
        self._namespaces.append(self._name(suffix))
        return self._name(suffix)

    def _remove(self) -> None:
        for name in self._namespaces:
            while pids := _run_ip("netns", "pids", name).split():
                for pid in pids:
                    with suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)
                time.sleep(0.05)
            _run_ip("netns", "del", name)
        self._namespaces.clear()
        shutil.rmtree(self._folder, ignore_errors=True)


class S3Server:
    """moto's S3 server on a separate host, connected to the storage network only."""

    def __init__(self, hosts: VirtualHosts, host: int) -> None:
        self.host = host
        self._prefix = hosts.placement(host).prefix
        self._endpoint = (hosts.address(host, "storage"), str(S3_PORT))
        self.environment = {**S3_ENV_VARS, "AWS_ENDPOINT_URL": "http://" + ":".join(self._endpoint)}

    def __enter__(self) -> S3Server:
        self._server = subprocess.Popen(
            [*self._prefix, sys.executable, "-c", S3_SERVER_SCRIPT, *self._endpoint, BUCKET],
            env={**os.environ, **S3_ENV_VARS, "NO_PROXY": "*"},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._server.stdout is not None
        assert self._server.stdout.readline() == "ready\n"
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._server.kill()
        self._server.wait()
        assert self._server.stdout is not None
        self._server.stdout.close()

    def download(self, folder: Path) -> None:
        """Copy the bucket's content to a folder of this machine."""
        command = [
            *self._prefix,
            sys.executable,
            "-c",
            S3_COPY_SCRIPT,
            self.environment["AWS_ENDPOINT_URL"],
            BUCKET,
            str(folder),
        ]
        subprocess.run(command, env={**os.environ, **S3_ENV_VARS, "NO_PROXY": "*"}, check=True)


def _run_ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout
