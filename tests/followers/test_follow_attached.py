"""The process that follows a run while it is driven: it ends with its driver, and is never more than a warning."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from pipeline.events import Event, WarningMessage
from pipeline.followers.attached import AttachedFollowers
from tests.faults.fault_evidence import wait_for
from tests.followers.followed_runs import Trained

DRIVER = """
import sys
import time

from pipeline.followers.attached import AttachedFollowers
from pipeline.record.run import open_run

with AttachedFollowers(open_run(sys.argv[1], ""), ["tensorboard"], print) as followers:
    followers.start()
    print(followers._process.pid, flush=True)
    time.sleep(600)
"""


def test_without_followers_nothing_starts(tmp_path: Path) -> None:
    trained = Trained(str(tmp_path))
    with AttachedFollowers(trained.run, [], print) as followers:
        followers.start()
        assert followers._process is None
    trained.close()


def test_one_that_dies_is_one_warning(tmp_path: Path) -> None:
    trained, seen = Trained(str(tmp_path)), list[Event]()
    with AttachedFollowers(trained.run, ["tensorboard"], seen.append) as followers:
        followers.start()
        assert followers._process is not None
        followers._process.kill()
    trained.close()
    (warning,) = seen
    assert isinstance(warning, WarningMessage)
    assert "tensorboard: ended with exit code -9" in warning.text
    assert "`trainyard follow run`" in warning.text


def test_a_driver_that_is_killed_is_followed_by_its_follower(tmp_path: Path) -> None:
    trained = Trained(str(tmp_path)).to(50)
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, trained.run.url], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    pid = int(driver.stdout.readline())
    assert is_alive(pid)
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    wait_for(lambda: not is_alive(pid), 60, "the follower's end")
    trained.close()


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
