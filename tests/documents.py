"""Files made from the code: `python -m tests.documents` writes them, a test holds them to it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from prometheus_client.metrics import MetricWrapperBase
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from load_tests.performance import document
from recsys import metrics
from recsys.config import Config, TaskConfig

ROOT = Path(__file__).resolve().parents[1]


def options(model: type[BaseModel] = Config, path: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Each option's full name and field; sections are gone into, a list of tables stands for each of its entries."""
    for name, field in model.model_fields.items():
        listed = (kind for kind in get_args(field.annotation) if isinstance(kind, type) and issubclass(kind, BaseModel))
        nested = next(listed, field.annotation)
        if isinstance(nested, type) and issubclass(nested, BaseModel):
            yield from options(nested, f"{path}{name}.")
        else:
            yield path + name, field


def option_list() -> str:
    """One option a line."""
    return "".join(f"{name}\n" for name, _ in options())


def default_toml() -> str:
    """Every option with its default and what it means."""
    plain = Config().model_dump(mode="json")
    lines = [
        "# Every option with its default. `recsys config check --config FILE` names what a file gets wrong.",
        '# A file needs only what differs. It may begin with `extends = "other.toml"`: its tables are then laid over that file\'s.',
        "",
    ]
    for name, field in Config.model_fields.items():
        if not isinstance(plain[name], dict) and name != "tasks":
            lines += _option(name, plain[name], field)
    for name, field in Config.model_fields.items():
        if isinstance(plain[name], dict):
            lines += _section(f"[{name}]", plain[name], field.annotation)
    for task in plain["tasks"]:
        lines += _section("[[tasks]]", task, TaskConfig)
    return "\n".join(lines) + "\n"


def _section(header: str, values: dict[str, Any], model: Any) -> list[str]:
    lines = ["", f"# {' '.join(model.__doc__.split())}", header]
    for name, field in model.model_fields.items():
        lines += _option(name, values[name], field)
    return lines


def _option(name: str, value: Any, field: FieldInfo) -> list[str]:
    description = f"# {' '.join((field.description or '').split())}"
    return [description, f"# {name} is not set" if value is None else f"{name} = {_toml(value)}"]


def _toml(value: Any) -> str:
    """JSON's strings, numbers, booleans and arrays are TOML's; a table is not."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(one)}" for key, one in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def exported() -> dict[str, MetricWrapperBase]:
    """The metrics of recsys/metrics.py by exported name, in the order of that file."""
    found = (value for value in vars(metrics).values() if isinstance(value, MetricWrapperBase))
    return {metric._name + ("_total" if metric._type == "counter" else ""): metric for metric in found}


def metrics_table() -> str:
    """docs/metrics.md."""
    lines = [
        "# Metrics",
        "",
        "Made from `recsys/metrics.py` by `python -m tests.documents`. Each process exports all of them at `/metrics`",
        "(ranking: the API's port; parameter and trainer: `metrics_port`); what a process does not do stays 0 or empty.",
        "Beside them stand the `process_*` metrics of prometheus-client: memory, CPU seconds, open files.",
        "",
        "| name | type | labels | meaning |",
        "|---|---|---|---|",
    ]
    for name, metric in exported().items():
        labels = ", ".join(f"`{label}`" for label in metric._labelnames)
        lines.append(f"| `{name}` | {metric._type} | {labels} | {metric._documentation} |")
    return "\n".join(lines) + "\n"


DOCUMENTS = {
    "tests/config_options.txt": option_list,
    "deploy/configs/default.toml": default_toml,
    "docs/metrics.md": metrics_table,
    "docs/performance.md": document,
}

if __name__ == "__main__":
    for path, text in DOCUMENTS.items():
        (ROOT / path).write_text(text(), encoding="utf-8")
