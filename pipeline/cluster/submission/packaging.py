"""What is sent to a cluster: the package and the job's own code. Nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from pipeline.user_code.dependencies import PACKAGE_FOLDER

ENTRYPOINT_MODULE = "pipeline.cli.entrypoint"
"""What a cluster runs for `trainyard submit`, with `python -m`; a part of the package, so that it is sent with it."""
CODE_FOLDER = "trainyard_code"
"""Where the job's own code lies in what is sent; the resolved job names it so."""


@dataclass(frozen=True)
class StagedPackage:
    """Folders of this machine that hold what is sent."""

    package: Path
    """The package alone. The same for every job, so that a cluster gets it once."""
    folder: Path
    """What a job's processes start in: the job's own code; empty where it has none."""

    def runtime_env(self) -> dict[str, object]:
        """For Ray, which sends each folder once for all jobs that have the same."""
        return {"py_modules": [str(self.package)], "working_dir": str(self.folder)}

    def list_files(self) -> dict[str, int]:
        """Every file that is sent, and its size in bytes."""
        return {
            f"{above}{file.relative_to(folder).as_posix()}": file.stat().st_size
            for folder, above in ((self.package, f"{self.package.name}/"), (self.folder, ""))
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        }

    def describe(self) -> str:
        """`656 kB: the package, the job, 2 files of its code`"""
        files = self.list_files()
        num_code_files = sum(path.startswith(f"{CODE_FOLDER}/") for path in files)
        code = f", {num_code_files} file{'s' * (num_code_files != 1)} of its code" if num_code_files else ""
        return f"{sum(files.values()) / 1000:,.0f} kB: the package, the job{code}"


@contextmanager
def stage_package(code: Mapping[str, bytes]) -> Iterator[StagedPackage]:
    """A cargo in temporary folders.

    Of the package its Python files alone are taken, from wherever it was imported: a checkout, or an installed wheel.

    Parameters
    ----------
    code: the Python files of the job's own, by their paths below an import path.
    """
    with TemporaryDirectory(prefix="trainyard-cargo-") as temporary:
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
