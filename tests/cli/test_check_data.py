"""`check` without --batch: the data exists and is of a kind that the source reads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from tests.cli.command_line import RunCommand


@pytest.fixture
def data_folder(tmp_path: Path) -> Path:
    """A folder with valid, damaged and wrong data of each source."""
    for path in ("csv", "table", "classes/a/deep", "classes/b", "none/a", "loose", "empty"):
        (tmp_path / path).mkdir(parents=True)
    (tmp_path / "csv" / "t.csv").write_text("x,y\n1,2\n")
    pq.write_table(pa.table({"x": range(10), "y": [0, 1] * 5}), tmp_path / "table" / "t.parquet")
    whole = (tmp_path / "table" / "t.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[:-9])
    (tmp_path / "none" / "a" / "notes.txt").write_text("no image")
    for path in ("classes/b/1.png", "loose/1.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / path)
    return tmp_path


def make_job(url: str, source: str) -> str:
    data: dict[str, Any] = {"source": source, "url": url}
    if source == "parquet" or url.endswith(".parquet"):
        data["label"] = "y"
    Path("job.yaml").write_text(yaml.safe_dump({"name": "t", "data": data}))
    return "job.yaml"


@pytest.mark.parametrize(
    ("url", "source"),
    [
        ("table", "parquet"),
        ("table/t.parquet", "parquet"),
        ("ta*/*.parquet", "parquet"),
        ("env:DATA", "parquet"),
        ("classes", "image_folder"),
        ("classes/", "image_folder"),
        ("table/t.parquet", "image_folder"),
    ],
)
def test_check_accepts_existing_data(
    trainyard: RunCommand, data_folder: Path, monkeypatch: pytest.MonkeyPatch, url: str, source: str
) -> None:
    if url == "env:DATA":  # a secret, which the job must not contain itself
        monkeypatch.setenv("DATA", str(data_folder / "table"))
    ended = trainyard("check", make_job(url, source))
    assert ended.exit_code == 0, ended.stderr


@pytest.mark.parametrize(
    ("url", "source", "messages"),
    [
        ("none.parquet", "parquet", ["none.parquet", "does not exist"]),
        ("no*.parquet", "parquet", ["no*.parquet", "there are no files"]),
        ("empty", "parquet", ["empty", "there are no files"]),
        ("csv/t.csv", "parquet", ["t.csv", "is not a Parquet file but CSV"]),
        ("csv", "parquet", ["t.csv", "is not a Parquet file but CSV"]),
        ("cut.parquet", "parquet", ["cut.parquet", "is truncated"]),
        ("nowhere", "image_folder", ["data.url: ", "nowhere", "no such folder"]),
        ("csv/t.csv", "image_folder", ["t.csv", "is a file"]),
        ("empty", "image_folder", ["has no folders"]),
        ("loose", "image_folder", ["has no folders"]),
        ("none", "image_folder", ["no images in the folders a"]),
        ("cut.parquet", "image_folder", ["is truncated"]),
        ("nothing://x", "parquet", ["nothing://x"]),
    ],
)
def test_check_rejects_missing_or_wrong_data(
    trainyard: RunCommand, data_folder: Path, url: str, source: str, messages: list[str]
) -> None:
    ended = trainyard("check", make_job(url, source))
    assert ended.exit_code == 2
    assert "Traceback" not in ended.stderr
    for message in messages:
        assert message in ended.stderr


def test_check_data_in_object_storage(trainyard: RunCommand, data_folder: Path, s3_url: str) -> None:
    import fsspec

    fs, path = fsspec.core.url_to_fs(s3_url)
    fs.put(str(data_folder / "table" / "t.parquet"), f"{path}/table/t.parquet")
    fs.put(str(data_folder / "classes" / "b" / "1.png"), f"{path}/classes/b/1.png")
    assert trainyard("check", make_job(f"{s3_url}/table", "parquet")).exit_code == 0
    assert trainyard("check", make_job(f"{s3_url}/classes", "image_folder")).exit_code == 0
    for url, source in (
        ("none", "parquet"),
        ("classes", "parquet"),
        ("none", "image_folder"),
        ("table", "image_folder"),
    ):
        assert trainyard("check", make_job(f"{s3_url}/{url}", source)).exit_code == 2


def test_check_data_does_not_import_torch(data_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(data_folder)
    code = (
        "import sys; sys.argv = ['trainyard', 'check', 'job.yaml']\n"
        "from pipeline.cli import main\n"
        "try: main()\n"
        "except SystemExit as error: assert not error.code\n"
        "print({'torch', 'ray'} & set(sys.modules))"
    )
    for url, source in (("table", "parquet"), ("classes", "image_folder")):
        make_job(url, source)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "set()"
