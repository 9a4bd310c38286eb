"""The addresses that a process and its children listen on, from Linux's /proc."""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
from pathlib import Path

LISTEN_STATE = "0A"


def process_tree(pid: int) -> list[int]:
    """Return a process and all its descendants."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    pids = [pid]
    for parent_pid in pids:
        pids += [child for child, parent in parents.items() if parent == parent_pid]
    return pids


def listening_addresses(pid: int) -> set[str]:
    """Return the addresses of the TCP sockets that a process listens on."""
    socket_inodes = set()
    for descriptor in Path(f"/proc/{pid}/fd").glob("*"):
        try:
            socket_inodes.add(os.readlink(descriptor).removeprefix("socket:[").removesuffix("]"))
        except OSError:
            continue
    addresses = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTEN_STATE and fields[9] in socket_inodes:
                addresses.add(_address(fields[1].partition(":")[0]))
    return addresses


def _address(text: str) -> str:
    words = [struct.pack("<I", int(text[start : start + 8], 16)) for start in range(0, len(text), 8)]
    if len(words) == 1:
        return socket.inet_ntoa(words[0])
    address = ipaddress.IPv6Address(b"".join(words))
    return str(address.ipv4_mapped or address)


def list_command_lines(pid: int) -> list[str]:
    """Return the command lines of a process and all its descendants."""
    lines = []
    for process in process_tree(pid):
        try:
            lines.append(Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue
    return lines
