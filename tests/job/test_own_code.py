"""The user's own code: found behind all else, never under our name, and stored so that a run can be rebuilt."""

from __future__ import annotations

import hashlib
import io
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import own_code
from pipeline.errors import DataError, JobError, StorageError
from pipeline.job import Job
from pipeline.job_file import build_job, dump_job, load_job, parse_job
from pipeline.own_code.storing import MOST_FILES

NET = "from torch import nn\n\ndef net():\n    return nn.Flatten()\n"


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An import path, and modules, of each test's own."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for name in [name for name in sys.modules if name.startswith("oc_")]:
        monkeypatch.delitem(sys.modules, name)


def write(folder: Path, *files: str, text: str = NET) -> Path:
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text)
    return folder


def job_of(kind: str = "mlp", **tree: Any) -> Job:
    return build_job({"name": "t", "model": {"kind": kind}, **tree}, "here")


def test_the_folder_stands_relative_to_the_job_file_and_a_typed_one_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "jobs/code/oc_a.py", "jobs/other/oc_a.py", "oc_b.py")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "jobs/base.yaml").write_text("name: t\ncode: code\n")
    (tmp_path / "jobs/deep").mkdir()
    (tmp_path / "jobs/deep/over.yaml").write_text("base: ../base.yaml\n")
    job = load_job(tmp_path / "jobs/base.yaml")
    assert job.code == str(tmp_path / "jobs/code")
    assert Path(load_job(tmp_path / "jobs/deep/over.yaml").code or "").resolve() == tmp_path / "jobs/code"
    assert load_job(tmp_path / "jobs/base.yaml", ["code=jobs/other"]).code == str(tmp_path / "jobs/other")
    assert parse_job(dump_job(job), "stored") == job
    with pytest.raises(JobError, match="no such folder") as caught:
        load_job(tmp_path / "jobs/base.yaml", ["code=nowhere"])
    assert caught.value.where == f"code: {tmp_path / 'nowhere'}"


def test_modules_are_found_behind_all_others(tmp_path: Path) -> None:
    write(tmp_path / "code", "oc_shared.py", text="def who():\n    return 'code'\n")
    write(tmp_path / "elsewhere", "oc_shared.py", "oc_here.py", text="def who():\n    return 'working directory'\n")
    write(tmp_path / "code", "json.py", "yaml.py", text="raise RuntimeError\n")
    before = list(sys.path)
    own_code.make_importable(job_of(code=str(tmp_path / "code")))
    assert sys.path[: len(before)] == before
    found = [own_code.called(f"{name}:who", {}, where="x", error=DataError) for name in ("oc_shared", "oc_here")]
    assert found == ["code", "working directory"]


