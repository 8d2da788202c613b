from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml
from api_client import Service, demo
from prometheus_client.parser import text_string_to_metric_families

GRAFANA = Path(__file__).resolve().parents[2] / "service" / "grafana"
TARGET_LABELS = {"job", "instance"}
"""Labels that Prometheus adds."""
ROOT = Path(__file__).resolve().parents[2]


def test_the_dashboard_asks_for_the_metrics_that_runs_have() -> None:
    dashboard = json.loads((ROOT / "service" / "grafana" / "moedisco.json").read_text(encoding="utf-8"))
    asked = {
        name
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in re.findall(r"ray_(moedisco_\w+)", target["expr"])
    }
    gauges = (ROOT / "moedisco_ray" / "execution" / "ray" / "monitoring.py").read_text(encoding="utf-8")
    kept = set(re.findall(r'Gauge\("(moedisco_\w+)"', gauges))
    assert asked == kept


def dashboard_queries() -> list[str]:
    dashboard = json.loads((GRAFANA / "service.json").read_text(encoding="utf-8"))
    variables = [variable["query"] for variable in dashboard["templating"]["list"] if variable["type"] == "query"]
    return [*variables, *(target["expr"] for panel in dashboard["panels"] for target in panel["targets"])]


def alert_rules() -> list[dict[str, object]]:
    document = yaml.safe_load((GRAFANA / "alerts.yaml").read_text(encoding="utf-8"))
    return [rule for group in document["groups"] for rule in group["rules"]]


@pytest.fixture(scope="module")
def exported(shared: Service) -> Mapping[str, set[str]]:
    """Labels of each metric that a service in use exports."""
    shared.ann.post("/v1/estimates", json={"config": demo()})
    context = shared.app.state.context
    context.prometheus.messages.labels("accepted").inc()
    context.prometheus.closed.labels("idle").inc()
    context.prometheus.loops.labels("reconciler").set(1)
    found: dict[str, set[str]] = defaultdict(set)
    for family in text_string_to_metric_families(shared.anonymous.get("/metrics").text):
        for sample in family.samples:
            found[sample.name] |= sample.labels.keys()
    return found


def test_every_query_about_the_service_is_about_metrics_and_labels_that_it_exports(
    exported: Mapping[str, set[str]],
) -> None:
    queries = [*dashboard_queries(), *(str(rule["expr"]) for rule in alert_rules())]
    assert len(queries) > 25
    for query in queries:
        assert query.count("(") == query.count(")")
        names = set(re.findall(r"moedisco_\w+", query))
        assert names
        assert names <= exported.keys(), query
        known = TARGET_LABELS.union(*(exported[name] for name in names))
        for group in re.findall(r"by \(([^)]*)\)", query):
            assert {word.strip() for word in group.split(",")} <= known, query
        for name, selector in re.findall(r"(moedisco_\w+)\{([^}]*)\}", query):
            assert set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector)) <= exported[name] | TARGET_LABELS, query


def test_legends_and_summaries_name_labels_that_their_queries_keep() -> None:
    dashboard = json.loads((GRAFANA / "service.json").read_text(encoding="utf-8"))
    shown = [(target["expr"], target["legendFormat"]) for panel in dashboard["panels"] for target in panel["targets"]]
    shown += [(rule["expr"], json.dumps(rule["annotations"])) for rule in alert_rules()]
    for query, text in shown:
        kept = {word.strip() for group in re.findall(r"by \(([^)]*)\)", query) for word in group.split(",")}
        named = set(re.findall(r"\{\{\s*(?:\$labels\.)?(\w+)\s*\}\}", text)) - {"value"}
        assert named <= (kept or TARGET_LABELS), query


def test_the_panels_show_every_metric_of_the_service(exported: Mapping[str, set[str]]) -> None:
    ends = r"_(total|bucket|count|sum|created)$"
    asked = {re.sub(ends, "", name) for query in dashboard_queries() for name in re.findall(r"moedisco_\w+", query)}
    assert {re.sub(ends, "", name) for name in exported} == asked


def test_alerts_have_what_prometheus_needs() -> None:
    for rule in alert_rules():
        assert rule.keys() <= {"alert", "expr", "for", "labels", "annotations"}
        assert re.fullmatch(r"\d+[smh]", str(rule.get("for", "0s")))
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"].keys() == {"summary", "description"}
