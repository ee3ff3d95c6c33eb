"""docs/performance.md, made of saved results and `steps.toml`: `python -m tests.documents`."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping
from typing import Any

from load_tests.common import RESULTS, ROOT, Figure, read_budgets

STEPS = ROOT / "load_tests" / "steps.toml"
FIGURES = {
    "serve": ("request_cpu", "recommend_p50", "recommend_p99", "event_cpu", "idle_cpu"),
    "knee": ("knee_one",),
}
HEAD = """# Where the milliseconds of a request go

Made by `python -m tests.documents` of `load_tests/results/` and `load_tests/steps.toml`: change those.

| command | what it tells |
|---|---|
| `python -m load_tests.serve --json --save` | CPU of a request and an event, latency, freshness, at one rate |
| `python -m load_tests.knee --json --save` | the rate at which p99 passes 100 ms |
| `python -m load_tests.profile --json --save` | the tables and the flame graph below; needs py-spy and the right to trace processes |
| `python -m load_tests.versus --old ../before --json` | what changed since another commit, both systems in turns on one machine |

CPU and memory are sums over the supervisor and all that it and its descendants started, each once, ended ones included
(`load_tests/processes.py`). A request's CPU has its share of training, of the log and of the consumers.
"""


def document() -> str:
    """The whole page."""
    steps = tomllib.loads(STEPS.read_text(encoding="utf-8"))
    parts = [HEAD, "## Against the budgets\n", *_table(("figure", "measured, scaled", "budget", "met"), _judged())]
    parts += ["\n## Where it goes\n", *_profile()]
    parts += [
        "\n## What each step brought\n",
        *_table(("step", "commit", "figure", "before", "after", "by"), _steps(steps)),
    ]
    parts += ["\n## Tried in vain\n", *_table(("what", "brought"), ((v["what"], v["found"]) for v in steps["vain"]))]
    return "\n".join(parts) + "\n"


def _table(names: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    names = list(names)
    return [f"| {' | '.join(row)} |" for row in (names, ["---"] * len(names), *rows)]


def _results(test: str) -> dict[str, Any]:
    path = RESULTS / f"{test}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _judged() -> Iterable[list[str]]:
    for test, names in FIGURES.items():
        values = {row["name"]: row["value"] for row in _results(test).get("results", ())}
        for name in names:
            figure = Figure(name=name, **read_budgets()[test][name])
            value, sign = values.get(name), "≤" if figure.better == "lower" else "≥"
            said = "not measured yet" if value is None else f"{value:.3g} {figure.unit}"
            yield [f"`{name}`", said, f"{sign} {figure.budget:g}", "yes" if figure.met(value) else "**no**"]


def _profile() -> list[str]:
    found = _results("profile")
    if not found:
        return ["Not measured yet."]
    load, values = found["load"], {row["name"]: row["value"] for row in found["results"]}
    total = values["request"]
    return [
        f"{load['items']:,} items, {load['rate']:g} requests/s, {load['events']:g} events/s; {found['hardware']['cpu']}, commit "
        f"{(found['commit'] or '?')[:7]}; a machine at {found['calibration']['slowness']:.2f} × the reference's time. CPU ms as measured that one "
        f"request adds: **{total:.1f}**, "
        + ", ".join(f"{n.removeprefix('request_')} {ms:.1f}" for n, ms in values.items() if n.startswith("request_"))
        + ". Below 0 is noise.\n",
        *_table(("process", "thread", "ms", "share"), _rows(values, 1, total)),
        "\nBy the module in which a thread was, libraries and compiled calls under the module that called them:\n",
        *_table(("process", "thread", "module", "ms", "share"), _rows(values, 2, total)),
        f"\nAll else: {values['all else']:.2f} ms.\n",
        "![flame graph](performance_flame.svg)\n",
        "The flame graph is of all processes while requests and events come; a frame's tooltip tells its share.",
    ]


def _rows(values: Mapping[str, float], depth: int, total: float) -> Iterable[list[str]]:
    for name, ms in values.items():
        if name.count(" | ") == depth:
            yield [*name.split(" | "), f"{ms:.2f}", f"{ms / total:.0%}" if total > 0 else ""]


def _steps(steps: Mapping[str, Any]) -> Iterable[list[str]]:
    for step in steps["steps"]:
        yield [step["what"], step["commit"], *(step.get(name, "") for name in ("figure", "was", "now", "by"))]
