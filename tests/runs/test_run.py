"""The creation of a run, its files, and the folder of all runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.commands.show import runs
from pipeline.errors import InputError, StorageError
from pipeline.runs.journal.entries import Claim, Exit
from pipeline.runs.lease.attempt import append_claim
from pipeline.runs.run import Run, log_test_access, open_run, parse_run_ref
from pipeline.runs.status import write_summary
from pipeline.storage import Storage
from tests.runs.factories import create_run

METADATA = {"identity": "ab12", "total_steps": 10, "max_steps": None, "nested": {"columns": ["x"]}}


def test_run_is_created_once(tmp_path: Path) -> None:
    run = Run(Storage.open(str(tmp_path)), "mnist-1")
    assert not run.exists()
    with pytest.raises(FileNotFoundError):
        run.read_metadata()
    assert run.create("name: mnist\n", METADATA)
    assert not run.create("name: other\n", {})
    reopened = Run(Storage.open(str(tmp_path)), "mnist-1")
    assert reopened.exists()
    assert reopened.read_metadata() == METADATA
    assert reopened.read_job_yaml().endswith("}\nname: mnist\n")
    assert (tmp_path / "mnist-1" / "job.yaml").read_text() == reopened.read_job_yaml()
    assert reopened.url == str(tmp_path / "mnist-1")


def test_edited_job_file_is_rejected(tmp_path: Path) -> None:
    run = create_run(str(tmp_path))
    path = tmp_path / "run" / "job.yaml"
    original = path.read_text()
    for text in ("name: run\n", "# trainyard: {}\nname: run\n", "# trainyard: {", original + "seed: 2\n"):
        path.write_text(text)
        with pytest.raises(StorageError, match="not as Trainyard stored it"):
            Run(Storage.open(str(tmp_path)), run.name).read_metadata()


@pytest.mark.parametrize("name", ["", "..", ".hidden", "a/b", "models", "ticks", "a b", "x" * 200])
def test_invalid_run_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(StorageError):
        Run(Storage.open(str(tmp_path)), name)


def list_names(url: str) -> list[str]:
    _, listed_runs, unreadable = runs(url)
    assert not unreadable
    return [listed.status.run for listed in listed_runs]


def test_runs_are_listed_by_creation_time(tmp_path: Path) -> None:
    assert list_names(str(tmp_path / "none")) == []
    for name in ("b", "a"):
        create_run(str(tmp_path), name)
    for other in ("models/mnist", "ticks", "never-created/journal", ".hidden"):
        (tmp_path / other).mkdir(parents=True)
    (tmp_path / "models" / "job.yaml").write_text("")
    (tmp_path / "note.txt").write_text("")
    assert list_names(str(tmp_path)) == ["b", "a"], "the newest last"


def test_runs_on_s3(s3_url: str) -> None:
    run = create_run(s3_url, "mnist-1")
    assert list_names(s3_url) == ["mnist-1"]
    assert not run.create("", {})
    assert run.url == f"{s3_url}/mnist-1"
    assert run.root_url == s3_url


def test_runs_on_s3_are_read_concurrently_in_few_requests(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    for number in range(8):
        run = create_run(s3_url, f"run-{number}")
        attempt = append_claim(run, Claim(number=0, nonce="a", time="", attempt=0))
        for _ in range(3):
            attempt.append(Exit(**attempt.next_entry_fields(), status="failed", step=0))
        write_summary(run, attempt.state, "failed")
    call, num_active, counts = s3fs.S3FileSystem._call_s3, 0, list[int]()

    async def count(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal num_active
        num_active += 1
        counts.append(num_active)
        try:
            return await call(self, *args, **kwargs)
        finally:
            num_active -= 1

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", count)
    assert list_names(s3_url) == [f"run-{number}" for number in range(8)]
    assert len(counts) <= 1 + 8 * 4, "a listing; job.yaml, run.json, the newest entry, none after it"
    assert max(counts) > 1


def test_splits_are_a_parquet_file(tmp_path: Path) -> None:
    table = pa.table({"split": ["train", "val"], "row": [3, 1]})
    create_run(str(tmp_path)).write_splits(table)
    assert pq.read_table(tmp_path / "run" / "splits.parquet").equals(table)


def test_code_is_stored_beside_the_job(tmp_path: Path) -> None:
    run = create_run(str(tmp_path))
    assert not run.has_code()
    assert run.read_code() is None
    run.write_code(b"archive")
    assert run.has_code()
    assert run.read_code() == (tmp_path / "run" / "code.zip").read_bytes() == b"archive"


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("mnist-1", ("mnist-1", "best")),
        ("mnist-1@last", ("mnist-1", "last")),
        ("mnist-1@240", ("mnist-1", "240")),
        ("mnist-1@", ("mnist-1", "best")),
        ("s3://who@bucket/runs/mnist-1@best", ("s3://who@bucket/runs/mnist-1", "best")),
        ("../runs/mnist-1/", ("../runs/mnist-1", "best")),
    ],
)
def test_run_reference_includes_a_checkpoint(reference: str, expected: tuple[str, str]) -> None:
    assert parse_run_ref(reference) == expected


def test_run_is_opened_by_name_or_url(tmp_path: Path) -> None:
    create_run(str(tmp_path / "a"), "mnist-1")
    create_run(str(tmp_path / "b"), "mnist-1")
    assert open_run("mnist-1", str(tmp_path / "a")).url == str(tmp_path / "a" / "mnist-1")
    assert open_run(f"{tmp_path}/b/mnist-1/", "unused").url == str(tmp_path / "b" / "mnist-1")
    with pytest.raises(InputError, match="no such run"):
        open_run("mnist-2", str(tmp_path / "a"))
    with pytest.raises(InputError):
        open_run("mnist-1@best", str(tmp_path / "a"))


def test_reads_of_the_test_split_are_numbered(tmp_path: Path) -> None:
    run = create_run(str(tmp_path))
    assert [log_test_access(run, {"checkpoint": "a"}) for _ in range(3)] == [1, 2, 3]
    assert run.storage.list("reads") == ["00000001.json", "00000002.json", "00000003.json"]


def test_listing_runs_imports_neither_torch_nor_pyarrow() -> None:
    code = """
import sys
from pipeline.commands.show import runs
from pipeline.runs.lease.attempt import probe_lease
print(sorted({"torch", "pyarrow", "numpy", "fsspec", "ray", "safetensors"} & set(sys.modules)))
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output == "[]\n"
