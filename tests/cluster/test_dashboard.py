"""The Grafana dashboard queries exactly the metrics that Trainyard exports, and has the format that Grafana imports."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pipeline.cluster.prometheus import COUNTERS, GAUGES, LABELS

DASHBOARD = Path(__file__).parents[2] / "k8s" / "grafana" / "trainyard.json"
EXPORTED = {f"ray_{name}" for name in (*GAUGES, *(f"{name}_total" for name in COUNTERS))}
"""`test_two_workers_match_one_process_and_export_metrics` finds them on a real node."""


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    tree: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return tree


def panel_expressions(dashboard: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def test_every_metric_has_a_panel_and_every_panel_has_metrics(dashboard: dict[str, Any]) -> None:
    queried = {name for text in panel_expressions(dashboard) for name in re.findall(r"ray_\w+", text)}
    assert queried == EXPORTED
    for text in panel_expressions(dashboard):
        by = re.findall(r"by \(([^)]*)\)", text)
        labels = set(re.findall(r"(\w+)=", text)) | {label.strip() for group in by for label in group.split(",")}
        assert labels <= set(LABELS), text
        assert 'run=~"$run"' in text, "only the selected runs"
        assert ("rate(" in text) == ("rate_interval" in text)
        assert text.count("(") == text.count(")")


def test_dashboard_is_importable_by_grafana(dashboard: dict[str, Any]) -> None:
    assert dashboard["title"] == "Trainyard"
    assert dashboard["id"] is None, "Grafana assigns the id; the next import finds the dashboard by its uid"
    assert re.fullmatch(r"[a-z-]{1,40}", dashboard["uid"])
    assert dashboard["schemaVersion"] >= 36
    source, run = dashboard["templating"]["list"]
    assert (source["name"], source["type"], source["query"]) == ("datasource", "datasource", "prometheus")
    assert (run["name"], run["type"], run["multi"], run["includeAll"]) == ("run", "query", True, True)
    assert run["query"]["query"] in (f"label_values({name}, run)" for name in EXPORTED)
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken_cells: set[tuple[int, int]] = set()
    for panel in panels:
        assert panel["type"] in {required["id"] for required in dashboard["__requires"] if required["type"] == "panel"}
        assert panel["title"]
        assert panel["description"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert all(target["datasource"] == panel["datasource"] for target in panel["targets"])
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        grid_position = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(grid_position["x"], grid_position["x"] + grid_position["w"])
            for y in range(grid_position["y"], grid_position["y"] + grid_position["h"])
        }
        assert not cells & taken_cells, f"{panel['title']} overlaps another panel"
        assert grid_position["x"] + grid_position["w"] <= 24
        taken_cells |= cells
