"""The process that sends a run's metrics beside its driver: it ends with the driver, and its failure is a warning."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from pipeline.events import Event, WarningMessage
from pipeline.trackers.sidecar import TrackerSidecar
from tests.process_kill.run_assertions import wait_for
from tests.trackers.tracked_runs import TrainedRun

DRIVER_SCRIPT = """
import sys
import time

from pipeline.trackers.sidecar import TrackerSidecar
from pipeline.runs.run import open_run

with TrackerSidecar(open_run(sys.argv[1], ""), ["tensorboard"], print) as sidecar:
    sidecar.start()
    print(sidecar._process.pid, flush=True)
    time.sleep(600)
"""


def test_no_trackers_start_no_process(tmp_path: Path) -> None:
    trained = TrainedRun(str(tmp_path))
    with TrackerSidecar(trained.run, [], print) as sidecar:
        sidecar.start()
        assert sidecar._process is None
    trained.close()


def test_failed_tracker_is_one_warning(tmp_path: Path) -> None:
    trained, events = TrainedRun(str(tmp_path)), list[Event]()
    with TrackerSidecar(trained.run, ["tensorboard"], events.append) as sidecar:
        sidecar.start()
        assert sidecar._process is not None
        sidecar._process.kill()
    trained.close()
    (warning,) = events
    assert isinstance(warning, WarningMessage)
    assert "tensorboard: ended with exit code -9" in warning.text
    assert "`trainyard follow run`" in warning.text


def test_sidecar_exits_after_its_driver_is_killed(tmp_path: Path) -> None:
    trained = TrainedRun(str(tmp_path)).commit_at(50)
    driver = subprocess.Popen([sys.executable, "-c", DRIVER_SCRIPT, trained.run.url], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    pid = int(driver.stdout.readline())
    assert is_alive(pid)
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    wait_for(lambda: not is_alive(pid), 60, "the end of the sidecar process")
    trained.close()


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
