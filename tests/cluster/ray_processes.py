"""Ray's processes on this machine, as a process listing shows them."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def find_actor_processes(cluster: Any, actor: str) -> set[int]:
    """Processes of a class of actors in this cluster. (Other clusters may run on this machine.)"""
    socket = cluster.nodes()[0]["RayletSocketName"]
    listing = _list_processes()
    raylets = {pid for pid, (_, words) in listing.items() if "/raylet\0" in words and socket in words}
    return {
        pid
        for pid, (parent, words) in listing.items()
        if parent in raylets and words.startswith("ray::") and actor in words
    }


def _list_processes() -> dict[int, tuple[int, str]]:
    """Parent and command line of every process."""
    processes = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = (path / "stat").read_text().rpartition(")")[2].split()[1]
            processes[int(path.name)] = int(parent), (path / "cmdline").read_text()
        except OSError:
            continue
    return processes
