"""Folders and tables of images: the same samples from every storage, in memory, from the cache and on demand."""

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

from pipeline.config import EvaluationConfig
from pipeline.data.loader_workers import map_in_processes
from pipeline.data.sources import Dataset, open_dataset
from pipeline.data.sources.images.dataset import LazyImages
from pipeline.data.sources.images.decode import ImageFormat, decode_image
from pipeline.data.sources.images.listing import ThrottledProgress
from pipeline.data.statistics import compute_mean_and_std
from pipeline.errors import DataError, StorageError, WorkError
from pipeline.setup import build_eval_loader, build_training, prepare_data
from tests.data.image_files import CLASSES, encode_image, make_image_files, make_image_job, write_files

IMAGE_FILES = make_image_files()

BROKEN_FILES = {"ant/1.png": b"no image", "cat/2.png": encode_image(1)[:200]}
"""Two broken files."""

STORAGE_OPTIONS: dict[str, dict[str, Any]] = {
    "memory": {},
    "cache": {"in_memory_mb": 0},
    "on demand": {"in_memory_mb": 0, "max_gb": 1e-5},
}
"""Cache options by where the images are stored: 15 images take 14,400 bytes, a list of broken ones less than 5,000."""


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return write_files(tmp_path / "images", IMAGE_FILES)


@pytest.fixture
def open_images(tmp_path: Path) -> Callable[..., Dataset]:
    def open_dataset_of(url: str, storage: str = "memory", task: str = "multiclass", **data: Any) -> Dataset:
        cache = {**STORAGE_OPTIONS[storage], "folder": str(tmp_path / "cache")}
        return open_dataset(make_image_job(url, task, **{"cache": cache, **data}))

    return open_dataset_of


def decode_expected(files: dict[str, bytes], image_format: ImageFormat | None = None) -> np.ndarray:
    return np.stack([decode_image(files[path], image_format or ImageFormat()) for path in sorted(files)])


@pytest.mark.parametrize("processes", [0, 2])
@pytest.mark.parametrize("storage", STORAGE_OPTIONS)
def test_samples_are_in_path_order(
    open_images: Callable[..., Dataset], folder: str, storage: str, processes: int
) -> None:
    dataset = open_images(folder, storage, loader={"processes": processes}, resize=[20, 17])
    inputs = dataset.train.inputs
    assert isinstance(inputs, {"memory": np.ndarray, "cache": np.memmap, "on demand": LazyImages}[storage])
    expected = decode_expected(IMAGE_FILES, ImageFormat(resize=(20, 17)))
    assert (inputs.shape, inputs.dtype, inputs.ndim, len(inputs)) == (expected.shape, np.dtype("uint8"), 4, 15)
    assert np.array_equal(inputs[np.arange(15)], expected)
    assert np.array_equal(inputs[2:5], expected[2:5])
    assert np.array_equal(inputs[np.array([7, 7, 0])], expected[[7, 7, 0]])
    assert inputs[np.arange(0)].shape == (0, *expected.shape[1:])
    assert dataset.train.targets.tolist() == sorted([0, 1, 2] * 5)
    assert dataset.train.targets.dtype == np.int64
    assert (dataset.classes, dataset.test, dataset.label_names, dataset.warnings) == ((), None, CLASSES, ())
    statistics, expected_statistics = (
        compute_mean_and_std(values, np.arange(1, 15, 2), per_channel=True) for values in (inputs, expected)
    )
    assert np.array_equal(statistics, expected_statistics)


