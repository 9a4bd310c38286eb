"""The user's own code: found behind all else, never under our name, and stored so that a run can be rebuilt."""

from __future__ import annotations

import hashlib
import io
import pickle
import shutil
import subprocess
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
from pipeline.own_code.dependencies import MOST_FILES
from pipeline.own_code.storing import pack, unpack

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


def test_the_folder_stands_relative_to_the_job_file(tmp_path: Path) -> None:
    write(tmp_path, "jobs/code/oc_a.py", "jobs/other/oc_a.py", "oc_b.py")
    (tmp_path / "jobs/base.yaml").write_text("name: t\ncode: code\n")
    (tmp_path / "jobs/deep").mkdir()
    (tmp_path / "jobs/deep/over.yaml").write_text("base: ../base.yaml\n")
    job = load_job(tmp_path / "jobs/base.yaml")
    assert job.code == str(tmp_path / "jobs/code")
    assert Path(load_job(tmp_path / "jobs/deep/over.yaml").code or "").resolve() == tmp_path / "jobs/code"
    assert load_job(tmp_path / "jobs/base.yaml", ["code=other"]).code == str(tmp_path / "jobs/other")
    assert parse_job(dump_job(job), "stored") == job
    with pytest.raises(JobError, match="no such folder") as caught:
        load_job(tmp_path / "jobs/base.yaml", ["code=nowhere"])
    assert caught.value.where == f"code: {tmp_path / 'jobs/nowhere'}"


def test_the_folder_comes_before_the_working_directory_and_pythons_own_before_both(tmp_path: Path) -> None:
    write(tmp_path / "code", "oc_shared.py", text="import json\nimport oc_here\ndef who():\n    return 'code'\n")
    write(tmp_path / "elsewhere", "oc_shared.py", "oc_here.py", text="def who():\n    return 'working directory'\n")
    write(tmp_path / "code", "json.py", text="raise RuntimeError\n")
    job = job_of("oc_shared:who", code=str(tmp_path / "code"), metrics=["oc_here:who"])
    code = own_code.collect(job)
    assert list(code.files) == ["oc_here.py", "oc_shared.py"]
    before = [*sys.path], {*sys.modules}
    with code.in_use():
        found = [own_code.called(f"{name}:who", {}, where="x", error=DataError) for name in ("oc_shared", "oc_here")]
    assert found == ["code", "working directory"]
    assert sys.path == before[0]
    assert all(name.startswith("trainyard_code_") for name in {*sys.modules} - before[1])


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
        own_code.collect(job_of(code=str(tmp_path / "code")))
    assert caught.value.fix == "rename yours"
    with pytest.raises(JobError, match=r"pipeline\.nets:Net.*Trainyard's own"):
        own_code.collect(job_of("pipeline.nets:Net"))


def test_a_folder_that_holds_ours_is_none_of_the_users() -> None:
    own_code.collect(job_of(code=str(Path(own_code.__file__).parents[2])))


def test_what_is_imported_is_stored_whatever_way_it_is_imported(tmp_path: Path) -> None:
    net = """
import os, oc_plain, json
from oc_pkg import sub
from oc_pkg.deep.leaf import thing
from oc_spaces.inner import other
if False:
    import oc_typed
def net():
    from oc_late import later
    return importlib.import_module("oc_named")
try:
    import oc_not_there
except ImportError:
    pass
"""
    kept = ["oc_plain", "oc_typed", "oc_late", "oc_named", "oc_second", "oc_pkg/sub", "oc_pkg/cousin", "oc_pkg/starred"]
    kept += ["oc_pkg/deep/__init__", "oc_pkg/deep/leaf", "oc_spaces/inner"]
    folder = write(tmp_path / "code", *(f"{name}.py" for name in kept), "oc_unused.py", "oc_pkg/unused.py", text="")
    write(folder, "oc_net.py", text=net)
    write(folder, "oc_pkg/__init__.py", text="__all__ = ['starred']\n")
    write(folder, "oc_pkg/sub.py", text="from . import cousin\nfrom ..outside import nothing\n")
    write(folder, "oc_plain.py", text="import oc_second, numpy, yaml\n")
    write(folder, "oc_second.py", text="import oc_net\n")  # a circle
    code = own_code.collect(job_of("oc_net:net", code=str(folder)))
    assert list(code.files) == sorted(["oc_net.py", "oc_pkg/__init__.py", *(f"{name}.py" for name in kept)])
    assert code.files["oc_net.py"] == net.encode()
    assert own_code.collect(job_of(code=str(folder))).files == {}


