"""Find Ray's processes on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def find_actor_processes(cluster: Any, actor: str) -> set[int]:
    """Return the process ids of an actor class in this cluster. (Other clusters may run on this machine.)"""
    socket = cluster.nodes()[0]["RayletSocketName"]
    listing = _list_processes()
    raylets = {pid for pid, (_, command) in listing.items() if "/raylet\0" in command and socket in command}
    return {
        pid
        for pid, (parent, command) in listing.items()
        if parent in raylets and command.startswith("ray::") and actor in command
    }


def _list_processes() -> dict[int, tuple[int, str]]:
    """Return the parent's id and the command line of every process, by process id."""
    processes = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = (path / "stat").read_text().rpartition(")")[2].split()[1]
            processes[int(path.name)] = int(parent), (path / "cmdline").read_text()
        except OSError:
            continue
    return processes
