"""What Prometheus itself says of its configuration, the alerts and each expression of the dashboard."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "recsys.json"


def expressions(dashboard: dict[str, Any], rate_interval: str = "1m") -> Iterator[tuple[str, str]]:
    """(panel title, PromQL) of each query, with Grafana's one variable filled in."""
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"].replace("$__rate_interval", rate_interval)


def promtool(*arguments: str | Path) -> None:
    done = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.system
def test_prometheus_accepts_its_configuration_and_the_alerts() -> None:
    promtool("check", "config", ROOT / "deploy" / "prometheus.yml")


@pytest.mark.system
def test_prometheus_parses_each_expression(tmp_path: Path) -> None:
    queries = list(expressions(json.loads(DASHBOARD.read_text(encoding="utf-8"))))
    assert len(queries) >= 30
    rules = [{"record": f"panel:{number}", "expr": expr} for number, (_, expr) in enumerate(queries)]
    file = tmp_path / "rules.yml"
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}), encoding="utf-8")
    promtool("check", "rules", file)


@pytest.mark.system
def test_alerts_fire_on_the_series_that_they_watch() -> None:
    promtool("test", "rules", ROOT / "tests" / "system" / "alerts_test.yml")
