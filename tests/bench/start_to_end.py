"""The time of the whole command: `trainyard train` and a bare torch script that does the same work, in turn.

    python tests/bench/start_to_end.py [--mnist ROOT] [--runs 5]

Prints wall and CPU seconds of each pair, the medians, and the ratio trainyard / bare.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mnist", help="folder with MNIST/raw")
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    compare("disc", args.runs, [], [])
    if args.mnist:
        root = str(Path(args.mnist).resolve())
        compare("mnist", args.runs, ["--set", f"data.root={root}"], [root])


def compare(job: str, runs: int, trainyard_args: list[str], bare_args: list[str]) -> None:
    """Time both, `runs` times in turn, after one warm-up each."""
    python, seconds = sys.executable, []
    for number in range(runs + 1):
        with tempfile.TemporaryDirectory() as storage:
            train = [python, "-m", "pipeline", "train", f"jobs/{job}.yaml", "--storage", storage, *trainyard_args]
            pair = (time_command(train), time_command([python, "tests/bench/bare.py", job, *bare_args]))
        if number:
            seconds.append(pair)
            print(f"{job}: trainyard {pair[0][0]:.2f} s wall {pair[0][1]:.2f} s CPU, "
                  f"bare {pair[1][0]:.2f} s wall {pair[1][1]:.2f} s CPU", flush=True)  # fmt: skip
    for kind, name in enumerate(("wall", "CPU")):
        trainyard, bare = ([pair[side][kind] for pair in seconds] for side in (0, 1))
        ratio = statistics.median(a / b for a, b in zip(trainyard, bare, strict=True))
        print(f"{job}: median {name} {statistics.median(trainyard):.2f} and {statistics.median(bare):.2f} s, "
              f"ratio {ratio:.2f}")  # fmt: skip


def time_command(command: list[str]) -> tuple[float, float]:
    """Return the wall and CPU seconds of a command."""
    before, begun = os.times(), time.perf_counter()
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    after = os.times()
    return time.perf_counter() - begun, sum(after[2:4]) - sum(before[2:4])


if __name__ == "__main__":
    main()