def test_second_start_decodes_nothing(
    open_images: Callable[..., Dataset], folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_images(folder, "cache", resize=9)
    monkeypatch.setattr("pipeline.data.sources.images.dataset._DecodePass.write_images", None)
    again = open_images(folder, "cache", resize=9)
    assert np.array_equal(first.train.inputs, again.train.inputs)
    assert not again.train.inputs.flags.writeable


def test_other_image_formats_are_other_cache_entries(open_images: Callable[..., Dataset], folder: str) -> None:
    shapes = [
        open_images(folder, "cache", **options).train.inputs.shape
        for options in ({}, {"crop": 6}, {"mode": "grey"}, {"resize": 5})
    ]
    assert shapes == [(15, 3, 20, 16), (15, 3, 6, 6), (15, 1, 20, 16), (15, 3, 6, 5)]


def test_fingerprint_covers_what_affects_training(
    open_images: Callable[..., Dataset], tmp_path: Path, folder: str
) -> None:
    fingerprint = open_images(folder).fingerprint
    os.utime(Path(folder) / "ant/1.png", (1, 1))
    write_files(
        Path(folder), {"notes.txt": b"no image", ".hidden/x.png": b"", "ant/._1.png": b"", "ant/labels.csv": b""}
    )
    assert open_images(folder).fingerprint == open_images(folder, "cache", resize=9).fingerprint == fingerprint
    assert open_images(write_files(tmp_path / "elsewhere", IMAGE_FILES)).fingerprint == fingerprint
    for number, changed in enumerate(
        [
            {**IMAGE_FILES, "ant/1.png": encode_image(99)},
            {path.replace("ant/", "ape/"): content for path, content in IMAGE_FILES.items()},
            {path: content for path, content in IMAGE_FILES.items() if path != "ant/1.png"},
            {**IMAGE_FILES, "ant/1.png": IMAGE_FILES["ant/2.png"], "ant/2.png": IMAGE_FILES["ant/1.png"]},
        ]
    ):
        assert open_images(write_files(tmp_path / str(number), changed)).fingerprint != fingerprint


@pytest.fixture
def upload_to(tmp_path: Path) -> Iterator[Callable[[str], str]]:
    memory = fsspec.filesystem("memory")

    def fill(kind: str) -> str:
        if kind == "zip":
            import zipfile

            with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
                for path, content in IMAGE_FILES.items():
                    archive.writestr(f"images/{path}", content)
            return f"zip://images::{tmp_path}/all.zip"
        memory.pipe({f"/images/{path}": content for path, content in IMAGE_FILES.items()})
        return "memory://images"

    yield fill
    memory.store.clear()


@pytest.mark.parametrize("kind", ["memory", "zip"])
@pytest.mark.parametrize("processes", [0, 2])
def test_images_on_other_file_systems(
    open_images: Callable[..., Dataset], folder: str, upload_to: Callable[[str], str], kind: str, processes: int
) -> None:
    remote = open_images(upload_to(kind), loader={"processes": processes})
    assert remote.fingerprint == open_images(folder).fingerprint
    assert np.array_equal(remote.train.inputs, decode_expected(IMAGE_FILES))


def test_images_on_s3(open_images: Callable[..., Dataset], folder: str, s3_url: str, tmp_path: Path) -> None:
    fs = fsspec.filesystem("s3")
    for path, content in IMAGE_FILES.items():
        fs.pipe_file(f"{s3_url}/{path}", content)
    table = pa.table({"path": sorted(IMAGE_FILES), "label": [path[:3] for path in sorted(IMAGE_FILES)]})
    with fs.open(f"{s3_url}/list.parquet", "wb") as file:
        pq.write_table(table, file)
    local = open_images(folder)
    # With 2, processes are forked while this one has open clients of the store.
    for processes in (0, 2):
        remote = open_images(s3_url, loader={"processes": processes})
        assert remote.fingerprint == local.fingerprint
        assert np.array_equal(remote.train.inputs, local.train.inputs)
    images = open_images(s3_url, "on demand").train.inputs
    for row, image in enumerate(map_in_processes(lambda row: images[row : row + 1], range(3), 1)):
        assert np.array_equal(image, local.train.inputs[row : row + 1])
    listed = open_images(f"{s3_url}/list.parquet", label="label")
    assert np.array_equal(listed.train.inputs, local.train.inputs)
    assert listed.label_names == CLASSES
    with pytest.raises(DataError, match="no such folder"):
        open_images(f"{s3_url}/absent")
    with pytest.raises(DataError, match="no such folder or bucket"):
        open_images("s3://trainyard-absent/images")


def write_path_table(folder: str, **columns: Any) -> str:
    path = Path(folder) / "list.parquet"
    pq.write_table(pa.table(columns), path)
    return str(path)


TABLE_PATHS = ["cat/1.png", "ant/1.png", "bee/1.png", "ant/1.png"]


def test_table_of_paths(open_images: Callable[..., Dataset], folder: str) -> None:
    paths = [*TABLE_PATHS[:3], f"file://{folder}/ant/1.png"]
    url = write_path_table(
        folder, path=paths, label=["b", "a", "b", "c"], day=pa.array([3, 1, 2, 1], pa.timestamp("s"))
    )
    dataset = open_images(url, label="label", splits={"by": "time", "column": "day", "val": "1s"})
    assert np.array_equal(
        dataset.train.inputs, np.stack([decode_image(IMAGE_FILES[path], ImageFormat()) for path in TABLE_PATHS])
    )
    assert (dataset.label_names, dataset.classes) == (("a", "b", "c"), ())
    assert dataset.train.targets.tolist() == [1, 0, 1, 2]
    assert dataset.split_columns["day"].values.tolist() == [3 * 10**9, 10**9, 2 * 10**9, 10**9]
    assert dataset.split_columns["day"].is_time


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
def test_label_types_in_a_table(
    open_images: Callable[..., Dataset],
    folder: str,
    labels: pa.Array,
    task: str,
    targets: list[float],
    names: tuple[str, ...],
) -> None:
    dataset = open_images(write_path_table(folder, path=TABLE_PATHS, label=labels), label="label", task=task)
    assert dataset.train.targets.dtype == (np.float64 if task == "regression" else np.int64)
    assert dataset.train.targets.tolist() == targets
    assert dataset.label_names == names


def test_column_of_group_splits(open_images: Callable[..., Dataset], folder: str) -> None:
    by: dict[str, Any] = {"label": "label", "splits": {"by": "group", "column": "who", "val": 0.5}}
    url = write_path_table(folder, path=TABLE_PATHS, label=[0, 1, 0, 1], who=["u", "v", "u", "t"])
    dataset = open_images(url, **by)
    assert dataset.split_columns["who"].value_names == ("t", "u", "v")
    assert dataset.split_columns["who"].values.tolist() == [1, 2, 1, 0]
    write_path_table(folder, path=TABLE_PATHS, label=[0, 1, 0, 1], who=["u", "v", "v", "t"])
    assert open_images(url, **by).fingerprint != dataset.fingerprint


def test_column_of_time_splits_as_text(open_images: Callable[..., Dataset], folder: str) -> None:
    url = write_path_table(
        folder, path=TABLE_PATHS, label=[0, 1, 0, 1], day=["1970-01-02", "1970-01-01", "1970-01-02", "1970-01-03"]
    )
    dataset = open_images(url, label="label", splits={"by": "time", "column": "day", "val": "1d"})
    assert (dataset.split_columns["day"].values / 86_400e9).tolist() == [1, 0, 1, 2]


INVALID_TABLES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no label named": ({"path": TABLE_PATHS}, {}, r"data\.label"),
    "no such column": ({"file": TABLE_PATHS, "label": [1] * 4}, {}, "no column path; the columns are file, label"),
    "no column of splits": (
        {"path": TABLE_PATHS, "label": [1] * 4},
        {"splits": {"by": "group", "column": "who", "val": 0.5}},
        "no column who",
    ),
    "no text": ({"path": [1, 2, 3, 4], "label": [1] * 4}, {}, "whole numbers .int64., not paths"),
    "null path": ({"path": [*TABLE_PATHS[:3], None], "label": [1] * 4}, {}, r"nulls in 1 of 4 rows, first in row 3"),
    "null label": (
        {"path": TABLE_PATHS, "label": ["a", None, None, "b"]},
        {},
        r"nulls .* in 2 of 4 rows, first in row 1",
    ),
    "NaN": ({"path": TABLE_PATHS, "label": [1.0, 2, float("nan"), 1]}, {}, r"nulls .* first in row 2"),
    "fractions": ({"path": TABLE_PATHS, "label": [1.0, 2.5, 3, 1]}, {}, "not whole in 1 of 4 rows, first in row 1"),
    "lists": ({"path": TABLE_PATHS, "label": [[1]] * 4}, {}, "cannot use"),
    "no rows": ({"path": pa.array([], pa.string()), "label": pa.array([], pa.int64())}, {}, "no rows"),
    "absent": (
        {"path": [*TABLE_PATHS[:2], "dog/1.png", "x.png"], "label": [1] * 4},
        {},
        r"no such image: dog/1.png \(2 of 4 are absent\)",
    ),
}


