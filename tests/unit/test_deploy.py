"""deploy/ and docker-compose.yml agree with the published schemas, the configuration, the metrics and the runbook."""

from __future__ import annotations

import json
import re
import typing
from collections.abc import Iterator
from enum import Enum
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from pydantic import ConfigDict, TypeAdapter

from recsys import config, metrics
from tests.documents import ROOT, exported
from tests.system.test_dashboard import DASHBOARD, expressions

DEPLOY = ROOT / "deploy"
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
ALERTS = [rule for group in yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"] for rule in group["rules"]]
BOARD = json.loads(DASHBOARD.read_text(encoding="utf-8"))
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
OURS = ("ranking", "trainer", "parameter")
SCRAPED = {"job", "instance", "le"}


def settings(service: str) -> config.Config:
    return config.load(DEPLOY / "configs" / "kafka.toml", COMPOSE["services"][service]["environment"])


def series() -> dict[str, set[str]]:
    """Exported series name → its labels."""
    found = {name: set[str]() for name in re.findall(r"^# TYPE (process_\S+)", metrics.render().decode(), re.M)}
    for name, metric in exported().items():
        suffixes = ("_bucket", "_sum", "_count") if metric._type == "histogram" else ("",)
        found |= {name + suffix: set(metric._labelnames) for suffix in suffixes}
    return found


def queried(expr: str) -> set[str]:
    named = [re.compile(pattern) for pattern in re.findall(r'__name__=~"([^"]*)"', expr)]
    matched = {name for name in series() if any(pattern.fullmatch(name) for pattern in named)}
    return matched or set(re.findall(r"\b(?:recsys|process)_\w+", expr))


def test_compose_file_fits_the_published_schema() -> None:
    schema = json.loads((files("check_jsonschema") / "builtin_schemas" / "vendor" / "compose-spec.json").read_text())
    jsonschema.validate(COMPOSE, schema)


def test_compose_names_only_services_and_volumes_that_it_has() -> None:
    for service in COMPOSE["services"].values():
        assert set(service.get("depends_on", ())) <= COMPOSE["services"].keys()
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert (ROOT / source).exists() if source.startswith("./") else source in COMPOSE["volumes"]


@pytest.mark.parametrize("name", OURS)
def test_compose_runs_the_service_on_kafka_and_redis(name: str) -> None:
    assert COMPOSE["services"][name]["command"] == ["serve", name, "--config", "/etc/recsys/kafka.toml"]
    chosen = settings(name)
    assert (chosen.log.kind, chosen.log.bootstrap_servers) == ("kafka", "kafka:9092")
    assert (chosen.state.kind, chosen.state.url) == ("redis", "redis://redis:6379/0")
    assert chosen.ranking.host == "0.0.0.0"


def test_services_of_compose_meet_at_the_same_ports() -> None:
    ports = {
        "ranking": settings("ranking").ranking.port,
        "parameter": settings("parameter").parameter.metrics_port,
        "trainer": settings("trainer").trainer.metrics_port,
    }
    scrapes = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]
    targets = {scrape["job_name"]: scrape["static_configs"][0]["targets"] for scrape in scrapes}
    assert targets == {name: [f"{name}:{port}"] for name, port in ports.items()}
    for name, port in ports.items():
        assert f"http://127.0.0.1:{port}/readyz" in COMPOSE["services"][name]["healthcheck"]["test"][-1]
    assert settings("ranking").parameter_address == "parameter:7000"
    assert settings("parameter").parameter_address == "0.0.0.0:7000"


def test_default_configuration_file_holds_the_defaults() -> None:
    assert config.load(DEPLOY / "configs" / "default.toml", {}) == config.Config()


def test_kafka_configuration_differs_only_in_log_and_state() -> None:
    chosen = config.load(DEPLOY / "configs" / "kafka.toml", {})
    plain = config.Config()
    assert chosen.model_copy(update={"log": plain.log, "state": plain.state}) == plain


