"""Downloads with torchvision's code, from a server on this machine and without any server."""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.server
import io
import pickle
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config.files import build_job
from pipeline.data.sources import Dataset, open_dataset
from pipeline.errors import DataError

UNREACHABLE_URL = "http://127.0.0.1:9/"
"""The discard port, where no server listens."""

SERVED_PATHS: list[str] = []
"""Paths that were requested from the server since it started."""


def open_named_dataset(name: str, root: Path) -> Dataset:
    return open_dataset(build_job({"name": "t", "data": {"source": name, "root": str(root)}}, "test"))


@pytest.fixture
def file_server(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder and the URL of the server of its files."""

    class RecordingHandler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            SERVED_PATHS.append(self.path)

    folder = tmp_path / "served"
    folder.mkdir()
    SERVED_PATHS.clear()
    handler = functools.partial(RecordingHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


def md5_digest(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def encode_gzipped_idx(values: np.ndarray) -> bytes:
    return gzip.compress(bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes() + values.tobytes())


@pytest.fixture
def fashion_mnist_server(file_server: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a server with a small Fashion-MNIST."""
    from torchvision import datasets

    folder, url = file_server
    resources = []
    for prefix, rows in (("train", 20), ("t10k", 7)):
        for kind, shape in (("images-idx3", (rows, 5, 4)), ("labels-idx1", (rows,))):
            content = encode_gzipped_idx(np.ones(shape, np.uint8))
            name = f"{prefix}-{kind}-ubyte.gz"
            (folder / name).write_bytes(content)
            resources.append((name, md5_digest(content)))
    monkeypatch.setattr(datasets.FashionMNIST, "mirrors", [UNREACHABLE_URL, url])
    monkeypatch.setattr(datasets.FashionMNIST, "resources", resources)
    return folder


def list_files(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def test_missing_files_are_downloaded(
    fashion_mnist_server: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "not" / "there" / "yet"
    source = open_named_dataset("fashion_mnist", root)
    assert source.train.inputs.shape == (20, 5, 4)
    assert source.classes[9] == "Ankle boot"
    names = {f"FashionMNIST/raw/{path.stem}" for path in fashion_mnist_server.iterdir()}
    assert list_files(root) == {*names, ".download.lock"}
    assert capfd.readouterr() == ("", "")  # torchvision's output is suppressed
    for path in fashion_mnist_server.iterdir():
        path.unlink()
    assert open_named_dataset("fashion_mnist", root).fingerprint == source.fingerprint


def test_only_missing_files_are_downloaded(fashion_mnist_server: Path, tmp_path: Path) -> None:
    open_named_dataset("fashion_mnist", tmp_path / "data")
    raw = tmp_path / "data" / "FashionMNIST" / "raw"
    existing = encode_gzipped_idx(np.full((20, 5, 4), 9, np.uint8))
    (raw / "train-images-idx3-ubyte").write_bytes(gzip.decompress(existing))
    (raw / "t10k-labels-idx1-ubyte").unlink()
    assert (open_named_dataset("fashion_mnist", tmp_path / "data").train.inputs == 9).all()


def test_concurrent_opens_download_once(fashion_mnist_server: Path, tmp_path: Path) -> None:
    open_named_dataset("fashion_mnist", tmp_path / "other")
    num_requests = len(SERVED_PATHS)
    results: list[Dataset] = []
    threads = [
        threading.Thread(target=lambda: results.append(open_named_dataset("fashion_mnist", tmp_path / "data")))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({source.fingerprint for source in results}) == 1
    assert len(results) == 4
    assert len(SERVED_PATHS) == 2 * num_requests


def test_failed_download_leaves_no_files(
    fashion_mnist_server: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (fashion_mnist_server / "t10k-images-idx3-ubyte.gz").write_bytes(b"wrong content")
    with pytest.raises(DataError) as caught:
        open_named_dataset("fashion_mnist", tmp_path / "data")
    assert list_files(tmp_path / "data") == {".download.lock"}
    assert "\n" not in caught.value.what
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "cifar100"])
def test_missing_network_is_reported(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from torchvision import datasets

    for dataset in (datasets.MNIST, datasets.FashionMNIST):
        monkeypatch.setattr(dataset, "mirrors", [UNREACHABLE_URL])
    for dataset in (datasets.CIFAR10, datasets.CIFAR100):
        monkeypatch.setattr(dataset, "url", UNREACHABLE_URL + "cifar.tar.gz")
    with pytest.raises(DataError) as caught:
        open_named_dataset(name, tmp_path)
    assert caught.value.what.startswith(f"{name} is absent and could not be downloaded: ")
    assert str(tmp_path) in caught.value.where
    assert "--set data.root=DIR" in caught.value.fix
    assert "\n" not in caught.value.what
    assert capfd.readouterr() == ("", "")


def test_unwritable_root_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"data\.root"):
        open_named_dataset("mnist", tmp_path / "file" / "below")


@pytest.fixture
def cifar_images(file_server: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """The images of a server with a small CIFAR-10, uint8 (12, 3, 32, 32): 10 for training and 2 for test."""
    from torchvision import datasets

    folder, url = file_server
    images = np.random.default_rng(1).integers(0, 256, (12, 3, 32, 32), dtype=np.uint8)
    parts: dict[str, dict[str, Any]] = {
        "data_batch_1": {"data": images[:10].reshape(10, -1), "labels": list(range(10))},
        "test_batch": {"data": images[10:].reshape(2, -1), "labels": [3, 4]},
        "batches.meta": {"label_names": list("abcdefghij")},
    }
    contents = {name: pickle.dumps(part) for name, part in parts.items()}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    (folder / "cifar.tar.gz").write_bytes(buffer.getvalue())
    monkeypatch.setattr(datasets.CIFAR10, "url", url + "cifar.tar.gz")
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", md5_digest(buffer.getvalue()))
    for attribute, name in (("train_list", "data_batch_1"), ("test_list", "test_batch")):
        monkeypatch.setattr(datasets.CIFAR10, attribute, [[name, md5_digest(contents[name])]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": md5_digest(contents["batches.meta"])}
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)
    return images


def test_cifar_is_downloaded_and_verified(
    cifar_images: np.ndarray, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = open_named_dataset("cifar10", tmp_path / "data")
    assert source.test is not None
    assert np.array_equal(source.train.inputs, cifar_images[:10])
    assert np.array_equal(source.test.inputs, cifar_images[10:])
    assert (source.train.targets.dtype, source.train.targets.tolist()) == (np.dtype("i8"), list(range(10)))
    assert source.classes == tuple("abcdefghij")
    assert capfd.readouterr() == ("", "")
    damaged = tmp_path / "data" / "cifar-10-batches-py" / "test_batch"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(DataError, match="damaged") as caught:
        open_named_dataset("cifar10", tmp_path / "data")
    assert caught.value.where == str(damaged.parent)


def test_existing_files_do_not_import_torchvision(fashion_mnist_server: Path, tmp_path: Path) -> None:
    open_named_dataset("fashion_mnist", tmp_path)
    program = f"""
import sys
from pipeline.data.sources import open_dataset
from pipeline.config.files import build_job
open_dataset(build_job({{"name": "t", "data": {{"source": "fashion_mnist", "root": {str(tmp_path)!r}}}}}, "test"))
print(sorted({{"torchvision", "torch._dynamo", "pyarrow", "ray"}} & set(sys.modules)))
"""
    completed = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )
    assert completed.stdout == "[]\n"
