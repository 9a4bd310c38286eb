"""The cores that this process may use. Imports nothing heavy, torch least of all: commands start with it."""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path


def available_cpus() -> int:
    """Cores that this process may use; in a container with a limit no more than that."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min(cores, _cpu_limit())))


def _cpu_limit(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float:
    """The lowest limit of this process' control groups (version 2), in cores; infinity without any."""
    limit = math.inf
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        name = next((line[3:] for line in own.read_text().splitlines() if line.startswith("0::")), "/")
        group = root / name.lstrip("/")
        for folder in (group, *group.parents):
            with contextlib.suppress(OSError):
                quota, period = (folder / "cpu.max").read_text().split()
                limit = min(limit, math.inf if quota == "max" else int(quota) / int(period))
            if folder == root:
                break
    return limit
