"""The user's code: which files are collected, how they are imported, and how they are stored with a run."""

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

from pipeline import user_code
from pipeline.config import JobConfig
from pipeline.config.files import build_job, dump_job, load_job, parse_job
from pipeline.errors import DataError, JobError, StorageError
from pipeline.user_code.archive import from_zip, to_zip
from pipeline.user_code.dependencies import MAX_FILES

MODEL_MODULE = "from torch import nn\n\ndef net():\n    return nn.Flatten()\n"


@pytest.fixture(autouse=True)
def import_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Isolate the import path and the imported modules of each test."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for name in [name for name in sys.modules if name.startswith("oc_")]:
        monkeypatch.delitem(sys.modules, name)


def write_module(folder: Path, *files: str, text: str = MODEL_MODULE) -> Path:
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text)
    return folder


def make_job(kind: str = "mlp", **tree: Any) -> JobConfig:
    return build_job({"name": "t", "model": {"kind": kind}, **tree}, "here")


def test_code_folder_is_relative_to_the_job_file_or_cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_module(tmp_path, "jobs/code/oc_a.py", "jobs/other/oc_a.py", "oc_b.py")
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


def test_code_folder_precedes_cwd_and_standard_library(tmp_path: Path) -> None:
    write_module(tmp_path / "code", "oc_shared.py", text="import json\nimport oc_here\ndef who():\n    return 'code'\n")
    write_module(
        tmp_path / "elsewhere", "oc_shared.py", "oc_here.py", text="def who():\n    return 'working directory'\n"
    )
    write_module(tmp_path / "code", "json.py", text="raise RuntimeError\n")
    job = make_job("oc_shared:who", code=str(tmp_path / "code"), metrics=["oc_here:who"])
    code = user_code.collect_user_code(job)
    assert list(code.files) == ["oc_here.py", "oc_shared.py"]
    path_before, modules_before = [*sys.path], {*sys.modules}
    with code.activated():
        results = [
            user_code.call_user_function(f"{name}:who", {}, where="x", error=DataError)
            for name in ("oc_shared", "oc_here")
        ]
    assert results == ["code", "working directory"]
    assert sys.path == path_before
    assert all(name.startswith("trainyard_code_") for name in {*sys.modules} - modules_before)


@pytest.mark.parametrize(
    ("module", "name", "message"),
    [
        ("", "oc_gone:net", "no module 'oc_gone'"),
        ("import oc_not_there\n", "oc_mod:net", "ModuleNotFoundError: No module named 'oc_not_there', at "),
        ("import pipeline.nets\n", "oc_mod:net", "'pipeline' is the name of Trainyard's own package"),
        ("from pipeline import my_net\n", "oc_mod:net", "'pipeline' is the name of Trainyard's own package"),
        ("def net():\n    return 1 / 0\n", "oc_mod:net", "oc_mod.py:2"),
        ("net = 3\n", "oc_mod:net", "no function or class 'net'"),
    ],
)
def test_uncallable_references_are_explained(module: str, name: str, message: str, tmp_path: Path) -> None:
    write_module(tmp_path / "elsewhere", "oc_mod.py", text=module)
    with pytest.raises(DataError) as caught:
        user_code.call_user_function(name, {}, where="data.source", error=DataError)
    assert message in caught.value.what
    assert caught.value.where == "data.source"
    assert caught.value.fix


@pytest.mark.parametrize("file", ["pipeline.py", "pipeline/__init__.py", "pipeline/nets.py"])
def test_user_module_named_pipeline_is_rejected(file: str, tmp_path: Path) -> None:
    write_module(tmp_path / "code", file)
    with pytest.raises(JobError, match=r"code/pipeline.*Trainyard's own") as caught:
        user_code.collect_user_code(make_job(code=str(tmp_path / "code")))
    assert caught.value.fix == "rename yours"
    with pytest.raises(JobError, match=r"pipeline\.nets:Net.*Trainyard's own"):
        user_code.collect_user_code(make_job("pipeline.nets:Net"))


def test_folder_that_contains_this_package_is_accepted() -> None:
    user_code.collect_user_code(make_job(code=str(Path(user_code.__file__).parents[2])))


