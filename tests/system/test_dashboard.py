"""What Prometheus itself says of its configuration, the alerts and each expression of the dashboard."""

from __future__ import annotations

import contextlib
import json
import math
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from kafka import KafkaProducer

from recsys.testing.servers import Server, free_port
from tests.documents import exported
from tests.system.embedded import ITEMS, wait_for
from tests.system.services import ORDER, Services, scrape

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


UNMOVED = {
    "recsys_table_expired_rows_total",
    "recsys_skipped_batches_total",
    "recsys_errors_logged_total",
    "recsys_generation_failures_total",
    "recsys_unusable_vectors_total",
    "recsys_dead_units_ratio",
    "recsys_breaker_open",
    "recsys_model_held",
    "recsys_published_tombstones_total",
    "recsys_spool_bytes",
    "recsys_consumer_lag_records",
    "recsys_open_impressions",
}
"""What good traffic leaves at 0: nothing expired, failed, was logged as an error or waits."""

QUIET = {
    "recsys_users_left_total",
    "recsys_log_gaps_total",
    "recsys_damaged_records_total",
    "recsys_stuck_waits_total",
    "recsys_spool_wait_seconds",
    "recsys_feedback_notes_total",
    "recsys_not_counted_total",
    "recsys_catalogue_refused_total",
    "recsys_table_evicted_rows_total",
    "recsys_table_refused_keys_total",
    "recsys_time_ahead_total",
    "recsys_time_set_back_total",
    "recsys_step_failures_total",
    "recsys_deltas_ignored_total",
    "recsys_parameter_gaps_total",
}
"""What counts trouble or refusals, by labels that good traffic does not bring."""


def traffic(system: Services, kafka: Server) -> None:
    """A little of everything: answers whole and degraded, feedback good, repeated and bad, labels, a checkpoint, a snapshot."""
    system.call("PUT", "/v1/items", {"items": ITEMS})
    system.click(*({"user_id": "d", "item_id": f"item-{n}"} for n in range(40)))
    wait_for(lambda: len(ask(system)["items"]) == 10, "lists")
    wait_for(lambda: ask(system) and has_explored(system), "an item that has an edge", 60.0)
    answers = [ask(system) for _ in range(10)]
    for kind in ("click", "like"):
        clicks = [
            {"user_id": "d", "item_id": answer["items"][n]["item_id"], "request_id": answer["request_id"], "type": kind}
            for answer in answers
            for n in (0, 3)
        ]
        repeated = [click | {"event_id": f"d-{kind}-{n}"} for n, click in enumerate(clicks)]
        system.click(*repeated, {"user_id": "d"})
        system.click(*repeated)
    producer = KafkaProducer(bootstrap_servers=f"127.0.0.1:{kafka.port}", acks="all")
    producer.send(system.loaded.log.topic_prefix + "feedback", key=b"d", value=b"not json")
    producer.close()
    degraded_for_a_while(system)
    wait_for(lambda: system.samples("trainer", "recsys_examples_total").get(("1", "like")), "the labels", 60.0)


def ask(system: Services) -> dict[str, Any]:
    return system.call("POST", "/v1/recommend", {"user_id": "d", "n": 10})


def has_explored(system: Services) -> bool:
    """Whether an answer had an item with an edge of the bandit: there is a generation then, and a cluster."""
    return sum(system.samples("ranking", "recsys_bandit_shown_total").values()) > 0


def degraded_for_a_while(system: Services) -> None:
    system.kill("parameter")
    assert ask(system)["degraded"] == ["no_parameters"]
    system.spawn("parameter")
    system.wait_ready("parameter")
    wait_for(lambda: not ask(system)["degraded"], "answers that are not degraded")


@contextlib.contextmanager
def prometheus(system: Services, folder: Path) -> Iterator[httpx.Client]:
    """A Prometheus with our configuration that finds the services at their ports here, and looks each second."""
    settings = yaml.safe_load((ROOT / "deploy" / "prometheus.yml").read_text(encoding="utf-8"))
    settings["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    settings["rule_files"] = [str(ROOT / "deploy" / name) for name in settings["rule_files"]]
    for scraping in settings["scrape_configs"]:
        scraping["static_configs"] = [{"targets": [f"127.0.0.1:{system.ports[scraping['job_name']]}"]}]
    file, port = folder / "prometheus.yml", free_port()
    file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    flags = f"--config.file={file}", f"--storage.tsdb.path={folder / 'tsdb'}", f"--web.listen-address=127.0.0.1:{port}"
    with (folder / "prometheus.txt").open("wb") as out:
        server = subprocess.Popen(["prometheus", *flags], stdout=out, stderr=out)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10.0) as client:
            yield client
    finally:
        server.terminate()
        server.wait(30)


def query(client: httpx.Client, expr: str) -> list[dict[str, Any]]:
    """The samples of an instant query; an error fails."""
    answer = client.get("/api/v1/query", params={"query": expr}).json()
    assert answer["status"] == "success", f"{expr}: {answer}"
    found: list[dict[str, Any]] = answer["data"]["result"]
    return found


def all_up(client: httpx.Client) -> bool:
    with contextlib.suppress(httpx.TransportError):
        if client.get("/-/ready").status_code == 200:
            return Counter(sample["metric"]["job"] for sample in query(client, "up == 1")) == Counter(ORDER)
    return False


def has_values(client: httpx.Client, expr: str) -> bool:
    """Whether the panel would draw something."""
    return any(not math.isnan(float(sample["value"][1])) for sample in query(client, expr))


@pytest.mark.system
def test_each_panel_draws_what_running_services_export(deployed: Services, kafka: Server, tmp_path: Path) -> None:
    with prometheus(deployed, tmp_path) as client:
        wait_for(lambda: all_up(client), "three scraped services", 60.0)
        traffic(deployed, kafka)
        with contextlib.suppress(AssertionError):  # the next line says which did not
            wait_for(lambda: not unmoved(deployed), "every metric moved", 60.0)
        assert unmoved(deployed) == []
        seen = {name for service in ORDER for name, _, _ in scrape(deployed.url(service))}
        # Rates over five minutes: a slow machine may need more than one for all of this.
        for title, expr in expressions(json.loads(DASHBOARD.read_text(encoding="utf-8")), "5m"):
            assert set(re.findall(r"\b(?:recsys|process)_\w+", expr)) <= seen, title
            wait_for(lambda expr=expr: has_values(client, expr), f"{title!r}, {expr}", 30.0)
        alerts = client.get("/api/v1/rules").json()["data"]["groups"]
        assert alerts and all(rule["health"] == "ok" for group in alerts for rule in group["rules"])


def unmoved(system: Services) -> list[str]:
    """Metrics that have no sample but 0; services tell of some of theirs once a second, so the first look may be too early."""
    samples = [sample for service in ORDER for sample in scrape(system.url(service))]
    found = []
    for name, metric in exported().items():
        if name in QUIET or name.endswith("_full_ratio"):
            continue  # how full something is may round to nothing
        series = name + "_count" if metric._type == "histogram" else name
        values = [value for seen, _, value in samples if seen == series]
        assert values, f"{name} has no sample"
        if name not in UNMOVED and not any(values):
            found.append(name)
    return found
