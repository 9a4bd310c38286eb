"""Prediction for images: a single one, a glob, a folder, and broken ones."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline import load, train
from pipeline.commands.predict import predict
from pipeline.config.files import build_job
from pipeline.errors import DataError, InputError


def encode_png(shade: int, size: int = 6) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((size, size, 3), shade, np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dark and light squares of 6 x 6 pixels, and two runs trained on them, with `on_error` fail and skip."""
    root = tmp_path_factory.mktemp("shades")
    for number in range(20):
        for name, shade in (("dark", number), ("light", 255 - number)):
            (root / "data" / name).mkdir(parents=True, exist_ok=True)
            (root / "data" / name / f"{number:02d}.png").write_bytes(encode_png(shade))
    for on_error in ("fail", "skip"):
        data = {"source": "image_folder", "url": str(root / "data"), "on_error": on_error}
        tree = {"name": on_error, "data": data, "train": {"batch_size": 8, "phases": [{"epochs": 4, "lr": 0.3}]}}
        train(build_job(tree, "test"), storage=str(root / "runs"), name=on_error)
    return root


@pytest.fixture
def images_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a few images."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name, shade in (("cat.png", 5), ("_dog.png", 250), ("deep/a.png", 8), ("deep/er/b.png", 240)):
        (tmp_path / name).write_bytes(encode_png(shade))
    (tmp_path / "notes.txt").write_text("no picture")
    return tmp_path


def predict_by_path(folder: Path, source: str, run: str = "fail", **options: object) -> dict[str, str]:
    """Predict, and return the predictions by path."""
    predict(f"{folder}/runs/{run}", input=source, output="out.parquet", **options)  # type: ignore[arg-type]
    out = pq.read_table("out.parquet")
    return dict(zip(out["path"].to_pylist(), out["prediction"].to_pylist(), strict=True))


def test_all_image_input_types_agree(folder: Path, images_folder: Path) -> None:
    model = load(f"{folder}/runs/fail")
    path = images_folder / "cat.png"
    expected = model.predict_proba([path])
    assert expected.shape == (1, 2)
    with Image.open(path) as opened:
        image = opened.copy()
    for image_input in ("cat.png", str(path), path, path.as_uri(), path.read_bytes(), image):
        assert model.predict(image_input).tolist() == ["dark"]
        np.testing.assert_array_equal(model.predict_proba(image_input), expected)
    assert model.predict([]).shape == (0,)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("none.png", "none.png: there is no such file"),
        ("notes.txt", "notes.txt: cannot be used as an image"),
        ("deep", "deep: cannot be used .*IsADirectoryError"),
        ("small.png", "small.png: is 4 x 4 pixels, but the model was trained on 6 x 6"),
    ],
)
def test_invalid_image_is_named(folder: Path, images_folder: Path, name: str, words: str) -> None:
    (images_folder / "small.png").write_bytes(encode_png(0, size=4))
    for data in (name, ["cat.png", name]):
        with pytest.raises(DataError, match=words):
            load(f"{folder}/runs/fail").predict(data)


def test_input_is_an_image_a_glob_or_a_folder(folder: Path, images_folder: Path) -> None:
    assert predict_by_path(folder, "cat.png") == {"cat.png": "dark"}
    assert predict_by_path(folder, f"{images_folder}/deep/a.png") == {"a.png": "dark"}
    assert predict_by_path(folder, "*.png") == {"cat.png": "dark", "_dog.png": "light"}
    assert predict_by_path(folder, f"{images_folder}/deep/**") == {"a.png": "dark", "er/b.png": "light"}
    assert predict_by_path(folder, "deep/*/*.png") == {"er/b.png": "light"}
    every = {"_dog.png": "light", "cat.png": "dark", "deep/a.png": "dark", "deep/er/b.png": "light"}
    assert predict_by_path(folder, ".") == predict_by_path(folder, f"file://{images_folder}/") == every
    (images_folder / "portrait").write_bytes(encode_png(3))
    assert predict_by_path(folder, "portrait") == {"portrait": "dark"}  # a single path needs no extension


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("none.png", "--input none.png: there is no such file or folder"),
        ("none/*.png", "no images among 0 files"),
        ("*.txt", "no images among 1 files"),
        ("notes.txt", "notes.txt: cannot be used as an image"),
    ],
)
def test_input_without_images_is_rejected(folder: Path, images_folder: Path, source: str, words: str) -> None:
    with pytest.raises(InputError, match=words.replace("*", r"\*")):
        predict_by_path(folder, source)
    assert not (images_folder / "out.parquet").exists()


def test_broken_images_are_skipped_where_the_job_allows(folder: Path, images_folder: Path) -> None:
    (images_folder / "broken.png").write_bytes(encode_png(9)[:45])
    with pytest.raises(DataError, match=r"broken\.png: cannot be used as an image"):
        predict_by_path(folder, ".")
    warnings_given: list[str] = []
    found = predict(f"{folder}/runs/skip", input=".", output="out.parquet", on_warning=warnings_given.append)
    out = pq.read_table("out.parquet")
    assert out["path"].to_pylist() == ["_dog.png", "cat.png", "deep/a.png", "deep/er/b.png"]
    assert out["prediction"].to_pylist() == ["light", "dark", "dark", "light"]
    assert (found.rows, found.skipped) == (4, ("broken.png",))
    assert warnings_given == list(found.warnings) == ["skipped 1 broken image: broken.png"]
    assert found.to_json()["skipped"] == ["broken.png"]
    with pytest.raises(DataError, match="none of 1 images can be decoded"):
        predict_by_path(folder, "broken.png", run="skip")


def test_images_in_object_storage(folder: Path, images_folder: Path, s3_url: str) -> None:
    import fsspec

    fs, path = fsspec.core.url_to_fs(s3_url)
    fs.put(str(images_folder / "cat.png"), f"{path}/pictures/cat.png")
    fs.put(str(images_folder / "deep" / "a.png"), f"{path}/pictures/deep/a.png")
    assert predict_by_path(folder, f"{s3_url}/pictures/cat.png") == {"cat.png": "dark"}
    assert predict_by_path(folder, f"{s3_url}/pictures/*.png") == {"cat.png": "dark"}
    assert predict_by_path(folder, f"{s3_url}/pictures") == {"cat.png": "dark", "deep/a.png": "dark"}
    with pytest.raises(InputError, match="no such file or folder"):
        predict_by_path(folder, f"{s3_url}/none")
    assert load(f"{folder}/runs/fail").predict(f"{s3_url}/pictures/cat.png").tolist() == ["dark"]