def test_imported_modules_are_collected_for_each_import_form(tmp_path: Path) -> None:
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
    names = [
        "oc_plain",
        "oc_typed",
        "oc_late",
        "oc_named",
        "oc_second",
        "oc_pkg/sub",
        "oc_pkg/cousin",
        "oc_pkg/starred",
    ]
    names += ["oc_pkg/deep/__init__", "oc_pkg/deep/leaf", "oc_spaces/inner"]
    folder = write_module(
        tmp_path / "code", *(f"{name}.py" for name in names), "oc_unused.py", "oc_pkg/unused.py", text=""
    )
    write_module(folder, "oc_net.py", text=net)
    write_module(folder, "oc_pkg/__init__.py", text="__all__ = ['starred']\n")
    write_module(folder, "oc_pkg/sub.py", text="from . import cousin\nfrom ..outside import nothing\n")
    write_module(folder, "oc_plain.py", text="import oc_second, numpy, yaml\n")
    write_module(folder, "oc_second.py", text="import oc_net\n")  # a circular import
    code = user_code.collect_user_code(make_job("oc_net:net", code=str(folder)))
    assert list(code.files) == sorted(["oc_net.py", "oc_pkg/__init__.py", *(f"{name}.py" for name in names)])
    assert code.files["oc_net.py"] == net.encode()
    assert user_code.collect_user_code(make_job(code=str(folder))).files == {}


@pytest.mark.parametrize(
    "expression",
    [
        "importlib.import_module('oc_' + name)",
        "importlib.import_module(f'.{name}', __package__)",
        "__import__(name)",
        "spec_from_file_location(name, path)",
    ],
)
def test_computed_imports_collect_the_whole_folder(expression: str, tmp_path: Path) -> None:
    included = ["oc_a.py", "pkg/__init__.py", "pkg/deep/nets.py"]
    excluded = [
        ".git/hook.py",
        "pkg/__pycache__/a.py",
        "venv/lib/x.py",
        "lib/site-packages/y.py",
        "data.csv",
        ".hidden/z.py",
    ]
    folder = write_module(tmp_path / "code", *included, *excluded, "venv/pyvenv.cfg")
    write_module(folder, "oc_net.py", text=f"import importlib\ndef net(name):\n    return {expression}\n")
    assert list(user_code.collect_user_code(make_job("oc_net:net", code=str(folder))).files) == sorted(
        [*included, "oc_net.py"]
    )


def test_collecting_neither_imports_torch_nor_runs_code(tmp_path: Path) -> None:
    folder = write_module(tmp_path / "code", "oc_net.py", text="import torch, oc_part\nraise SystemExit('it ran')\n")
    write_module(folder, "oc_part.py")
    script = (
        "import sys; from pipeline.config.files import build_job; from pipeline.user_code import collect_user_code\n"
        f"job = build_job({{'name': 't', 'code': {str(folder)!r}, 'model': {{'kind': 'oc_net:net'}}}}, 'here')\n"
        "print(sorted(collect_user_code(job).digests), 'torch' in sys.modules)"
    )
    completed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert completed.stdout.strip() == "['oc_net.py', 'oc_part.py'] False"


def test_named_modules_are_found_on_the_import_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path_folder = write_module(
        tmp_path / "path", "oc_pkg/__init__.py", "oc_pkg/sub/nets.py", "oc_beside.py", "oc_x.py", text=""
    )
    write_module(path_folder, "oc_pkg/sub/nets.py", text="import oc_beside\n")
    write_module(tmp_path / "elsewhere", "oc_single.py", "oc_other.py", text="")
    monkeypatch.syspath_prepend(path_folder)
    source = {"source": {"call": "oc_single:data"}}
    job = make_job("oc_pkg.sub.nets:Net", data=source, metrics=["yaml.nodes:Node", "math:hypot"])
    code = user_code.collect_user_code(job)
    assert list(code.files) == ["oc_beside.py", "oc_pkg/__init__.py", "oc_pkg/sub/nets.py", "oc_single.py"]
    assert code.digests["oc_single.py"] == hashlib.sha256(b"").hexdigest()
    assert code.installed_module_digests().keys() == {"yaml.nodes", "math"} - (
        {"math"} if "math" in sys.builtin_module_names else set()
    )


