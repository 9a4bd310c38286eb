"""docs/architecture.md: the files, functions and floors that it names are those of the code."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")

CODE_SPANS = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", PAGE)]
FOLDERS_OF_ROOT = ("tests", "docs", "jobs", "k8s", "pipeline")
FOLDERS_OF_RUNS = ("live/", ".tmp/")
"""Folders of a run directory, which the page names too."""
SUBPACKAGES = {
    "cluster": ["submission/"],
    "runs": ["journal/", "lease/", "checkpoints/", "metric_log/"],
    "data": ["sources/", "tabular/", "transforms/", "augment/"],
    "config": ["files/"],
}

files = sorted({span.partition(":")[0] for span in CODE_SPANS if re.fullmatch(r"[\w/.]+\.py(:[\w.]+)?", span)})
symbols = sorted({span for span in CODE_SPANS if re.fullmatch(r"[\w/.]+\.py:[\w.]+", span)})
folders = sorted({span for span in CODE_SPANS if re.fullmatch(r"[\w/.]+/", span)} - set(FOLDERS_OF_RUNS))


def locate(path: str) -> Path:
    return ROOT / path if path.split("/")[0] in FOLDERS_OF_ROOT else ROOT / "pipeline" / path


def defined_names(node: ast.Module | ast.ClassDef, prefix: str = "") -> Iterator[str]:
    """Names of functions, classes and assigned values, those of a class as `Class.name`."""
    for statement in node.body:
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            yield prefix + statement.name
        if isinstance(statement, ast.ClassDef):
            yield from defined_names(statement, f"{prefix}{statement.name}.")
        if isinstance(statement, ast.Assign | ast.AnnAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            yield from (prefix + target.id for target in targets if isinstance(target, ast.Name))


def section(heading: str) -> str:
    return PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0]


def rows_of_rooms() -> list[list[str]]:
    """The cells of the table of rooms: floor, room, what it is for, what it may import."""
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \| (.+) \| (.+) \|$", PAGE, re.MULTILINE)
    return [list(row) for row in rows]


def layers() -> list[set[str]]:
    """The rooms of each floor in the import contract, from the top."""
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    return [set(layer.split(" | ")) for layer in contract["contracts"][0]["layers"]]


@pytest.mark.parametrize("path", files)
def test_every_file_exists(path: str) -> None:
    assert locate(path).is_file()


@pytest.mark.parametrize("folder", folders)
def test_every_folder_exists(folder: str) -> None:
    parents = [room for room, names in SUBPACKAGES.items() if folder in names]
    assert locate(f"{parents[0]}/{folder}" if parents else folder).is_dir()


@pytest.mark.parametrize("symbol", symbols)
def test_every_function_class_and_constant_is_defined_in_its_file(symbol: str) -> None:
    path, _, name = symbol.partition(":")
    assert name in set(defined_names(ast.parse(locate(path).read_text(encoding="utf-8"))))


def test_each_function_from_the_command_to_the_loop_calls_the_next() -> None:
    steps = re.findall(
        r"^\d\. `([\w/]+\.py):(\w+)`", section("From the command to the loop").partition("With")[0], re.M
    )
    assert len(steps) == 5
    for (path, name), (_, next_name) in pairwise(steps):
        source = locate(path).read_text(encoding="utf-8")
        body = next(node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == name)
        assert re.search(rf"\b{next_name}\b", ast.get_source_segment(source, body) or ""), f"{path}:{name}"


def test_many_places_are_named() -> None:
    assert len(files) > 60
    assert len(symbols) > 100


def test_the_rooms_and_their_floors_are_those_of_the_import_contract() -> None:
    floors = layers()
    rows = [(int(floor), room) for floor, room, _, _ in rows_of_rooms()]
    assert len(rows) == sum(map(len, floors))
    assert {(len(floors) - depth, room) for depth, rooms in enumerate(floors) for room in rooms} == set(rows)
    for floor, room, _, imports in rows_of_rooms():
        below = {"1": "nothing", "2": "floor 1", "3": "floors 1 and 2"}.get(floor, f"floors 1 to {int(floor) - 1}")
        assert imports.removesuffix(", Ray") == below, room


def test_the_subpackages_of_each_room_are_named_in_its_row() -> None:
    rows = {room: purpose for _, room, purpose, _ in rows_of_rooms()}
    for room, purpose in rows.items():
        packages = {f"{path.parent.name}/" for path in (ROOT / "pipeline" / room).glob("*/__init__.py")}
        assert packages == set(SUBPACKAGES.get(room, [])), room
        assert [package for package in packages if f"`{package}`" not in purpose] == [], room
