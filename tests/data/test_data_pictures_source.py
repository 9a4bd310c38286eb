"""Folders and tables of pictures: the same rows from every place, in memory, from the cache and on demand."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.assembly import build, eval_loader, prepare
from pipeline.data.pictures import Form, decode
from pipeline.data.processes import made
from pipeline.data.sources import Source, open_source
from pipeline.data.sources.image_folder.decoder import Pictures
from pipeline.data.sources.image_folder.listing import Progress
from pipeline.data.statistics import mean_and_std
from pipeline.errors import DataError, StorageError, WorkError
from pipeline.job import Evaluate
from tests.data.picture_files import CLASSES, content_of, contents, picture_job, write

FILES = contents()

DOG = {"ant/1.png": b"no picture", "cat/2.png": content_of(1)[:200]}
"""Two broken ones."""

FORMS: dict[str, dict[str, Any]] = {
    "memory": {},
    "cache": {"in_memory_mb": 0},
    "on demand": {"in_memory_mb": 0, "max_gb": 1e-5},
}
"""What makes pictures lie where: 15 of them take 14,400 bytes, a list of broken ones less than 5,000."""


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return write(tmp_path / "pictures", FILES)


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., Source]:
    def open_it(url: str, place: str = "memory", task: str = "multiclass", **data: Any) -> Source:
        cache = {**FORMS[place], "folder": str(tmp_path / "cache")}
        return open_source(picture_job(url, task, **{"cache": cache, **data}))

    return open_it


def expected(files: dict[str, bytes], form: Form | None = None) -> np.ndarray:
    return np.stack([decode(files[path], form or Form()) for path in sorted(files)])


@pytest.mark.parametrize("processes", [0, 2])
@pytest.mark.parametrize("place", FORMS)
def test_rows_are_the_pictures_by_path(opened: Callable[..., Source], folder: str, place: str, processes: int) -> None:
    source = opened(folder, place, loader={"processes": processes}, resize=[20, 17])
    inputs = source.train.inputs
    assert isinstance(inputs, {"memory": np.ndarray, "cache": np.memmap, "on demand": Pictures}[place])
    wanted = expected(FILES, Form(resize=(20, 17)))
    assert (inputs.shape, inputs.dtype, inputs.ndim, len(inputs)) == (wanted.shape, np.dtype("uint8"), 4, 15)
    assert np.array_equal(inputs[np.arange(15)], wanted)
    assert np.array_equal(inputs[2:5], wanted[2:5])
    assert np.array_equal(inputs[np.array([7, 7, 0])], wanted[[7, 7, 0]])
    assert inputs[np.arange(0)].shape == (0, *wanted.shape[1:])
    assert source.train.targets.tolist() == sorted([0, 1, 2] * 5)
    assert source.train.targets.dtype == np.int64
    assert (source.classes, source.test, source.label_names, source.warnings) == ((), None, CLASSES, ())
    ours, theirs = (mean_and_std(values, np.arange(1, 15, 2), per_channel=True) for values in (inputs, wanted))
    assert np.array_equal(ours, theirs)


def test_a_second_start_decodes_nothing(
    opened: Callable[..., Source], folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = opened(folder, "cache", resize=9)
    monkeypatch.setattr("pipeline.data.sources.image_folder.decoding._Run.fill", None)
    again = opened(folder, "cache", resize=9)
    assert np.array_equal(first.train.inputs, again.train.inputs)
    assert not again.train.inputs.flags.writeable


def test_other_forms_are_other_entries(opened: Callable[..., Source], folder: str) -> None:
    shapes = [
        opened(folder, "cache", **form).train.inputs.shape
        for form in ({}, {"crop": 6}, {"mode": "grey"}, {"resize": 5})
    ]
    assert shapes == [(15, 3, 20, 16), (15, 3, 6, 6), (15, 1, 20, 16), (15, 3, 6, 5)]


def test_the_fingerprint_is_of_what_is_learnt(opened: Callable[..., Source], tmp_path: Path, folder: str) -> None:
    print_of = opened(folder).fingerprint
    os.utime(Path(folder) / "ant/1.png", (1, 1))
    write(Path(folder), {"notes.txt": b"no picture", ".hidden/x.png": b"", "ant/._1.png": b"", "ant/labels.csv": b""})
    assert opened(folder).fingerprint == opened(folder, "cache", resize=9).fingerprint == print_of
    assert opened(write(tmp_path / "elsewhere", FILES)).fingerprint == print_of
    for number, changed in enumerate(
        [
            {**FILES, "ant/1.png": content_of(99)},
            {path.replace("ant/", "ape/"): content for path, content in FILES.items()},
            {path: content for path, content in FILES.items() if path != "ant/1.png"},
            {**FILES, "ant/1.png": FILES["ant/2.png"], "ant/2.png": FILES["ant/1.png"]},
        ]
    ):
        assert opened(write(tmp_path / str(number), changed)).fingerprint != print_of


@pytest.fixture
def places(tmp_path: Path) -> Iterator[Callable[[str], str]]:
    memory = fsspec.filesystem("memory")

    def fill(kind: str) -> str:
        if kind == "zip":
            import zipfile

            with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
                for path, content in FILES.items():
                    archive.writestr(f"pictures/{path}", content)
            return f"zip://pictures::{tmp_path}/all.zip"
        memory.pipe({f"/pictures/{path}": content for path, content in FILES.items()})
        return "memory://pictures"

    yield fill
    memory.store.clear()


@pytest.mark.parametrize("kind", ["memory", "zip"])
@pytest.mark.parametrize("processes", [0, 2])
def test_other_file_systems(
    opened: Callable[..., Source], folder: str, places: Callable[[str], str], kind: str, processes: int
) -> None:
    ours = opened(places(kind), loader={"processes": processes})
    assert ours.fingerprint == opened(folder).fingerprint
    assert np.array_equal(ours.train.inputs, expected(FILES))


def test_s3(opened: Callable[..., Source], folder: str, s3_url: str, tmp_path: Path) -> None:
    fs = fsspec.filesystem("s3")
    for path, content in FILES.items():
        fs.pipe_file(f"{s3_url}/{path}", content)
    table = pa.table({"path": sorted(FILES), "label": [path[:3] for path in sorted(FILES)]})
    with fs.open(f"{s3_url}/list.parquet", "wb") as file:
        pq.write_table(table, file)
    local = opened(folder)
    # Processes are forked while this one has clients of the store under way.
    for processes in (0, 2):
        ours = opened(s3_url, loader={"processes": processes})
        assert ours.fingerprint == local.fingerprint
        assert np.array_equal(ours.train.inputs, local.train.inputs)
    pictures = opened(s3_url, "on demand").train.inputs
    for row, picture in enumerate(made(lambda row: pictures[row : row + 1], range(3), 1)):
        assert np.array_equal(picture, local.train.inputs[row : row + 1])
    listed = opened(f"{s3_url}/list.parquet", label="label")
    assert np.array_equal(listed.train.inputs, local.train.inputs)
    assert listed.label_names == CLASSES
    with pytest.raises(DataError, match="no such folder"):
        opened(f"{s3_url}/absent")
    with pytest.raises(DataError, match="no such folder or bucket"):
        opened("s3://trainyard-absent/pictures")


def table_of(folder: str, **columns: Any) -> str:
    path = Path(folder) / "list.parquet"
    pq.write_table(pa.table(columns), path)
    return str(path)


PATHS = ["cat/1.png", "ant/1.png", "bee/1.png", "ant/1.png"]


def test_a_table_of_paths(opened: Callable[..., Source], folder: str) -> None:
    paths = [*PATHS[:3], f"file://{folder}/ant/1.png"]
    url = table_of(folder, path=paths, label=["b", "a", "b", "c"], day=pa.array([3, 1, 2, 1], pa.timestamp("s")))
    source = opened(url, label="label", splits={"by": "time", "column": "day", "val": "1s"})
    assert np.array_equal(source.train.inputs, np.stack([decode(FILES[path], Form()) for path in PATHS]))
    assert (source.label_names, source.classes) == (("a", "b", "c"), ())
    assert source.train.targets.tolist() == [1, 0, 1, 2]
    assert source.columns["day"].values.tolist() == [3 * 10**9, 10**9, 2 * 10**9, 10**9]
    assert source.columns["day"].is_time


@pytest.mark.parametrize(
    ("labels", "task", "targets", "names"),
    [
        (pa.array([3, 1, 2, 1], pa.int8()), "multiclass", [3, 1, 2, 1], ()),
        (pa.array([3.0, 1, 2, 1]), "multiclass", [3, 1, 2, 1], ()),
        (pa.array([True, False, True, False]), "binary", [1, 0, 1, 0], ()),
        (pa.array(["x", "z", "y", "x"]).dictionary_encode(), "multiclass", [0, 2, 1, 0], ("x", "y", "z")),
        (pa.array([0.5, -1, 2, 1]), "regression", [0.5, -1, 2, 1], ()),
        (pa.array([5, -1, 2, 1]), "regression", [5, -1, 2, 1], ()),
    ],
)
def test_labels(
    opened: Callable[..., Source],
    folder: str,
    labels: pa.Array,
    task: str,
    targets: list[float],
    names: tuple[str, ...],
) -> None:
    source = opened(table_of(folder, path=PATHS, label=labels), label="label", task=task)
    assert source.train.targets.dtype == (np.float64 if task == "regression" else np.int64)
    assert source.train.targets.tolist() == targets
    assert source.label_names == names


def test_a_groups_column(opened: Callable[..., Source], folder: str) -> None:
    by: dict[str, Any] = {"label": "label", "splits": {"by": "group", "column": "who", "val": 0.5}}
    url = table_of(folder, path=PATHS, label=[0, 1, 0, 1], who=["u", "v", "u", "t"])
    source = opened(url, **by)
    assert source.columns["who"].names == ("t", "u", "v")
    assert source.columns["who"].values.tolist() == [1, 2, 1, 0]
    table_of(folder, path=PATHS, label=[0, 1, 0, 1], who=["u", "v", "v", "t"])
    assert opened(url, **by).fingerprint != source.fingerprint


def test_times_as_text(opened: Callable[..., Source], folder: str) -> None:
    url = table_of(folder, path=PATHS, label=[0, 1, 0, 1], day=["1970-01-02", "1970-01-01", "1970-01-02", "1970-01-03"])
    source = opened(url, label="label", splits={"by": "time", "column": "day", "val": "1d"})
    assert (source.columns["day"].values / 86_400e9).tolist() == [1, 0, 1, 2]


TABLES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no label named": ({"path": PATHS}, {}, r"data\.label"),
    "no such column": ({"file": PATHS, "label": [1] * 4}, {}, "no column path; there are file, label"),
    "no column of splits": (
        {"path": PATHS, "label": [1] * 4},
        {"splits": {"by": "group", "column": "who", "val": 0.5}},
        "no column who",
    ),
    "no text": ({"path": [1, 2, 3, 4], "label": [1] * 4}, {}, "whole numbers .int64., not paths"),
    "null path": ({"path": [*PATHS[:3], None], "label": [1] * 4}, {}, r"nulls in 1 of 4 rows, first in row 3"),
    "null label": ({"path": PATHS, "label": ["a", None, None, "b"]}, {}, r"nulls .* in 2 of 4 rows, first in row 1"),
    "NaN": ({"path": PATHS, "label": [1.0, 2, float("nan"), 1]}, {}, r"nulls .* first in row 2"),
    "fractions": ({"path": PATHS, "label": [1.0, 2.5, 3, 1]}, {}, "not whole in 1 of 4 rows, first in row 1"),
    "lists": ({"path": PATHS, "label": [[1]] * 4}, {}, "cannot learn"),
    "no rows": ({"path": pa.array([], pa.string()), "label": pa.array([], pa.int64())}, {}, "no rows"),
    "absent": (
        {"path": [*PATHS[:2], "dog/1.png", "x.png"], "label": [1] * 4},
        {},
        r"no such picture: dog/1.png \(2 of 4 are absent\)",
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_that_do_not_fit(opened: Callable[..., Source], folder: str, name: str) -> None:
    columns, data, message = TABLES[name]
    label = {} if name == "no label named" else {"label": "label"}
    with pytest.raises(DataError, match=message):
        opened(table_of(folder, **columns), **label, **data)


def test_a_table_that_is_none(opened: Callable[..., Source], tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match="no Parquet file"):
        opened(str(tmp_path / "x.parquet"), label="label")
    with pytest.raises(DataError, match="no such file"):
        opened(str(tmp_path / "y.parquet"), label="label")


FOLDERS: dict[str, tuple[dict[str, bytes], dict[str, Any], str]] = {
    "empty": ({}, {}, "no pictures among 0 files"),
    "others alone": ({"a/x.txt": b"", "a/y.txt": b"", "b/z.csv": b""}, {}, r"\.txt \(2\), \.csv \(1\)"),
    "loose": ({**FILES, "x.png": b"", "y.png": b""}, {}, r"x.png is in no folder of a class \(2 of 17 pictures\)"),
    "splits": ({f"{part}/ant/1.png": content_of(1) for part in ("train", "test")}, {}, "look like splits"),
    "sizes": ({**FILES, "bee/x.png": content_of(1, (4, 4))}, {}, "bee/x.png is 4 x 4 pixels, but ant/1.png is 20 x 16"),
    "one side": ({**FILES, "bee/x.png": content_of(1, (4, 9))}, {"resize": 4}, "4 x 9 pixels"),
    "crop": (FILES, {"crop": 17}, "20 x 16 pixels, too small for crop"),
    "label": (FILES, {"label": "label"}, r"data\.label"),
    "column": (FILES, {"splits": {"by": "group", "column": "who", "val": 0.5}}, "no column who"),
    "all broken": ({"a/1.png": b"x", "b/1.png": b"y"}, {}, "none of 2 pictures can be decoded; a/1.png"),
}


@pytest.mark.parametrize("place", FORMS)
@pytest.mark.parametrize("name", FOLDERS)
def test_folders_that_do_not_fit(opened: Callable[..., Source], tmp_path: Path, name: str, place: str) -> None:
    files, data, message = FOLDERS[name]
    (tmp_path / "pictures").mkdir()
    with pytest.raises(DataError, match=message):
        opened(write(tmp_path / "pictures", files), place, **data)


def test_places_that_do_not_exist(opened: Callable[..., Source], tmp_path: Path) -> None:
    (tmp_path / "file.png").write_bytes(content_of(1))
    for url in (tmp_path / "absent", "memory://absent"):
        with pytest.raises(DataError, match="no such folder"):
            opened(str(url))
    for url in (tmp_path / "file.png", "nosuch://x/y"):
        with pytest.raises(StorageError, match="cannot be"):
            opened(str(url))
    with pytest.raises(DataError, match="no numbers to learn"):
        opened(write(tmp_path / "pictures", FILES), task="regression")


def test_links_are_followed(opened: Callable[..., Source], folder: str, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in CLASSES:
        (linked / name).symlink_to(Path(folder) / name)
    assert opened(str(linked)).fingerprint == opened(folder).fingerprint
    (Path(folder) / "bee/gone.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no such picture: bee/gone\.png \(1 of 16 are absent\)"):
        opened(folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("path", ["ant", "ant/1.png"])
def test_no_permission(opened: Callable[..., Source], folder: str, path: str) -> None:
    (Path(folder) / path).chmod(0)
    with pytest.raises(StorageError, match="no permission"):
        opened(folder)
    (Path(folder) / path).chmod(0o700)


@pytest.mark.parametrize("processes", [0, 2])
@pytest.mark.parametrize("place", ["memory", "cache"])
def test_broken_pictures_are_named_and_counted(
    opened: Callable[..., Source], tmp_path: Path, place: str, processes: int
) -> None:
    url = write(tmp_path / "pictures", {**FILES, **DOG})
    with pytest.raises(DataError, match=r"2 of 15 pictures are broken\. The first is ant/1.png"):
        opened(url, place, loader={"processes": processes})


@pytest.mark.parametrize("place", FORMS)
def test_broken_pictures_are_skipped(opened: Callable[..., Source], tmp_path: Path, place: str) -> None:
    url = write(tmp_path / "pictures", {**FILES, **DOG})
    form: dict[str, Any] = {"resize": [20, 17], "on_error": "skip"}
    rest = {path: content for path, content in FILES.items() if path not in DOG}
    for _ in range(2):  # decoded, then as it was kept
        source = opened(url, place, skip_up_to=0.2, **form)
        assert np.array_equal(source.train.inputs[0:13], expected(rest, Form(resize=(20, 17))))
        assert source.train.targets.tolist() == [0] * 4 + [1] * 5 + [2] * 4
        assert source.warnings == ("2 of 15 pictures are broken and left out: ant/1.png, cat/2.png",)
        with pytest.raises(DataError, match=r"skip_up_to allows 10\.00%"):
            opened(url, place, skip_up_to=0.1, **form)
    assert source.fingerprint != opened(write(tmp_path / "whole", FILES)).fingerprint


def test_a_picture_that_is_broken_from_the_start(opened: Callable[..., Source], folder: str) -> None:
    (Path(folder) / "ant/2.png").write_bytes(b"x")
    pictures = opened(folder, "on demand", resize=[20, 17]).train.inputs
    assert len(pictures[5:15]) == 10
    with pytest.raises(WorkError, match=r"ant/2\.png is broken"):
        pictures[np.array([7, 1])]


def test_a_picture_that_changes_later(opened: Callable[..., Source], folder: str) -> None:
    pictures = opened(folder, "on demand", resize=[20, 17]).train.inputs
    write(Path(folder), {"ant/2.png": content_of(99)})
    assert len(pictures[5:15]) == 10
    with pytest.raises(DataError, match=r"ant/2\.png: changed while it was being read"):
        pictures[np.array([7, 1])]
    (Path(folder) / "ant/2.png").unlink()
    with pytest.raises(DataError, match=r"ant/2\.png is gone"):
        pictures[0:3]


def test_progress_is_told_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now, messages = [0.0], list[str]()
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = Progress("decoding", 50_000, messages.append)
    for done in range(1, 2001):
        now[0] = done / 800
        progress(done)
    assert messages == ["decoding 800 of 50,000 pictures", "decoding 1,600 of 50,000 pictures"]


def test_no_threads_are_left(opened: Callable[..., Source], folder: str) -> None:
    before = threading.active_count()
    opened(folder)
    assert threading.active_count() == before


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_limited_evaluation_sees_every_class_of_a_folder(tmp_path: Path, split: str) -> None:
    """A folder is listed class by class."""
    job = picture_job(write(tmp_path, contents(each=20)), splits={"val": 0.5, "stratify": True})
    prepared = prepare(job.model_copy(update={"evaluate": Evaluate(limit=9)}))
    built = build(prepared)
    for world_size in (1, 2, 4):
        loaders = [eval_loader(prepared, built, split, rank=rank, world_size=world_size) for rank in range(world_size)]
        labels = [label for loader in loaders for _, targets in loader for label in targets.tolist()]
        assert labels == [0, 0, 0, 1, 1, 1, 2, 2, 2]