def test_editable_install_counts_as_user_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_module(tmp_path / "project", "src/oc_mine/__init__.py", "src/oc_mine/nets.py", text="")
    write_module(folder, "oc_net.py", text="import oc_mine.nets\n")
    monkeypatch.syspath_prepend(folder / "src")
    files = user_code.collect_user_code(make_job("oc_net:net", code=str(folder))).files
    assert list(files) == ["oc_mine/__init__.py", "oc_mine/nets.py", "oc_net.py"]


def test_too_large_code_is_rejected(tmp_path: Path) -> None:
    folder = write_module(tmp_path / "many", *(f"m{number}.py" for number in range(MAX_FILES - 1)), text="")
    write_module(folder, "oc_all.py", text="".join(f"import m{number}\n" for number in range(MAX_FILES)))
    job = make_job("oc_all:net", code=str(folder))
    assert len(user_code.collect_user_code(job).files) == MAX_FILES
    write_module(folder, f"m{MAX_FILES - 1}.py")
    big = write_module(tmp_path / "big", "oc_all.py", text="#" * 10_000_001)
    for code in (folder, big):
        with pytest.raises(JobError, match="1,000 Python files or 10 MB") as caught:
            user_code.collect_user_code(make_job("oc_all:net", code=str(code)))
        assert "smaller folder" in caught.value.fix


def test_invalid_python_matters_only_if_imported(tmp_path: Path) -> None:
    net = "import sys\nif sys.version_info < (3,):\n    import oc_old\n" + MODEL_MODULE
    folder = write_module(tmp_path / "code", "oc_net.py", text=net)
    write_module(folder, "oc_old.py", text="print 'two'\n")
    code = user_code.collect_user_code(make_job("oc_net:net", code=str(folder)))
    assert list(code.files) == ["oc_net.py", "oc_old.py"]
    with code.activated():
        user_code.import_user_function("oc_net:net", where="x", error=DataError)
        with pytest.raises(DataError, match=r"SyntaxError.*oc_old.py, line 1"):
            user_code.import_user_function("oc_old:net", where="x", error=DataError)


def test_code_of_the_main_program_is_rejected() -> None:
    with pytest.raises(JobError, match="program or notebook"):
        user_code.collect_user_code(make_job("__main__:Net"))


def test_changed_files_are_listed(tmp_path: Path) -> None:
    folder = write_module(tmp_path / "code", "same.py", "edited.py", "gone.py")
    write_module(folder, "oc_net.py", text="try:\n    import same, edited, gone, new\nexcept ImportError:\n    pass\n")
    job = make_job("oc_net:net", code=str(folder))
    before = user_code.collect_user_code(job).digests
    write_module(folder, "edited.py", "new.py", text="x = 1\n")
    (folder / "gone.py").unlink()
    now = user_code.collect_user_code(job).digests
    assert user_code.find_changed_files(before, now) == ["edited.py", "gone.py", "new.py"]
    assert user_code.find_changed_files(before, before) == []
    of_an_earlier_version = {**before, "unrelated.py": "1", "code.zip": "2"}
    assert user_code.find_changed_files(of_an_earlier_version, before) == []


