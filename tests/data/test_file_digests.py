"""Fingerprints change with the content of files of any size: by digests, checksums of stores, and sampled blocks."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import JobConfig
from pipeline.config.files import build_job
from pipeline.data.sources import Dataset, file_digests, fingerprint_dataset, open_dataset
from pipeline.data.sources.tables.parquet import ParquetFiles
from pipeline.errors import DataError
from pipeline.storage.read_files import store_checksum
from pipeline.watchdog import listening_to_progress
from tests.data.image_files import CLASSES, encode_image, make_image_job, write_files
from tests.data.parquet_jobs import make_parquet_job

NUM_ROWS = 20_000
TICK_S = 0.02
"""Longer than the resolution of change times on Linux (at most 10 ms)."""


@pytest.fixture(autouse=True)
def _low_size_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat all data as large: too large for full hashes of remote files, and large enough for cached digests."""
    monkeypatch.setattr(file_digests, "MAX_FULL_HASH_BYTES", 100)
    monkeypatch.setattr(file_digests, "MIN_CACHED_DIGEST_BYTES", 0)
    monkeypatch.setattr(file_digests, "MIN_CTIME_AGE_NS", 0)


@pytest.fixture
def hashed_files(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the local files that are hashed during the test."""
    names: list[str] = []
    original = file_digests.hash_file

    def hash_file(path: str, *args: Any) -> Any:
        names.append(Path(path).name)
        return original(path, *args)

    monkeypatch.setattr(file_digests, "hash_file", hash_file)
    return names


def make_columns() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {"x": rng.random(NUM_ROWS), "y": rng.integers(0, 2, NUM_ROWS)}


def encode_table(values: dict[str, np.ndarray]) -> bytes:
    """Encode a table to a file whose size and footer do not depend on the values."""
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.table(values), buffer, compression="none", use_dictionary=False, row_group_size=5_000)
    return bytes(buffer.getvalue())


def swap_values(values: dict[str, np.ndarray]) -> None:
    """Reverse the order of a thousand values."""
    values["x"][6000:7000] = values["x"][6000:7000][::-1].copy()


def swap_labels(values: dict[str, np.ndarray]) -> None:
    values["y"] = 1 - values["y"]


CHANGES: list[Callable[[dict[str, np.ndarray]], None]] = [swap_values, swap_labels]


def edit_in_place(path: Path, new: bytes) -> None:
    """Overwrite a file in place with content of the same size, and restore its modification time."""
    time.sleep(TICK_S)
    before = path.stat()
    assert len(new) == before.st_size
    with path.open("r+b") as file:
        file.write(new)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns


def make_table_job(url: object, tmp_path: Path, in_memory_mb: float = 0) -> JobConfig:
    return make_parquet_job(url, cache={"folder": str(tmp_path / "cache"), "in_memory_mb": in_memory_mb})


def read_arrays(source: Dataset) -> dict[str, list[Any]]:
    return {"x": np.asarray(source.train.inputs)[:, 0].tolist(), "y": source.train.targets.tolist()}


def expected_arrays(values: dict[str, np.ndarray]) -> dict[str, list[Any]]:
    return {"x": values["x"].astype(np.float32).tolist(), "y": values["y"].tolist()}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["local", "s3", "memory"])
def test_every_change_of_a_large_table_is_detected(
    kind: str, change: Callable[[dict[str, np.ndarray]], None], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The changed data is also decoded again, not read from the cache."""
    values, path = make_columns(), tmp_path / "t.parquet"
    url = str(path) if kind == "local" else "memory://large/t.parquet"
    if kind == "s3":
        url = request.getfixturevalue("s3_url") + "/t.parquet"

    def put(new: bytes) -> None:
        fsspec.core.url_to_fs(url)[0].pipe_file(url, new)

    put(encode_table(values))
    job = make_table_job(url, tmp_path)
    first, again = open_dataset(job), open_dataset(job)
    assert read_arrays(first) == read_arrays(again) == expected_arrays(values)
    assert first.fingerprint == again.fingerprint == fingerprint_dataset(job)[0]
    assert len(first.warnings) == (kind == "memory")
    size, footer = len(encode_table(values)), encode_table(values)[-500:]
    change(values)
    assert (len(encode_table(values)), encode_table(values)[-500:]) == (size, footer)
    edit_in_place(path, encode_table(values)) if kind == "local" else put(encode_table(values))
    changed = open_dataset(job)
    assert changed.fingerprint == fingerprint_dataset(job)[0] != first.fingerprint
    assert read_arrays(changed) == expected_arrays(values)


def test_missing_store_checksums_are_reported(tmp_path: Path) -> None:
    fsspec.filesystem("memory").pipe_file("/assumed/t.parquet", encode_table(make_columns()))
    (warning,) = open_dataset(make_table_job("memory://assumed/t.parquet", tmp_path)).warnings
    assert "the store has no checksums" in warning
    assert "assumed/t.parquet" in warning


@pytest.mark.parametrize("size", [1, 4 * file_digests.SAMPLE_BYTES, 10 * file_digests.SAMPLE_BYTES + 7])
def test_sampled_blocks_are_evenly_spaced_and_cover_both_ends(size: int) -> None:
    blocks = file_digests.evenly_spaced_ranges(size)
    assert blocks[0][0] == 0
    assert blocks[-1][1] == size
    assert all(first < end for first, end in blocks)
    assert len(blocks) <= file_digests.SAMPLES_PER_FILE


@pytest.mark.parametrize(
    ("info", "checksum"),
    [
        ({"ETag": '"0cc175b9"', "LastModified": "today"}, "ETag:0cc175b9"),
        ({"md5Hash": "1B2M2Y8A==", "etag": "CJ+=", "crc32c": "AAAA", "mtime": "today"}, "md5Hash:1B2M2Y8A=="),
        ({"generation": "17", "etag": "CJ+="}, "generation:17"),
        ({"etag": "0x8D", "last_modified": "today", "content_settings": {}}, "etag:0x8D"),
        ({"ETag": 'W/"0cc175b9"', "Last-Modified": "today"}, ""),
        ({"size": 1, "created": 1.5}, ""),
    ],
)
def test_content_checksums_of_stores(info: dict[str, Any], checksum: str) -> None:
    assert store_checksum(info) == checksum


def encode_bitmap(number: int) -> bytes:
    return encode_image(number, (64, 64), "BMP")


@pytest.mark.parametrize("in_memory_mb", [0, 100])
def test_edit_in_the_middle_of_an_image_is_detected(tmp_path: Path, in_memory_mb: float) -> None:
    files = {f"{name}/{row}.bmp": encode_bitmap(row) for name in CLASSES for row in range(3)}
    url = write_files(tmp_path / "images", files)
    job = make_image_job(url, cache={"folder": str(tmp_path / "cache"), "in_memory_mb": in_memory_mb})
    first = open_dataset(job)
    assert open_dataset(job).fingerprint == first.fingerprint == fingerprint_dataset(job)[0]
    new = bytearray(files["bee/1.bmp"])
    new[6000] ^= 255
    edit_in_place(tmp_path / "images/bee/1.bmp", bytes(new))
    changed = open_dataset(job)
    assert changed.fingerprint == fingerprint_dataset(job)[0] != first.fingerprint
    different = np.flatnonzero((changed.train.inputs != first.train.inputs).any((1, 2, 3)))
    assert different.tolist() == [4]


def test_images_in_a_store_are_identified_by_checksum(tmp_path: Path, s3_url: str) -> None:
    fs = fsspec.filesystem("s3")
    for name in CLASSES:
        fs.pipe_file(f"{s3_url}/{name}/1.bmp", encode_bitmap(1))
    table = pa.table({"path": [f"{name}/1.bmp" for name in CLASSES], "label": list(CLASSES)})
    with fs.open(f"{s3_url}/list.parquet", "wb") as file:
        pq.write_table(table, file)
    jobs = [make_image_job(s3_url), make_image_job(f"{s3_url}/list.parquet", label="label")]
    before = [open_dataset(job).fingerprint for job in jobs]
    fs.pipe_file(f"{s3_url}/ant/1.bmp", encode_bitmap(1))
    assert [fingerprint_dataset(job)[0] for job in jobs] == before
    fs.pipe_file(f"{s3_url}/ant/1.bmp", encode_bitmap(2))
    assert not set(before) & {open_dataset(job).fingerprint for job in jobs}


def test_unchanged_files_are_hashed_once(tmp_path: Path, hashed_files: list[str]) -> None:
    folder = tmp_path / "table"
    folder.mkdir()
    for name in "abc":
        (folder / f"{name}.parquet").write_bytes(encode_table(make_columns()))
    time.sleep(TICK_S)
    job = make_table_job(folder, tmp_path)
    before = open_dataset(job).fingerprint
    assert sorted(hashed_files) == ["a.parquet", "b.parquet", "c.parquet"]
    hashed_files.clear()
    assert open_dataset(job).fingerprint == fingerprint_dataset(job)[0] == before
    assert hashed_files == []
    values = make_columns()
    swap_labels(values)
    edit_in_place(folder / "b.parquet", encode_table(values))
    time.sleep(TICK_S)
    after = fingerprint_dataset(job)[0]
    assert after == fingerprint_dataset(job)[0] != before
    assert hashed_files == ["b.parquet"]
    (digest_file,) = (tmp_path / "cache").glob(".digests-*")
    digest_file.write_bytes(digest_file.read_bytes()[:-1])  # a damaged file is ignored
    assert fingerprint_dataset(job)[0] == after


def test_digest_of_a_just_written_file_is_not_cached(
    tmp_path: Path, hashed_files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later edit could have the same change time, as with git's "racily clean" entries."""
    monkeypatch.setattr(file_digests, "MIN_CTIME_AGE_NS", 3600 * 10**9)
    (tmp_path / "t.parquet").write_bytes(encode_table(make_columns()))
    job = make_table_job(tmp_path / "t.parquet", tmp_path)
    assert fingerprint_dataset(job)[0] == fingerprint_dataset(job)[0]
    assert hashed_files == ["t.parquet"] * 2


def test_unwritable_digest_cache_is_ignored(tmp_path: Path, hashed_files: list[str]) -> None:
    (tmp_path / "t.parquet").write_bytes(encode_table(make_columns()))
    (tmp_path / "cache").write_text("in the way")
    job = make_table_job(tmp_path / "t.parquet", tmp_path, in_memory_mb=100)
    first, again = open_dataset(job), open_dataset(job)
    assert first.fingerprint == again.fingerprint
    assert "every start hashes it again" in first.warnings[0]
    assert hashed_files == ["t.parquet"] * 2


@pytest.mark.parametrize("is_settled", [True, False])
def test_table_changed_while_decoding_is_rejected(
    tmp_path: Path, is_settled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is detected by its change time; or by its content, if the change time is not old enough to be reliable."""
    monkeypatch.setattr("pipeline.data.sources.tables.decode.PROGRESS_INTERVAL_S", 0.0)
    if not is_settled:
        monkeypatch.setattr(file_digests, "MIN_CTIME_AGE_NS", 3600 * 10**9)
        monkeypatch.setattr(file_digests, "_make_stamp", lambda status: b"as before")
    path, values = tmp_path / "t.parquet", make_columns()
    path.write_bytes(encode_table(values))
    swap_labels(values)
    job = make_table_job(path, tmp_path)
    messages: list[str] = []

    def on_progress(text: str) -> None:
        if text.startswith("caching") and not messages:
            messages.append(text)
            edit_in_place(path, encode_table(values))

    with pytest.raises(DataError, match=r"t\.parquet: changed while it was being read\n.*the same command again"):
        open_dataset(job, on_progress)
    assert messages
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()] == []
    assert read_arrays(open_dataset(job, on_progress)) == expected_arrays(values)


def test_objects_changed_while_decoding_are_rejected(
    tmp_path: Path, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.data.sources.tables.decode.PROGRESS_INTERVAL_S", 0.0)
    fs, url, values = fsspec.filesystem("s3"), f"{s3_url}/t.parquet", make_columns()
    fs.pipe_file(url, encode_table(values))
    swap_labels(values)
    with pytest.raises(DataError, match=r"t\.parquet: changed while it was being read"):
        open_dataset(make_table_job(url, tmp_path), lambda text: fs.pipe_file(url, encode_table(values)))


def encode_idx(values: np.ndarray) -> bytes:
    return bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes() + values.tobytes()


@pytest.fixture
def data_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, dict[str, Any]]]:
    """The `data:` of one job for each kind of source."""
    (tmp_path / "t.parquet").write_bytes(encode_table(make_columns()))
    images = write_files(tmp_path / "images", {f"{name}/1.png": encode_image(1) for name in CLASSES})
    broken = write_files(
        tmp_path / "broken", {f"{name}/1.png": encode_image(1) for name in CLASSES} | {"ant/2.png": b""}
    )
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix in ("train", "t10k"):
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(encode_idx(np.ones((3, 4, 5), np.uint8)))
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(encode_idx(np.arange(3, dtype=np.uint8)))
    (tmp_path / "digests_code.py").write_text(
        "import numpy as np\n\n\ndef data():\n    return np.ones((4, 2, 3, 5), 'f4'), [0, 1, 0, 1] + np.zeros(4, int)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    cache = {"folder": str(tmp_path / "cache")}
    yield {
        "parquet": {"source": "parquet", "url": "t.parquet", "label": "y", "cache": cache},
        "image_folder": {"source": "image_folder", "url": images, "cache": cache},
        "broken": {"source": "image_folder", "url": broken, "cache": cache, "on_error": "skip", "skip_up_to": 0.5},
        "mnist": {"source": "mnist", "root": str(tmp_path)},
        "disc": {"source": "disc"},
        "call": {"source": {"call": "digests_code:data"}},
    }
    sys.modules.pop("digests_code", None)


def make_job(data: dict[str, Any]) -> JobConfig:
    return build_job({"name": "t", "data": data, "best": {"metric": "val/loss"}}, "test")


def test_fingerprint_needs_neither_torch_nor_decoding(
    data_configs: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = {name: open_dataset(make_job(data)).fingerprint for name, data in data_configs.items()}
    program = f"""
import json, sys
from pipeline.data.sources import fingerprint_dataset
from pipeline.config.files import build_job
fingerprints = {{}}
for name, data in {data_configs!r}.items():
    job = build_job({{"name": "t", "data": data, "best": {{"metric": "val/loss"}}}}, "test")
    fingerprints[name] = fingerprint_dataset(job)[0]
print(fingerprints == {expected!r}, sorted({{"torch", "torchvision", "ray"}} & set(sys.modules)))
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), str(Path(__file__).parents[2])])}
    completed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, env=env)
    assert (completed.stdout, completed.stderr) == ("True []\n", "")
    monkeypatch.setattr(ParquetFiles, "iter_batches", None)
    monkeypatch.setattr("pipeline.data.sources.images.decode_all", None)
    for name in ("parquet", "image_folder"):
        assert fingerprint_dataset(make_job(data_configs[name]))[0] == expected[name]


def test_url_from_the_environment_is_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.parquet").write_bytes(encode_table(make_columns()))
    monkeypatch.setenv("DIGESTS_URL", str(tmp_path / "t.parquet"))
    job = make_table_job("env:DIGESTS_URL", tmp_path)
    assert (
        fingerprint_dataset(job)[0]
        == open_dataset(job).fingerprint
        == fingerprint_dataset(make_table_job(tmp_path / "t.parquet", tmp_path))[0]
    )


@pytest.mark.parametrize("name", ["parquet", "image_folder"])
@pytest.mark.parametrize("in_memory_mb", [0, 100])
def test_hashing_and_decoding_report_progress(
    data_configs: dict[str, dict[str, Any]], name: str, in_memory_mb: float
) -> None:
    data = data_configs[name]
    reports: list[None] = []
    with listening_to_progress(lambda: reports.append(None)):
        fingerprint_dataset(make_job(data))
        num_while_hashing = len(reports)
        open_dataset(make_job({**data, "cache": {**data["cache"], "in_memory_mb": in_memory_mb}}))
    assert 0 < num_while_hashing < len(reports) - 2
