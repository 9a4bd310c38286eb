"""The page `docs/job-file.md` is the one that is generated from the fields of the job file."""

from __future__ import annotations

from pathlib import Path

from pipeline.config import JobConfig
from pipeline.config.files.reference import COMMAND, reference

PAGE = Path(__file__).parents[2] / "docs" / "job-file.md"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference(), f"run: {COMMAND}"


def test_every_key_has_documentation() -> None:
    schema = JobConfig.model_json_schema()
    kinds = {"Job": schema, **schema["$defs"]}
    fields = {f"{name}.{key}": field for name, kind in kinds.items() for key, field in kind["properties"].items()}
    assert len(fields) > 130
    assert [key for key, field in fields.items() if not field.get("description")] == []
    assert [name for name, kind in kinds.items() if not kind.get("description")] == []


def test_every_link_has_a_section() -> None:
    page = reference()
    headings = {
        line.lstrip("# ").replace("`", "").replace(".", "") for line in page.splitlines() if line.startswith("#")
    }
    anchors = {link.partition(")")[0] for link in page.split("](#")[1:]}
    assert len(anchors) > 15
    assert anchors <= headings
