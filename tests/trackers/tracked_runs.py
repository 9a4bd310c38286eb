"""Runs for the tests of trackers, written by the real run writer, and a real MLflow server."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.runs.async_writer import AsyncRunWriter
from pipeline.runs.lease.attempt import acquire_lease
from pipeline.runs.metric_log import live
from pipeline.runs.metric_log.schema import MetricSchema
from pipeline.runs.run import Run
from tests.process_kill.run_assertions import wait_for
from tests.runs.factories import create_run, make_block, make_evaluation, make_snapshot


class TrainedRun:
    """A run that is written step by step, in segments of 100 steps."""

    def __init__(self, url: str) -> None:
        self.run: Run = create_run(url)
        self.step = 0
        self._attempt = acquire_lease(self.run, driver="d", metadata={})
        self._recorder = AsyncRunWriter(self._attempt, keep=2)
        self._recorder.log_evaluation(make_evaluation(0, loss=0.7))

    def commit_at(self, step: int, *, end: bool = False) -> TrainedRun:
        """Log steps up to `step` and an evaluation, commit, and wait until the commit is durable."""
        self._recorder.log_steps(make_block(self.step + 1, step))
        self._recorder.log_evaluation(make_evaluation(step, loss=1 / step))
        self._recorder.commit(make_snapshot(step, best=step, is_final=end))
        self._recorder.finish()
        self.step = step
        if end:
            self.close()
        return self

    def train_to(self, step: int) -> TrainedRun:
        """Log steps up to `step` and an evaluation without a commit, and wait until they are live rows."""
        self._recorder.log_steps(make_block(self.step + 1, step))
        self._recorder.log_evaluation(make_evaluation(step, loss=1 / step))
        self.step = step
        self.wait_for_live_rows()
        return self

    def resume(self) -> TrainedRun:
        """Start another attempt, as after a kill of this one."""
        self.close()
        again = TrainedRun.__new__(TrainedRun)
        again.run = self.run
        again._attempt = acquire_lease(self.run, driver="d", metadata={}, known_dead_attempt=self._attempt.number)
        again._recorder = AsyncRunWriter(again._attempt, keep=2)
        again.step = again._attempt.resume_checkpoint.step if again._attempt.resume_checkpoint is not None else 0
        again.wait_for_live_rows()
        return again

    def wait_for_live_rows(self) -> None:
        """Wait until the live rows include the last step of this attempt."""

        def has_last_step() -> bool:
            rows = live.read_live_tables(self.run, MetricSchema())
            last = rows.steps["step"][-1].as_py() if rows is not None and len(rows.steps) else 0
            return rows is not None and (rows.attempt, last) == (self._attempt.number, self.step)

        wait_for(has_last_step, 60, "live rows")

    def close(self) -> None:
        """Stop writing the run."""
        self._recorder.close()
        self._attempt.close()


def find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def start_mlflow_server(folder: Path, port: int) -> Iterator[str]:
    """Run MLflow's server on the loopback interface, with an SQLite file in `folder`; yields its URL."""
    url = f"http://127.0.0.1:{port}"
    options = ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--default-artifact-root", str(folder)]
    environment = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *options, "--host=127.0.0.1", f"--port={port}", "--workers=1"],
            env={**os.environ, **environment},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        for _ in range(600):
            try:
                with urllib.request.urlopen(f"{url}/health", timeout=5):
                    break
            except OSError:
                assert server.poll() is None, (folder / "server.log").read_text()
                time.sleep(0.1)
        yield url
    finally:
        os.killpg(server.pid, 9)  # its workers too: they are in its session
        server.wait()
