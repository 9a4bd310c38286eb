"""The files that are sent to a cluster: this package and the job's own code, nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from pipeline.user_code.dependencies import PACKAGE_FOLDER

ENTRYPOINT_MODULE = "pipeline.cli.entrypoint"
"""The module that a cluster runs for `trainyard submit`, with `python -m`."""
CODE_FOLDER = "trainyard_code"
"""The folder of the job's own code; `code` of the resolved job."""


@dataclass(frozen=True)
class StagedPackage:
    """Temporary folders of this machine with the files that are sent."""

    package: Path
    """This package alone. It is the same for every job, so a cluster gets it once."""
    folder: Path
    """The working directory of the job's processes, with the job's own code; empty if it has none."""

    def runtime_env(self) -> dict[str, object]:
        """Return Ray's `runtime_env`. Ray uploads each folder once for all jobs with the same content."""
        return {"py_modules": [str(self.package)], "working_dir": str(self.folder)}

    def list_files(self) -> dict[str, int]:
        """Return the size in bytes of every file that is sent, by path."""
        return {
            f"{prefix}{file.relative_to(folder).as_posix()}": file.stat().st_size
            for folder, prefix in ((self.package, f"{self.package.name}/"), (self.folder, ""))
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        }

    def describe(self) -> str:
        """Describe the files as `656 kB: the package, the job, 2 files of its code`."""
        files = self.list_files()
        num_code_files = sum(path.startswith(f"{CODE_FOLDER}/") for path in files)
        code = f", {num_code_files} file{'s' * (num_code_files != 1)} of its code" if num_code_files else ""
        return f"{sum(files.values()) / 1000:,.0f} kB: the package, the job{code}"


@contextmanager
def stage_package(code: Mapping[str, bytes]) -> Iterator[StagedPackage]:
    """Make a `StagedPackage`, which is deleted afterwards.

    It has only the Python files of this package, from where it was imported: a checkout, or an installed wheel.

    Parameters
    ----------
    code: the Python files of the job's own code, by their paths relative to an import path.
    """
    with TemporaryDirectory(prefix="trainyard-package-") as temporary:
        package, folder = Path(temporary, PACKAGE_FOLDER.name), Path(temporary, "job")
        for file in sorted(PACKAGE_FOLDER.rglob("*.py")):
            _write_file(package / file.relative_to(PACKAGE_FOLDER), file.read_bytes())
        folder.mkdir()
        for path, content in code.items():
            _write_file(folder / CODE_FOLDER / path, content)
        yield StagedPackage(package, folder)


def _write_file(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
