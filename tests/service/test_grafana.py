from __future__ import annotations

import json
import re
from pathlib import Path

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
