"""`train --address` on a cluster that requires a token: the user's token is used; without one there is one message."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.command_line import write_job
from tests.cluster.submission_cluster import CURRENT_CLUSTER_FILE, TOKEN, JobsCluster

COMMAND = str(Path(sys.executable).with_name("trainyard"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_token_is_used_and_a_missing_or_wrong_token_is_one_message(jobs_cluster: JobsCluster, tmp_path: Path) -> None:
    """Starts of workers: 1."""
    job = write_job(tmp_path, scale={"workers": 1, "device": "cpu"})
    address = (jobs_cluster.folder / CURRENT_CLUSTER_FILE).read_text().strip()
    clean_environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}

    def train(**environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [COMMAND, "train", job, "--address", address, "--storage", str(tmp_path / "runs")],
            env={**clean_environment, "HOME": str(tmp_path), **environment},
            capture_output=True,
            text=True,
        )

    missing = train()
    assert (missing.returncode, missing.stderr.count("error: ")) == (2, 1), missing.stderr
    assert "the cluster requires a token" in missing.stderr
    assert "gcs_client" not in missing.stderr, "only --verbose shows Ray's output"
    wrong = train(RAY_AUTH_TOKEN="a-wrong-token-of-the-environment")
    assert wrong.returncode == 2
    assert "refuses the token of RAY_AUTH_TOKEN" in wrong.stderr
    assert "a-wrong-token" not in wrong.stderr
    assert not (tmp_path / "runs").exists()
    right = train(RAY_AUTH_TOKEN=TOKEN)
    assert right.returncode == 0, right.stderr
    assert "finished at step 24" in right.stdout
