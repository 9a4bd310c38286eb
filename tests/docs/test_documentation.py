"""README, CONTRIBUTING and docs/: links, commands and examples in them are valid."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest
import typer
from typer.core import TyperGroup

from pipeline.cli.app import app
from pipeline.config.files import parse_yaml, resolve_job

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)

CODE_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
REPOSITORY_PATH = re.compile(r"(?<![\w/.-])(?:tests|jobs|docs|k8s|pipeline)/[\w./-]*\w")
MAX_README_LINES = 170


def code_blocks(page: Path, *languages: str) -> list[str]:
    return [block for language, block in CODE_BLOCK.findall(page.read_text()) if language in languages]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes from the page's headings."""
    headings = re.findall(r"^#+ (.+)$", CODE_BLOCK.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def shell_commands(page: Path) -> list[list[str]]:
    """The words of each `trainyard` command in the shell examples of a page, without comments."""
    text = "\n".join(code_blocks(page, "bash", "console")).replace("\\\n", " ")
    lines = re.findall(r"^(?:\$ )?(?:\w+=\S+ |\w+=\"[^\"]*\" )*trainyard (.*)$", text, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


@each_page
def test_every_relative_link_has_a_target(page: Path) -> None:
    for link in LINK.findall(CODE_BLOCK.sub("", page.read_text())):
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


@each_page
def test_every_path_in_the_repository_exists(page: Path) -> None:
    assert [path for path in REPOSITORY_PATH.findall(page.read_text()) if not (ROOT / path).exists()] == []


@each_page
def test_every_command_and_option_exists(page: Path) -> None:
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    for command, *words in shell_commands(page):
        assert command in group.commands, f"trainyard {command}"
        options = {name for parameter in group.commands[command].params for name in parameter.opts}
        options |= {name for parameter in group.commands[command].params for name in parameter.secondary_opts}
        used = {word.partition("=")[0] for word in words if word.startswith("-")}
        assert used <= options | {"--help"}, f"trainyard {command} {' '.join(words)}"


@each_page
def test_every_job_in_yaml_is_valid(page: Path) -> None:
    for block in code_blocks(page, "yaml"):
        resolve_job({"name": "example", **parse_yaml(block, page.name)})


@each_page
def test_every_python_example_parses(page: Path) -> None:
    for block in code_blocks(page, "python"):
        ast.parse(block)


def test_the_readme_is_one_page() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= MAX_README_LINES


def test_the_readme_links_to_every_page() -> None:
    readme = (ROOT / "README.md").read_text()
    assert [page.name for page in PAGES[1:] if f"{page.name})" not in readme] == []