@pytest.mark.parametrize(
    ("module", "asked", "words"),
    [
        ("", "oc_gone:net", "no module 'oc_gone'"),
        ("import oc_not_there\n", "oc_mod:net", "ModuleNotFoundError: No module named 'oc_not_there', at "),
        ("import pipeline.nets\n", "oc_mod:net", "'pipeline' is the name of Trainyard's own package"),
        ("from pipeline import my_net\n", "oc_mod:net", "'pipeline' is the name of Trainyard's own package"),
        ("def net():\n    return 1 / 0\n", "oc_mod:net", "oc_mod.py:2"),
        ("net = 3\n", "oc_mod:net", "no function or class 'net'"),
    ],
)
def test_what_cannot_be_called_says_why(module: str, asked: str, words: str, tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", "oc_mod.py", text=module)
    with pytest.raises(DataError) as caught:
        own_code.called(asked, {}, where="data.source", error=DataError)
    assert words in caught.value.what
    assert caught.value.where == "data.source"
    assert caught.value.fix


@pytest.mark.parametrize("file", ["pipeline.py", "pipeline/__init__.py", "pipeline/nets.py"])
def test_a_pipeline_of_the_users_is_refused(file: str, tmp_path: Path) -> None:
    write(tmp_path / "code", file)
    with pytest.raises(JobError, match=r"code/pipeline.*Trainyard's own") as caught:
        own_code.make_importable(job_of(code=str(tmp_path / "code")))
    assert caught.value.fix == "rename yours"
    with pytest.raises(JobError, match=r"pipeline\.nets:Net.*Trainyard's own"):
        own_code.make_importable(job_of("pipeline.nets:Net"))


def test_a_folder_that_holds_ours_is_none_of_the_users() -> None:
    own_code.make_importable(job_of(code=str(Path(own_code.__file__).parents[2])))


def test_all_python_files_of_the_folder_are_stored(tmp_path: Path) -> None:
    kept = ["oc_a.py", "pkg/__init__.py", "pkg/deep/nets.py"]
    left = [
        ".git/hook.py",
        "pkg/__pycache__/a.py",
        "venv/lib/x.py",
        "lib/site-packages/y.py",
        "data.csv",
        ".hidden/z.py",
    ]
    folder = write(tmp_path / "code", *kept, *left, "venv/pyvenv.cfg")
    files = own_code.sources(job_of(code=str(folder)))
    assert list(files) == sorted(kept)
    assert files["oc_a.py"] == NET.encode()


def test_without_a_folder_the_packages_that_are_named_are_stored(tmp_path: Path) -> None:
    here = write(
        tmp_path / "elsewhere", "oc_pkg/__init__.py", "oc_pkg/sub/nets.py", "oc_single.py", "oc_other.py", text=""
    )
    source = {"source": {"call": "oc_single:data"}}
    job = job_of("oc_pkg.sub.nets:Net", data=source, metrics=["yaml.nodes:Node", "math:hypot"])
    own_code.look_in(str(here))
    assert list(own_code.sources(job)) == ["oc_pkg/__init__.py", "oc_pkg/sub/nets.py", "oc_single.py"]
    assert own_code.sources(job_of()) == {}
    digests = own_code.digests(job)
    assert digests["oc_single.py"] == hashlib.sha256(b"").hexdigest()
    assert {"yaml.nodes", "code.zip"} < digests.keys()
    assert own_code.digests(job_of()) == {}


def test_a_folder_that_is_too_large_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "many", *(f"m{number}.py" for number in range(MOST_FILES)), text="")
    job = job_of(code=str(folder))
    assert len(own_code.sources(job)) == MOST_FILES
    write(folder, "one_more.py")
    big = write(tmp_path / "big", "a.py", text="#" * 10_000_001)
    for code in (folder, big):
        with pytest.raises(JobError, match="1,000 Python files or 10 MB") as caught:
            own_code.sources(job_of(code=str(code)))
        assert "smaller folder" in caught.value.fix


def test_changed_files_are_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "code", "same.py", "edited.py", "gone.py")
    job = job_of(code=str(folder))
    before = own_code.digests(job)
    write(folder, "edited.py", "new.py", text="x = 1\n")
    (folder / "gone.py").unlink()
    assert own_code.changed(before, own_code.digests(job)) == ["edited.py", "gone.py", "new.py"]
    assert own_code.changed(before, before) == []


names = st.lists(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), min_size=1, max_size=3).map(
    lambda parts: "/".join(parts) + ".py"
)


@given(st.dictionaries(names, st.binary(max_size=50), max_size=5))
def test_what_is_packed_comes_out_again(files: dict[str, bytes]) -> None:
    archive = own_code.packed(files)
    assert archive == own_code.packed(dict(reversed(files.items())))
    folder = own_code.unpacked(archive)
    assert {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*.py")} == files


def archive_of(name: str, content: bytes = b"x") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return buffer.getvalue()


DAMAGED = bytearray(archive_of("a.py", b"a" * 100))
DAMAGED[35] ^= 255  # in the compressed bytes


@pytest.mark.parametrize(
    "archive",
    [
        *map(archive_of, ["../a.py", "/a.py", "a/../../b.py", "run.sh", "a.pyc", "C:\\a.py", "x:y.py", "dir/"]),
        archive_of("bomb.py", b"0" * 10_000_001),
        b"no archive",
        b"",
        bytes(DAMAGED),
    ],
    ids=range(12),
)
def test_an_archive_that_is_not_ours_leaves_nothing(
    archive: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "elsewhere"))
    with pytest.raises(StorageError, match="not the archive that Trainyard stored"):
        own_code.unpacked(archive)
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert not (tmp_path / "a.py").exists()
