"""MNIST files: read correctly, or rejected with the name of the file and a fix."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from pipeline.config import JobConfig
from pipeline.config.files import build_job
from pipeline.data.dataset import compute_fingerprint
from pipeline.data.sources import open_dataset
from pipeline.data.sources.mnist import read_idx
from pipeline.errors import DataError

REAL_DATA = Path(__file__).parents[3] / "shared" / "data"
IMAGES_FILE, LABELS_FILE = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def encode_idx(values: np.ndarray) -> bytes:
    return bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes() + values.tobytes()


def write_idx_files(root: Path, *, packed: bool = False, folder: str = "MNIST") -> dict[str, np.ndarray]:
    """Write small random files in torchvision's layout, and return their content by file name."""
    raw = root / folder / "raw"
    raw.mkdir(parents=True)
    rng, written = np.random.default_rng(1), {}
    for prefix, rows in (("train", 20), ("t10k", 7)):
        written[f"{prefix}-images-idx3-ubyte"] = rng.integers(0, 256, (rows, 5, 4), dtype=np.uint8)
        written[f"{prefix}-labels-idx1-ubyte"] = rng.integers(0, 10, rows, dtype=np.uint8)
    for name, values in written.items():
        content = encode_idx(values)
        (raw / (name + ".gz" * packed)).write_bytes(gzip.compress(content) if packed else content)
    return written


def make_job(root: Path, source: str = "mnist") -> JobConfig:
    return build_job({"name": "t", "data": {"source": source, "root": str(root)}}, "test")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_existing_files_are_read(tmp_path: Path, name: str, folder: str, packed: bool) -> None:
    written = write_idx_files(tmp_path, packed=packed, folder=folder)
    for path in [*tmp_path.rglob("*"), tmp_path]:
        path.chmod(0o555)  # the files can be read from a read-only folder
    source = open_dataset(make_job(tmp_path, name))
    assert source.test is not None
    assert len(source.classes) == 10
    for arrays, prefix in ((source.train, "train"), (source.test, "t10k")):
        assert np.array_equal(arrays.inputs, written[f"{prefix}-images-idx3-ubyte"])
        assert np.array_equal(arrays.targets, written[f"{prefix}-labels-idx1-ubyte"])
        assert (arrays.inputs.dtype, arrays.targets.dtype) == (np.dtype("u1"), np.dtype("i8"))
    for path in tmp_path.rglob("*"):
        path.chmod(0o755)


def test_the_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_idx_files(tmp_path / "data")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(open_dataset(make_job(Path("~/data"))).train) == 20


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cut", [0, 3, 10, 100, -1])
def test_truncated_file_is_rejected(tmp_path: Path, cut: int, packed: bool) -> None:
    write_idx_files(tmp_path, packed=packed)
    path = tmp_path / "MNIST" / "raw" / (IMAGES_FILE + ".gz" * packed)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError) as caught:
        open_dataset(make_job(tmp_path))
    assert caught.value.where == str(path)
    assert "data.root" in caught.value.fix


def test_file_of_another_type_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(DataError, match="3c 68 74 6d"):
        read_idx(path, ndim=3)
    path.write_bytes(encode_idx(np.zeros(4, np.uint8)) + b"more")
    with pytest.raises(DataError, match="16 bytes, but its header says 4, which makes 12"):
        read_idx(path, ndim=1)


def test_images_and_labels_must_match(tmp_path: Path) -> None:
    write_idx_files(tmp_path)
    (tmp_path / "MNIST" / "raw" / LABELS_FILE).write_bytes(encode_idx(np.zeros(19, np.uint8)))
    with pytest.raises(DataError, match="20 images, but 19 labels"):
        open_dataset(make_job(tmp_path))


def test_fingerprint_covers_everything(tmp_path: Path) -> None:
    write_idx_files(tmp_path / "one")
    write_idx_files(tmp_path / "two", packed=True)
    first, second = (open_dataset(make_job(tmp_path / name)) for name in ("one", "two"))
    assert first.fingerprint == second.fingerprint
    train, test = first.train, first.test
    fingerprints = {
        first.fingerprint,
        compute_fingerprint(train, None, first.classes),
        compute_fingerprint(train, test, ("a",)),
    }
    for arrays in (train.inputs, train.targets):
        arrays.flat[-1] ^= 1
        fingerprints.add(compute_fingerprint(train, test, first.classes))
    train.inputs.shape = (20, 4, 5)
    fingerprints.add(compute_fingerprint(train, test, first.classes))
    assert len(fingerprints) == 6


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason=f"real MNIST is not in {REAL_DATA}")
def test_real_mnist() -> None:
    source = open_dataset(make_job(REAL_DATA))
    assert source.test is not None
    assert source.train.inputs.shape == (60000, 28, 28)
    assert source.test.inputs.shape == (10000, 28, 28)
    assert source.train.targets[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert np.bincount(source.test.targets).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert abs(source.train.inputs.mean() / 255 - 0.1307) < 1e-4  # the mean in every tutorial
