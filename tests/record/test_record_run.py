"""The birth of a run, and the folder that holds all of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import InputError, StorageError
from pipeline.record.attempt import take
from pipeline.record.entries import Claim, Leave
from pipeline.record.reads import record_read
from pipeline.record.run import Run, open_run, run_and_checkpoint
from pipeline.record.standing import write_view
from pipeline.storage import Storage
from pipeline.verbs.show import runs
from tests.record.record_parts import born

FACTS = {"identity": "ab12", "total_steps": 10, "max_steps": None, "nested": {"columns": ["x"]}}


def test_a_run_is_born_once(tmp_path: Path) -> None:
    run = Run(Storage.open(str(tmp_path)), "mnist-1")
    assert not run.exists()
    with pytest.raises(FileNotFoundError):
        run.facts()
    assert run.birth("name: mnist\n", FACTS)
    assert not run.birth("name: other\n", {})
    again = Run(Storage.open(str(tmp_path)), "mnist-1")
    assert again.exists()
    assert again.facts() == FACTS
    assert again.job_yaml().endswith("}\nname: mnist\n")
    assert (tmp_path / "mnist-1" / "job.yaml").read_text() == again.job_yaml()
    assert again.url == str(tmp_path / "mnist-1")


def test_a_job_file_that_someone_edited_is_refused(tmp_path: Path) -> None:
    run = born(str(tmp_path))
    path = tmp_path / "run" / "job.yaml"
    born_text = path.read_text()
    for text in ("name: run\n", "# trainyard: {}\nname: run\n", "# trainyard: {", born_text + "seed: 2\n"):
        path.write_text(text)
        with pytest.raises(StorageError, match="not as Trainyard stored it"):
            Run(Storage.open(str(tmp_path)), run.name).facts()


@pytest.mark.parametrize("name", ["", "..", ".hidden", "a/b", "models", "ticks", "a b", "x" * 200])
def test_names_that_are_no_runs(tmp_path: Path, name: str) -> None:
    with pytest.raises(StorageError):
        Run(Storage.open(str(tmp_path)), name)


def listed(url: str) -> list[str]:
    _, listed_runs, unreadable = runs(url)
    assert not unreadable
    return [one.standing.run for one in listed_runs]


def test_runs_are_listed_by_their_birth(tmp_path: Path) -> None:
    assert listed(str(tmp_path / "none")) == []
    for name in ("b", "a"):
        born(str(tmp_path), name)
    for other in ("models/mnist", "ticks", "unborn/journal", ".hidden"):
        (tmp_path / other).mkdir(parents=True)
    (tmp_path / "models" / "job.yaml").write_text("")
    (tmp_path / "note.txt").write_text("")
    assert listed(str(tmp_path)) == ["b", "a"], "the newest last"


def test_runs_on_s3(s3_url: str) -> None:
    run = born(s3_url, "mnist-1")
    assert listed(s3_url) == ["mnist-1"]
    assert not run.birth("", {})
    assert run.url == f"{s3_url}/mnist-1"
    assert run.root_url == s3_url


def test_runs_on_s3_are_read_side_by_side_and_in_few_requests(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    for number in range(8):
        run = born(s3_url, f"run-{number}")
        attempt = take(run, Claim(number=0, nonce="a", time="", attempt=0))
        for _ in range(3):
            attempt.append(Leave(**attempt.common(), status="failed", step=0))
        write_view(run, attempt.state, "failed")
    call, under_way, asked = s3fs.S3FileSystem._call_s3, 0, list[int]()

    async def counted(self: Any, *words: Any, **options: Any) -> Any:
        nonlocal under_way
        under_way += 1
        asked.append(under_way)
        try:
            return await call(self, *words, **options)
        finally:
            under_way -= 1

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", counted)
    assert listed(s3_url) == [f"run-{number}" for number in range(8)]
    assert len(asked) <= 1 + 8 * 4, "a listing; job.yaml, run.json, the newest entry, none after it"
    assert max(asked) > 1


def test_splits_are_a_parquet_file(tmp_path: Path) -> None:
    table = pa.table({"split": ["train", "val"], "row": [3, 1]})
    born(str(tmp_path)).write_splits(table)
    assert pq.read_table(tmp_path / "run" / "splits.parquet").equals(table)


def test_code_is_stored_beside_the_job(tmp_path: Path) -> None:
    run = born(str(tmp_path))
    assert not run.has_code()
    assert run.code() is None
    run.write_code(b"archive")
    assert run.has_code()
    assert run.code() == (tmp_path / "run" / "code.zip").read_bytes() == b"archive"


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("mnist-1", ("mnist-1", "best")),
        ("mnist-1@last", ("mnist-1", "last")),
        ("mnist-1@240", ("mnist-1", "240")),
        ("mnist-1@", ("mnist-1", "best")),
        ("s3://who@bucket/runs/mnist-1@best", ("s3://who@bucket/runs/mnist-1", "best")),
        ("../runs/mnist-1/", ("../runs/mnist-1", "best")),
    ],
)
def test_a_run_and_a_checkpoint_in_one_word(spec: str, expected: tuple[str, str]) -> None:
    assert run_and_checkpoint(spec) == expected


def test_a_run_is_opened_by_name_or_url(tmp_path: Path) -> None:
    born(str(tmp_path / "here"), "mnist-1")
    born(str(tmp_path / "there"), "mnist-1")
    assert open_run("mnist-1", str(tmp_path / "here")).url == str(tmp_path / "here" / "mnist-1")
    assert open_run(f"{tmp_path}/there/mnist-1/", "unused").url == str(tmp_path / "there" / "mnist-1")
    with pytest.raises(InputError, match="no such run"):
        open_run("mnist-2", str(tmp_path / "here"))
    with pytest.raises(InputError):
        open_run("mnist-1@best", str(tmp_path / "here"))


def test_reads_of_the_test_split_are_counted(tmp_path: Path) -> None:
    run = born(str(tmp_path))
    assert [record_read(run, {"checkpoint": "a"}) for _ in range(3)] == [1, 2, 3]
    assert run.storage.list("reads") == ["00000001.json", "00000002.json", "00000003.json"]


def test_looking_at_runs_needs_neither_torch_nor_pyarrow() -> None:
    code = """
import sys
from pipeline.verbs.show import runs
from pipeline.record.attempt import peek
print(sorted({"torch", "pyarrow", "numpy", "fsspec", "ray", "safetensors"} & set(sys.modules)))
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output == "[]\n"