@pytest.mark.parametrize("name", INVALID_TABLES)
def test_invalid_tables_are_rejected(open_images: Callable[..., Dataset], folder: str, name: str) -> None:
    columns, data, message = INVALID_TABLES[name]
    label = {} if name == "no label named" else {"label": "label"}
    with pytest.raises(DataError, match=message):
        open_images(write_path_table(folder, **columns), **label, **data)


def test_unreadable_table_is_rejected(open_images: Callable[..., Dataset], tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match="not a Parquet file"):
        open_images(str(tmp_path / "x.parquet"), label="label")
    with pytest.raises(DataError, match="no such file"):
        open_images(str(tmp_path / "y.parquet"), label="label")


INVALID_FOLDERS: dict[str, tuple[dict[str, bytes], dict[str, Any], str]] = {
    "empty": ({}, {}, "no images among 0 files"),
    "others alone": ({"a/x.txt": b"", "a/y.txt": b"", "b/z.csv": b""}, {}, r"\.txt \(2\), \.csv \(1\)"),
    "loose": (
        {**IMAGE_FILES, "x.png": b"", "y.png": b""},
        {},
        r"x.png is not in the folder of a class \(2 of 17 images\)",
    ),
    "splits": ({f"{part}/ant/1.png": encode_image(1) for part in ("train", "test")}, {}, "look like splits"),
    "sizes": (
        {**IMAGE_FILES, "bee/x.png": encode_image(1, (4, 4))},
        {},
        "bee/x.png is 4 x 4 pixels, but ant/1.png is 20 x 16",
    ),
    "one side": ({**IMAGE_FILES, "bee/x.png": encode_image(1, (4, 9))}, {"resize": 4}, "4 x 9 pixels"),
    "crop": (IMAGE_FILES, {"crop": 17}, "20 x 16 pixels, too small for crop"),
    "label": (IMAGE_FILES, {"label": "label"}, r"data\.label"),
    "column": (IMAGE_FILES, {"splits": {"by": "group", "column": "who", "val": 0.5}}, "no column who"),
    "all broken": ({"a/1.png": b"x", "b/1.png": b"y"}, {}, "none of 2 images can be decoded; a/1.png"),
}