IMPORTING_MODULE = """
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


def collect_code(folder: Path, who: str) -> user_code.UserCode:
    write_module(folder, "oc_imports.py", text=IMPORTING_MODULE)
    write_module(folder, "oc_helper.py", "oc_pack/late.py", text=f"WHO = {who!r}\n")
    write_module(folder, "oc_pack/__init__.py", text="")
    write_module(folder, "oc_pack/part.py", text="from .late import WHO\n")
    return user_code.collect_user_code(make_job("oc_imports:who", code=str(folder)))


def call_user_code(code: user_code.UserCode) -> tuple[list[str], str, Any]:
    with code.activated():
        function = user_code.import_user_function("oc_imports:who", where="x", error=DataError)
    values, name, local_type = function()  # its imports at call time resolve to the same code
    return values, name, local_type


def test_edits_are_loaded_and_modules_of_each_code_are_separate(tmp_path: Path) -> None:
    folder = tmp_path / "code"
    first = collect_code(folder, "first")
    assert call_user_code(first)[0] == ["first"] * 7
    archive = first.archive
    second = collect_code(folder, "second")
    assert call_user_code(second)[0] == ["second"] * 7
    assert call_user_code(first)[0] == ["first"] * 7
    stored = user_code.load_stored_code(archive)
    assert call_user_code(stored)[0] == ["first"] * 7
    assert user_code.load_stored_code(archive) is stored
    assert len({call_user_code(code)[1] for code in (first, second, stored)}) == 3
    elsewhere = collect_code(tmp_path / "elsewhere", "first")  # the same files in another folder
    assert call_user_code(elsewhere)[1] != call_user_code(first)[1]
    assert "oc_imports" not in sys.modules


def test_objects_unpickle_without_the_original_files(tmp_path: Path) -> None:
    folder = tmp_path / "code"
    code = collect_code(folder, "first")
    with code.activated():
        box = user_code.call_user_function("oc_imports:Box", {"value": 5}, where="x", error=DataError)
    (tmp_path / "box.pkl").write_bytes(pickle.dumps((code, box)))
    script = (
        "import pickle, sys; code, box = pickle.load(open(sys.argv[1], 'rb'))\n"
        "print(box.value, sys.modules[type(box).__module__].who()[0], sys.modules[type(box).__module__].__file__)"
    )
    for location in (str(folder / "oc_imports.py"), "trainyard-code-"):
        completed = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "box.pkl")], capture_output=True, text=True, check=True
        )
        assert completed.stdout.startswith(f"5 {['first'] * 7}")
        assert location in completed.stdout
        shutil.rmtree(folder, ignore_errors=True)


def test_dynamic_imports_are_recorded_and_unloaded(tmp_path: Path) -> None:
    net = "import sys, pydoc\nfrom pathlib import Path\ndef net(name):\n    return pydoc.locate(name).WHO\n"
    folder = write_module(tmp_path / "code", "oc_net.py", text=net)
    write_module(folder, "oc_string.py", text="WHO = 1\n")
    job = make_job("oc_net:net", code=str(folder))
    for who in (1, 2):
        write_module(folder, "oc_string.py", text=f"WHO = {who}{' ' * who}\n")
        code = user_code.collect_user_code(job)
        with code.activated():
            assert code.find_unstored_files() == {}
            assert user_code.call_user_function("oc_net:net", {"name": "oc_string"}, where="x", error=DataError) == who
            unstored = code.find_unstored_files()
            assert unstored.keys() == {"oc_string.py"}
            assert code.find_edited_files(unstored) == []
        assert "oc_string" not in sys.modules
    write_module(folder, "oc_string.py", text="WHO = 3\n")
    assert code.find_edited_files(unstored) == ["oc_string.py"]


names = st.lists(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), min_size=1, max_size=3).map(
    lambda parts: "/".join(parts) + ".py"
)


@given(st.dictionaries(names, st.binary(max_size=50), max_size=5))
def test_archive_round_trip(files: dict[str, bytes]) -> None:
    archive = to_zip(files)
    assert archive == to_zip(dict(reversed(files.items())))
    assert from_zip(archive) == files


def make_archive(name: str, content: bytes = b"x") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return buffer.getvalue()


DAMAGED_ARCHIVE = bytearray(make_archive("a.py", b"a" * 100))
DAMAGED_ARCHIVE[35] ^= 255  # in the compressed bytes


@pytest.mark.parametrize(
    "archive",
    [
        *map(make_archive, ["../a.py", "/a.py", "a/../../b.py", "run.sh", "a.pyc", "C:\\a.py", "x:y.py", "dir/"]),
        make_archive("bomb.py", b"0" * 10_000_001),
        b"no archive",
        b"",
        bytes(DAMAGED_ARCHIVE),
    ],
    ids=range(12),
)
def test_foreign_archive_extracts_nothing(archive: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "elsewhere"))
    with pytest.raises(StorageError, match="not the archive that Trainyard stored"):
        user_code.load_stored_code(archive)
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert not (tmp_path / "a.py").exists()
