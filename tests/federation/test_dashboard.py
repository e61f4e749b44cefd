"""The Grafana dashboard asks for the metrics that exist, and for each of ours."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from perfedrec.federation.metrics import COORDINATOR, NODE, SERVICE

ROOT = Path(__file__).parents[2]
OF_PROCESSES = {"process_resident_memory_bytes", "process_cpu_seconds_total"}
OURS = {
    f"perfedrec_{role}_{name}": set(filter(None, labels.rstrip("}").split(",")))
    for role, texts in (("coordinator", COORDINATOR), ("node", NODE), ("service", SERVICE))
    for name, _, labels in (key.partition("{") for key in texts)
}
HISTOGRAM = "perfedrec_coordinator_round_seconds"


@pytest.fixture(scope="module")
def board() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "deploy" / "grafana-dashboard.json").read_text(encoding="utf-8"))
    return found


def questions(board: dict[str, Any]) -> list[tuple[str, str]]:
    """What the dashboard asks Prometheus, each with the legend of its answers."""
    return [(each["expr"], each["legendFormat"]) for panel in board["panels"] for each in panel.get("targets", ())]


def test_each_metric_exists_and_each_of_ours_is_shown(board: dict[str, Any]) -> None:
    asked = [expression for expression, _ in questions(board)]
    asked += [each["query"]["query"] for each in board["templating"]["list"] if each["type"] == "query"]
    named = {name for each in asked for name in re.findall(r"\b(?:perfedrec|process)_\w+", each)}
    assert named - {f"{HISTOGRAM}_bucket"} - OF_PROCESSES == OURS.keys() - {HISTOGRAM}
    assert f"{HISTOGRAM}_bucket" in named
    assert named >= OF_PROCESSES


def test_labels_are_those_of_the_metrics(board: dict[str, Any]) -> None:
    """Beside instance and job, which Prometheus adds."""
    for expression, legend in questions(board):
        metrics = re.findall(r"\bperfedrec_\w+", expression)
        known = {"instance", "job", "le"} | {label for each in metrics for label in OURS.get(each, ())}
        used = set(re.findall(r"{{(\w+)}}", legend))
        used |= {each.strip() for names in re.findall(r"by \(([^)]*)\)", expression) for each in names.split(",")}
        used |= set(re.findall(r"[{,](\w+)=~?\"", expression))
        assert used <= known, (expression, legend)


def test_counters_are_asked_for_their_growth_and_brackets_close(board: dict[str, Any]) -> None:
    for expression, _ in questions(board):
        for name in re.findall(r"\b(\w+_(?:total|bucket))\b", expression):
            restarts = name.endswith("superlink_restarts_total")
            assert restarts or re.search(rf"(?:rate|increase)\({name}[^\]]*\[\$__rate_interval\]\)", expression)
        assert [expression.count(each) for each in "({["] == [expression.count(each) for each in ")}]"]


def test_panels_are_told_apart_explained_and_do_not_overlap(board: dict[str, Any]) -> None:
    panels = board["panels"]
    assert len({each["id"] for each in panels}) == len({each["title"] for each in panels}) == len(panels)
    assert all(each.get("description") for each in panels if each["type"] != "row")
    for a, b in combinations([each["gridPos"] for each in panels], 2):
        beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        assert beside or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert max(a["x"] + a["w"], b["x"] + b["w"]) <= 24
    assert {each["datasource"]["uid"] for each in panels if each["type"] != "row"} == {"${datasource}"}


def test_the_alerts_that_it_names_are_in_the_documentation(board: dict[str, Any]) -> None:
    rules = set(re.findall(r"- alert: (\w+)", (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")))
    told = " ".join(each.get("description", "") for each in board["panels"])
    named = {
        each
        for listed in re.findall(r"Alerts? ((?:\w+(?:, | and )?)+)", told)
        for each in re.split(r", | and ", listed)
    }
    assert len(named) > 8
    assert named <= rules
