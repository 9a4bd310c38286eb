"""Finding and reading files by URL, with the same rules for tables and images."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest

from pipeline.errors import DataError, StorageError
from pipeline.storage.read_files import (
    IGNORED_IMAGE_PREFIXES,
    IGNORED_PREFIXES,
    FileReader,
    as_data_errors,
    find_files,
    is_ignored,
    map_in_threads,
)

FILES = [
    "a.parquet",
    "_SUCCESS",
    ".crc",
    "_delta_log/0.parquet",
    "_day=2024-01-01/b.parquet",
    ".git/c.png",
    "_background_/_DSC0001.JPG",
    "ant/.thumb.png",
    "ant/d.png",
]


@pytest.fixture(params=["local", "memory"])
def fill(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], str]]:
    """A function that writes `FILES`, each with its path as content, and returns the URL of the folder."""
    memory = fsspec.filesystem("memory")
    url = str(tmp_path / "in_.hidden") if request.param == "local" else "memory://in_.hidden"

    def write() -> str:
        for path in FILES:
            if request.param == "local":
                (Path(url) / path).parent.mkdir(parents=True, exist_ok=True)
                (Path(url) / path).write_text(path)
            else:
                memory.pipe_file(f"/in_.hidden/{path}", path.encode())
        return url

    yield write
    if memory.exists("/in_.hidden"):
        memory.rm("/in_.hidden", recursive=True)


@pytest.mark.parametrize(
    ("pattern", "ignored", "expected"),
    [
        ("", IGNORED_PREFIXES, ["_day=2024-01-01/b.parquet", "a.parquet", "ant/d.png"]),
        (
            "/",
            IGNORED_IMAGE_PREFIXES,
            [
                *("_SUCCESS", "_background_/_DSC0001.JPG", "_day=2024-01-01/b.parquet", "_delta_log/0.parquet"),
                *("a.parquet", "ant/d.png"),
            ],
        ),
        ("/*.parquet", IGNORED_PREFIXES, ["a.parquet"]),
        ("/*/*", IGNORED_PREFIXES, ["_day=2024-01-01/b.parquet", "ant/d.png"]),
        ("/a*", IGNORED_PREFIXES, ["a.parquet", "ant/d.png"]),
        ("/_delta_log", IGNORED_PREFIXES, ["0.parquet"]),
        ("/_SUCCESS", IGNORED_PREFIXES, ["_SUCCESS"]),
        ("/*.nothing", IGNORED_PREFIXES, []),
    ],
)
def test_files_of_a_url(fill: Callable[[], str], pattern: str, ignored: tuple[str, ...], expected: list[str]) -> None:
    url = fill()
    reader, files = find_files(url + pattern, ignored)
    assert list(files) == expected
    for path, info in files.items():
        content = reader.read(path)
        assert f"/{content.decode()}".endswith(f"/{path}")
        assert info.size == len(content)
        assert reader.stat(path) == info
        assert reader.read_range(path, 1, 3) == content[1:3]
    if not pattern.strip("/"):
        assert FileReader(url).list_files(ignored) == files


def test_glob_can_skip_matching_folders(fill: Callable[[], str]) -> None:
    assert list(find_files(f"{fill()}/a*", expand_folders=False)[1]) == ["a.parquet"]


def test_listing_skips_ignored_names(fill: Callable[[], str]) -> None:
    reader = FileReader(fill())
    assert reader.list_directory() == [("_day=2024-01-01", True), ("a.parquet", False), ("ant", True)]
    assert reader.list_directory("ant", IGNORED_IMAGE_PREFIXES) == [("ant/d.png", False)]


def test_missing_files_and_folders(fill: Callable[[], str], tmp_path: Path) -> None:
    url = fill()
    assert [FileReader(f"{url}{path}").kind() for path in ("", "/a.parquet", "/b")] == ["folder", "file", "missing"]
    assert FileReader(url).stat("b").size == -1
    with pytest.raises(FileNotFoundError):
        find_files(f"{url}/b")
    with pytest.raises(FileNotFoundError):
        FileReader(f"{url}/b").list_files()
    with pytest.raises(DataError, match="does not exist"), as_data_errors(url):
        FileReader(url).read("b")
    (tmp_path / "empty").mkdir()
    assert FileReader(str(tmp_path / "empty")).list_files() == {}
    with pytest.raises(StorageError, match="cannot be opened"):
        find_files("nosuch://x/y")


def test_links_are_followed_except_to_parent_folders(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    (elsewhere / "a").write_text("abc")
    (folder / "file").symlink_to(elsewhere / "a")
    (folder / "folder").symlink_to(elsewhere)
    (folder / "circle").symlink_to(folder)
    (folder / "nowhere").symlink_to(tmp_path / "absent")
    sizes = {"file": 3, "folder/a": 3, "nowhere": -1}
    assert {path: info.size for path, info in find_files(str(folder))[1].items()} == sizes
    assert {path: info.size for path, info in find_files(f"{folder}/[fn]*")[1].items()} == sizes


def test_paths_outside_the_folder(fill: Callable[[], str]) -> None:
    url = fill()
    reader = FileReader(f"{url}/ant")
    assert reader.read("../a.parquet") == reader.read(f"{url}/a.parquet") == b"a.parquet"
    assert os.path.isabs(reader.local_path("d.png")) == ("://" not in url)
    assert reader.location("d.png").endswith("in_.hidden/ant/d.png")


@pytest.mark.parametrize(
    ("path", "tables", "images"),
    [
        ("x_y/a.b", False, False),
        ("_day=1/a", False, False),
        (".day=1/a", True, True),
        ("x/_a", True, False),
        ("_x/a", True, False),
        ("x/.a", True, True),
    ],
)
def test_ignored_names(path: str, tables: bool, images: bool) -> None:
    assert is_ignored(path, IGNORED_PREFIXES) == tables
    assert is_ignored(path, IGNORED_IMAGE_PREFIXES) == images


@pytest.mark.parametrize("threads", [1, 3])
def test_items_are_mapped_in_order(threads: int) -> None:
    assert list(map_in_threads(lambda item: item * 2, range(20), threads)) == list(range(0, 40, 2))
