"""The content of a wheel, and `submit` from an installed one, which sends the package from site-packages."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import __version__
from tests.cluster.submission_cluster import TOKEN, JobsCluster
from tests.process_kill.run_assertions import read_entries

REPOSITORY = Path(__file__).parents[2]
MARKED_VERSION = f"{__version__}+wheel"
"""Distinguishes the installed package from that of the checkout, which the cluster's environment has too."""
JOB: dict[str, Any] = {
    "name": "from-a-wheel",
    "data": {"source": "disc", "normalize": "scalar", "splits": {"val": 0.2}},
    "model": {"kind": "mlp", "hidden": [8]},
    "train": {"batch_size": 100, "phases": [{"epochs": 1, "lr": 0.3}]},
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel, built from a copy of the sources without network access."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(REPOSITORY / "pipeline", folder / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(REPOSITORY / name, folder / name)
    version = folder / "pipeline" / "version.py"
    version.write_text(version.read_text().replace(f'"{__version__}"', f'"{MARKED_VERSION}"'))
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder / "dist"), str(folder))
    (path,) = (folder / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def site_packages(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel is installed, with another module beside it."""
    folder = tmp_path_factory.mktemp("site-packages")
    pip("install", "--no-deps", "--no-index", "--no-compile", "--target", str(folder), str(wheel))
    (folder / "unrelated.py").write_text("")
    return folder


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
    completed = subprocess.run(command, capture_output=True, text=True)
    assert completed.returncode == 0, completed.stdout + completed.stderr


def run_installed(site_packages: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENT...` in another folder, with the installed package."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"PYTHONPATH": str(site_packages), "RAY_AUTH_TOKEN": TOKEN}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=240
    )


def test_wheel_has_every_module_and_the_py_typed_marker(wheel: Path) -> None:
    modules = {path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "pipeline").rglob("*.py")}
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == modules | {"pipeline/py.typed"}


def test_files_sent_from_an_installed_wheel_are_the_package_and_the_code_only(
    site_packages: Path, tmp_path: Path
) -> None:
    program = (
        "import json; from pipeline.cluster.submission.packaging import stage_package\n"
        "with stage_package({'nets.py': b''}) as package: print(json.dumps(sorted(package.list_files())))"
    )
    completed = run_installed(site_packages, tmp_path, "-c", program)
    assert completed.returncode == 0, completed.stderr
    modules = {path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "pipeline").rglob("*.py")}
    assert set(json.loads(completed.stdout)) == modules | {"trainyard_code/nets.py"}


def test_submit_from_an_installed_wheel_runs_its_package_on_the_cluster(
    site_packages: Path, jobs_cluster: JobsCluster, tmp_path: Path
) -> None:
    """Training is in the entry point's process, without workers."""
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(JOB))
    submit = ("-m", "pipeline", "submit", "job.yaml", "--address", jobs_cluster.url, "--json")
    completed = run_installed(site_packages, tmp_path, *submit, "--storage", str(tmp_path / "runs"))
    assert completed.returncode == 0, completed.stderr
    assert json.loads(completed.stdout.splitlines()[-1])["status"] == "finished"
    (run,) = (path.parent for path in (tmp_path / "runs").glob("*/job.yaml"))
    assert MARKED_VERSION in json.dumps(read_entries(run))