@pytest.mark.parametrize(
    "how",
    [
        "importlib.import_module('oc_' + name)",
        "importlib.import_module(f'.{name}', __package__)",
        "__import__(name)",
        "spec_from_file_location(name, path)",
    ],
)
def test_where_names_are_computed_the_whole_folder_is_stored(how: str, tmp_path: Path) -> None:
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
    write(folder, "oc_net.py", text=f"import importlib\ndef net(name):\n    return {how}\n")
    assert list(own_code.collect(job_of("oc_net:net", code=str(folder))).files) == sorted([*kept, "oc_net.py"])


def test_the_files_are_found_without_torch_and_without_running_them(tmp_path: Path) -> None:
    folder = write(tmp_path / "code", "oc_net.py", text="import torch, oc_part\nraise SystemExit('it ran')\n")
    write(folder, "oc_part.py")
    script = (
        "import sys; from pipeline.job_file import build_job; from pipeline.own_code import collect\n"
        f"job = build_job({{'name': 't', 'code': {str(folder)!r}, 'model': {{'kind': 'oc_net:net'}}}}, 'here')\n"
        "print(sorted(collect(job).digests), 'torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "['oc_net.py', 'oc_part.py'] False"


def test_without_a_folder_what_is_named_is_found_on_the_import_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = write(tmp_path / "path", "oc_pkg/__init__.py", "oc_pkg/sub/nets.py", "oc_beside.py", "oc_x.py", text="")
    write(elsewhere, "oc_pkg/sub/nets.py", text="import oc_beside\n")
    write(tmp_path / "elsewhere", "oc_single.py", "oc_other.py", text="")
    monkeypatch.syspath_prepend(elsewhere)
    source = {"source": {"call": "oc_single:data"}}
    job = job_of("oc_pkg.sub.nets:Net", data=source, metrics=["yaml.nodes:Node", "math:hypot"])
    code = own_code.collect(job)
    assert list(code.files) == ["oc_beside.py", "oc_pkg/__init__.py", "oc_pkg/sub/nets.py", "oc_single.py"]
    assert code.digests["oc_single.py"] == hashlib.sha256(b"").hexdigest()
    assert code.installed().keys() == {"yaml.nodes", "math"} - (
        {"math"} if "math" in sys.builtin_module_names else set()
    )


def test_a_project_that_is_installed_in_place_is_the_users_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "project", "src/oc_mine/__init__.py", "src/oc_mine/nets.py", text="")
    write(folder, "oc_net.py", text="import oc_mine.nets\n")
    monkeypatch.syspath_prepend(folder / "src")
    files = own_code.collect(job_of("oc_net:net", code=str(folder))).files
    assert list(files) == ["oc_mine/__init__.py", "oc_mine/nets.py", "oc_net.py"]


def test_code_that_is_too_large_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "many", *(f"m{number}.py" for number in range(MOST_FILES - 1)), text="")
    write(folder, "oc_all.py", text="".join(f"import m{number}\n" for number in range(MOST_FILES)))
    job = job_of("oc_all:net", code=str(folder))
    assert len(own_code.collect(job).files) == MOST_FILES
    write(folder, f"m{MOST_FILES - 1}.py")
    big = write(tmp_path / "big", "oc_all.py", text="#" * 10_000_001)
    for code in (folder, big):
        with pytest.raises(JobError, match="1,000 Python files or 10 MB") as caught:
            own_code.collect(job_of("oc_all:net", code=str(code)))
        assert "smaller folder" in caught.value.fix


def test_a_file_that_is_no_python_matters_only_where_it_is_imported(tmp_path: Path) -> None:
    net = "import sys\nif sys.version_info < (3,):\n    import oc_old\n" + NET
    folder = write(tmp_path / "code", "oc_net.py", text=net)
    write(folder, "oc_old.py", text="print 'two'\n")
    code = own_code.collect(job_of("oc_net:net", code=str(folder)))
    assert list(code.files) == ["oc_net.py", "oc_old.py"]
    with code.in_use():
        own_code.imported("oc_net:net", where="x", error=DataError)
        with pytest.raises(DataError, match=r"SyntaxError.*oc_old.py, line 1"):
            own_code.imported("oc_old:net", where="x", error=DataError)


def test_code_of_the_running_program_is_refused() -> None:
    with pytest.raises(JobError, match="program or notebook"):
        own_code.collect(job_of("__main__:Net"))


def test_changed_files_are_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "code", "same.py", "edited.py", "gone.py")
    write(folder, "oc_net.py", text="try:\n    import same, edited, gone, new\nexcept ImportError:\n    pass\n")
    job = job_of("oc_net:net", code=str(folder))
    before = own_code.collect(job).digests
    write(folder, "edited.py", "new.py", text="x = 1\n")
    (folder / "gone.py").unlink()
    now = own_code.collect(job).digests
    assert own_code.changed(before, now) == ["edited.py", "gone.py", "new.py"]
    assert own_code.changed(before, before) == []
    of_an_earlier_version = {**before, "unrelated.py": "1", "code.zip": "2"}
    assert own_code.changed(of_an_earlier_version, before) == []