@pytest.mark.parametrize("storage", STORAGE_OPTIONS)
@pytest.mark.parametrize("name", INVALID_FOLDERS)
def test_invalid_folders_are_rejected(
    open_images: Callable[..., Dataset], tmp_path: Path, name: str, storage: str
) -> None:
    files, data, message = INVALID_FOLDERS[name]
    (tmp_path / "images").mkdir()
    with pytest.raises(DataError, match=message):
        open_images(write_files(tmp_path / "images", files), storage, **data)


def test_missing_paths_are_rejected(open_images: Callable[..., Dataset], tmp_path: Path) -> None:
    (tmp_path / "file.png").write_bytes(encode_image(1))
    for url in (tmp_path / "absent", "memory://absent"):
        with pytest.raises(DataError, match="no such folder"):
            open_images(str(url))
    for url in (tmp_path / "file.png", "nosuch://x/y"):
        with pytest.raises(StorageError, match="cannot be"):
            open_images(str(url))
    with pytest.raises(DataError, match="no numeric targets"):
        open_images(write_files(tmp_path / "images", IMAGE_FILES), task="regression")


def test_symlinks_are_followed(open_images: Callable[..., Dataset], folder: str, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in CLASSES:
        (linked / name).symlink_to(Path(folder) / name)
    assert open_images(str(linked)).fingerprint == open_images(folder).fingerprint
    (Path(folder) / "bee/gone.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no such image: bee/gone\.png \(1 of 16 are absent\)"):
        open_images(folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("path", ["ant", "ant/1.png"])
def test_missing_permission_is_reported(open_images: Callable[..., Dataset], folder: str, path: str) -> None:
    (Path(folder) / path).chmod(0)
    with pytest.raises(StorageError, match="no permission"):
        open_images(folder)
    (Path(folder) / path).chmod(0o700)


@pytest.mark.parametrize("processes", [0, 2])
@pytest.mark.parametrize("storage", ["memory", "cache"])
def test_broken_images_are_named_and_counted(
    open_images: Callable[..., Dataset], tmp_path: Path, storage: str, processes: int
) -> None:
    url = write_files(tmp_path / "images", {**IMAGE_FILES, **BROKEN_FILES})
    with pytest.raises(DataError, match=r"2 of 15 images are broken\. The first is ant/1.png"):
        open_images(url, storage, loader={"processes": processes})


@pytest.mark.parametrize("storage", STORAGE_OPTIONS)
def test_broken_images_are_skipped(open_images: Callable[..., Dataset], tmp_path: Path, storage: str) -> None:
    url = write_files(tmp_path / "images", {**IMAGE_FILES, **BROKEN_FILES})
    options: dict[str, Any] = {"resize": [20, 17], "on_error": "skip"}
    rest = {path: content for path, content in IMAGE_FILES.items() if path not in BROKEN_FILES}
    for _ in range(2):  # decoded, then from the cache
        dataset = open_images(url, storage, skip_up_to=0.2, **options)
        assert np.array_equal(dataset.train.inputs[0:13], decode_expected(rest, ImageFormat(resize=(20, 17))))
        assert dataset.train.targets.tolist() == [0] * 4 + [1] * 5 + [2] * 4
        assert dataset.warnings == ("2 of 15 images are broken and skipped: ant/1.png, cat/2.png",)
        with pytest.raises(DataError, match=r"skip_up_to allows 10\.00%"):
            open_images(url, storage, skip_up_to=0.1, **options)
    assert dataset.fingerprint != open_images(write_files(tmp_path / "whole", IMAGE_FILES)).fingerprint


def test_broken_image_on_demand_raises_when_it_is_decoded(open_images: Callable[..., Dataset], folder: str) -> None:
    (Path(folder) / "ant/2.png").write_bytes(b"x")
    images = open_images(folder, "on demand", resize=[20, 17]).train.inputs
    assert len(images[5:15]) == 10
    with pytest.raises(WorkError, match=r"ant/2\.png is broken"):
        images[np.array([7, 1])]


def test_image_on_demand_that_changes_later_is_rejected(open_images: Callable[..., Dataset], folder: str) -> None:
    images = open_images(folder, "on demand", resize=[20, 17]).train.inputs
    write_files(Path(folder), {"ant/2.png": encode_image(99)})
    assert len(images[5:15]) == 10
    with pytest.raises(DataError, match=r"ant/2\.png: changed while it was being read"):
        images[np.array([7, 1])]
    (Path(folder) / "ant/2.png").unlink()
    with pytest.raises(DataError, match=r"ant/2\.png no longer exists"):
        images[0:3]


def test_progress_is_reported_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now, messages = [0.0], list[str]()
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = ThrottledProgress("decoding", 50_000, messages.append)
    for done in range(1, 2001):
        now[0] = done / 800
        progress(done)
    assert messages == ["decoding 800 of 50,000 images", "decoding 1,600 of 50,000 images"]


def test_no_threads_are_left_running(open_images: Callable[..., Dataset], folder: str) -> None:
    before = threading.active_count()
    open_images(folder)
    assert threading.active_count() == before


@pytest.mark.parametrize("split", ["train", "val"])
def test_limited_evaluation_covers_every_class(tmp_path: Path, split: str) -> None:
    """Although the samples of a folder are sorted by class."""
    job = make_image_job(write_files(tmp_path, make_image_files(per_class=20)), splits={"val": 0.5, "stratify": True})
    prepared = prepare_data(job.model_copy(update={"evaluate": EvaluationConfig(limit=9)}))
    built = build_training(prepared)
    for world_size in (1, 2, 4):
        loaders = [
            build_eval_loader(prepared, built, split, rank=rank, world_size=world_size) for rank in range(world_size)
        ]
        labels = [label for loader in loaders for _, targets in loader for label in targets.tolist()]
        assert labels == [0, 0, 0, 1, 1, 1, 2, 2, 2]