def test_the_runbook_says_of_each_thing_with_a_bound_what_happens_at_it() -> None:
    text = (ROOT / "docs" / "runbook.md").read_text(encoding="utf-8")
    section = text.split("## NearlyFull")[1].split("\n## ")[0]
    bounded = {m.removeprefix("recsys_").removesuffix("_full_ratio") for m in series() if m.endswith("_full_ratio")}
    assert bounded == set(re.findall(r"^\* \*\*(\w+)\*\*", section, re.M)) and "table" in bounded


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_alert_watches_exported_metrics_and_has_a_runbook_entry(alert: dict[str, Any]) -> None:
    assert queried(alert["expr"]) <= series().keys()
    assert queried(alert["expr"]) or alert["expr"].startswith("up{")
    headings = re.findall(r"^## (\w+)$", (ROOT / "docs" / "runbook.md").read_text(encoding="utf-8"), re.M)
    assert alert["alert"] in headings
    assert alert["annotations"]["runbook"] == f"docs/runbook.md#{alert['alert'].lower()}"


def test_runbook_has_no_alert_that_does_not_exist() -> None:
    headings = re.findall(r"^## ([A-Z]\w+)$", (ROOT / "docs" / "runbook.md").read_text(encoding="utf-8"), re.M)
    assert headings == [alert["alert"] for alert in ALERTS]


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_panel_queries_exported_metrics_by_their_labels(panel: dict[str, Any]) -> None:
    assert panel["targets"]
    known = series()
    for target in panel["targets"]:
        names = queried(target["expr"])
        assert names and names <= known.keys()
        labels = set().union(*(known[name] for name in names)) | SCRAPED
        grouped = {label for by in re.findall(r"\bby \(([^)]*)\)", target["expr"]) for label in by.split(", ")}
        assert grouped <= labels
        shown = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
        assert shown <= (grouped - {"le"} if grouped else labels)


def test_panels_have_their_own_place_and_number() -> None:
    cells: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        taken = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not taken & cells, panel["title"]
        cells |= taken
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])
    assert len(list(expressions(BOARD))) == sum(len(panel["targets"]) for panel in PANELS)


def test_dashboard_fits_grafanas_published_types() -> None:
    """Grafana's own classes, made from its schema, read every key (what they do not know they drop) with the right type."""
    register_default_plugins()
    board = Dashboard.from_json(BOARD)
    assert list(dropped(BOARD, json.loads(JSONEncoder().encode(board)), "dashboard")) == []
    assert list(mistyped(board, "dashboard")) == []
    assert BOARD["schemaVersion"] == Dashboard().schema_version
    grafana = version("grafana-foundation-sdk").split("!")[1]
    assert COMPOSE["services"]["grafana"]["image"] == f"grafana/grafana:{grafana}"


def dropped(ours: Any, theirs: Any, path: str) -> Iterator[str]:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key, value in ours.items():
            yield from dropped(value, theirs.get(key), f"{path}.{key}")
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            yield from dropped(one, other, f"{path}[{number}]")
    elif ours != theirs:
        yield f"{path}: {ours!r} became {theirs!r}"


def mistyped(value: Any, path: str) -> Iterator[str]:
    if isinstance(value, list):
        for number, one in enumerate(value):
            yield from mistyped(one, f"{path}[{number}]")
    elif type(value).__module__.startswith("grafana_foundation_sdk.models") and not isinstance(value, Enum):
        for name, hint in typing.get_type_hints(type(value)).items():
            inner = getattr(value, name)
            try:
                TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(plain(inner))
            except ValueError as error:
                yield f"{path}.{name}: {error}"
            yield from mistyped(inner, f"{path}.{name}")


def plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value


def test_grafana_finds_its_data_source_and_dashboard() -> None:
    provisioning = DEPLOY / "grafana" / "provisioning"
    source = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"][0]
    assert {panel["datasource"]["uid"] for panel in PANELS} == {source["uid"]}
    assert source["url"] == "http://prometheus:9090"
    provider = yaml.safe_load((provisioning / "dashboards" / "recsys.yml").read_text())["providers"][0]
    grafana = COMPOSE["services"]["grafana"]
    assert f"./deploy/grafana/dashboards:{provider['options']['path']}:ro" in grafana["volumes"]
    home = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert Path(home) == Path(provider["options"]["path"]) / DASHBOARD.name