MANY_WAYS = """
import importlib, sys
import oc_helper
import oc_pack.part as part
from oc_pack import part as again
from importlib import import_module
def who():
    import oc_pack.late
    here = sys.modules[__name__]
    return [
        oc_helper.WHO, part.WHO, again.WHO, oc_pack.late.WHO, importlib.import_module("oc_helper").WHO,
        import_module(".late", oc_pack.__name__).WHO, __import__("oc_helper").WHO,
    ], here.__name__, type("Local", (), {"__module__": __name__})
class Box:
    def __init__(self, value):
        self.value = value
"""


def code_of(folder: Path, who: str) -> own_code.UserCode:
    write(folder, "oc_ways.py", text=MANY_WAYS)
    write(folder, "oc_helper.py", "oc_pack/late.py", text=f"WHO = {who!r}\n")
    write(folder, "oc_pack/__init__.py", text="")
    write(folder, "oc_pack/part.py", text="from .late import WHO\n")
    return own_code.collect(job_of("oc_ways:who", code=str(folder)))


def ask(code: own_code.UserCode) -> tuple[list[str], str, Any]:
    with code.in_use():
        function = own_code.imported("oc_ways:who", where="x", error=DataError)
    answers, name, kind = function()  # what it imports only now comes from there too
    return answers, name, kind


def test_an_edit_is_seen_and_each_code_has_modules_of_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "code"
    first = code_of(folder, "first")
    assert ask(first)[0] == ["first"] * 7
    archive = first.archive
    second = code_of(folder, "second")
    assert ask(second)[0] == ["second"] * 7
    assert ask(first)[0] == ["first"] * 7
    stored = own_code.stored(archive)
    assert ask(stored)[0] == ["first"] * 7
    assert own_code.stored(archive) is stored
    assert len({ask(code)[1] for code in (first, second, stored)}) == 3
    elsewhere = code_of(tmp_path / "elsewhere", "first")  # the same files, beside other data
    assert ask(elsewhere)[1] != ask(first)[1]
    assert "oc_ways" not in sys.modules


def test_what_is_made_of_a_code_is_unpickled_where_its_files_are_gone(tmp_path: Path) -> None:
    folder = tmp_path / "code"
    code = code_of(folder, "first")
    with code.in_use():
        box = own_code.called("oc_ways:Box", {"value": 5}, where="x", error=DataError)
    (tmp_path / "box.pkl").write_bytes(pickle.dumps((code, box)))
    script = (
        "import pickle, sys; code, box = pickle.load(open(sys.argv[1], 'rb'))\n"
        "print(box.value, sys.modules[type(box).__module__].who()[0], sys.modules[type(box).__module__].__file__)"
    )
    for place in (str(folder / "oc_ways.py"), "trainyard-code-"):
        ran = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "box.pkl")], capture_output=True, text=True, check=True
        )
        assert ran.stdout.startswith(f"5 {['first'] * 7}")
        assert place in ran.stdout
        shutil.rmtree(folder, ignore_errors=True)


def test_what_is_imported_past_the_statements_is_noted_and_forgotten(tmp_path: Path) -> None:
    net = "import sys, pydoc\nfrom pathlib import Path\ndef net(name):\n    return pydoc.locate(name).WHO\n"
    folder = write(tmp_path / "code", "oc_net.py", text=net)
    write(folder, "oc_string.py", text="WHO = 1\n")
    job = job_of("oc_net:net", code=str(folder))
    for who in (1, 2):
        write(folder, "oc_string.py", text=f"WHO = {who}{' ' * who}\n")
        code = own_code.collect(job)
        with code.in_use():
            assert code.not_stored() == {}
            assert own_code.called("oc_net:net", {"name": "oc_string"}, where="x", error=DataError) == who
            noted = code.not_stored()
            assert noted.keys() == {"oc_string.py"}
            assert code.edited(noted) == []
        assert "oc_string" not in sys.modules
    write(folder, "oc_string.py", text="WHO = 3\n")
    assert code.edited(noted) == ["oc_string.py"]


names = st.lists(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), min_size=1, max_size=3).map(
    lambda parts: "/".join(parts) + ".py"
)


@given(st.dictionaries(names, st.binary(max_size=50), max_size=5))
def test_what_is_packed_comes_out_again(files: dict[str, bytes]) -> None:
    archive = pack(files)
    assert archive == pack(dict(reversed(files.items())))
    assert unpack(archive) == files


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
        own_code.stored(archive)
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert not (tmp_path / "a.py").exists()
