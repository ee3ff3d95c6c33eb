"""What the replays of `quality.toml` come to: the judged figures, the tables of docs/quality.md, the curve.

`python -m load_tests.quality` reads load_tests/results/quality/, writes load_tests/results/quality.json, docs/quality.md's tables
and docs/quality_sync.svg. It runs nothing: `recsys experiment run load_tests/quality.toml` does.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from statistics import mean
from typing import Any

from load_tests.chart import line_chart
from load_tests.common import RESULTS, ROOT, Figure, read_budgets

FOLDER = RESULTS / "quality"
DOCUMENT = ROOT / "docs" / "quality.md"
TASKS = ("click", "long_view", "like")
PARTS = {
    "counters": "streaming counters",
    "crosses": "crosses",
    "wide": "the wide part's learning",
    "history": "more than the newest event of the history (DIN)",
    "home_parts": "HoME's normalisation, hierarchy, feature gate and self gate",
}
SYNC_S = (18_000, 1_800, 60, 0)


def results() -> dict[str, dict[str, Any]]:
    """Each run's result by its name."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.json"))}


def seeds(runs: dict[str, dict[str, Any]], prefix: str, task: str, metric: str) -> float | None:
    """The mean over the runs of a prefix."""
    values = [run["tasks"][task][metric] for name, run in runs.items() if name.startswith(prefix)]
    return mean(values) if values else None


def figures(runs: dict[str, dict[str, Any]]) -> dict[str, float | None]:
    """The judged figures."""
    found: dict[str, float | None] = {}
    for task in TASKS:
        found[f"kuairand_{task}_auc"] = seeds(runs, "kuairand_online_", task, "auc")
        found[f"kuairand_{task}_ne"] = seeds(runs, "kuairand_online_", task, "normalized_entropy")
        found[f"kuairand_{task}_gauc"] = seeds(runs, "kuairand_frozen_", task, "gauc")
    for delay in (0, 60):
        shown = runs.get(f"globo_delay_{delay}", {}).get("next_item", {})
        found[f"globo_delay_{delay}_hit_rate_at_20"] = shown.get("hit_rate_at_20")
        found[f"globo_delay_{delay}_mrr_at_20"] = shown.get("mrr_at_20")
    return found


def report(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The judged figures against their budgets."""
    values = figures(runs)
    rows = [Figure(name=n, **budget).row(values[n]) for n, budget in read_budgets()["quality"].items()]
    commits = sorted({run["commit"] for run in runs.values()})
    machines = sorted({run["hardware"] for run in runs.values()})
    return {"commit": commits, "hardware": machines, "seed": [0, 1, 2], "results": rows}


def judged(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A table of the judged figures."""
    lines = ["| figure | measured | at least | met |", "| --- | --- | --- | --- |"]
    for row in rows:
        value = "not measured" if row["value"] is None else f"{row['value']:.4f}"
        bound = f"{'≤' if row['better'] == 'lower' else '≥'} {row['budget']:.3f}"
        lines.append(f"| `{row['name']}` | {value} | {bound} | {'yes' if row['met'] else '**no**'} |")
    return lines


def ablation(runs: dict[str, dict[str, Any]]) -> list[str]:
    """What each part brings, seed 0: AUC with its 95% interval."""
    lines = ["| without | " + " | ".join(f"{task} AUC / NE" for task in TASKS) + " |", "| --- | --- | --- | --- |"]
    for name, title in {"": "(everything in)", **PARTS}.items():
        run = runs.get(f"kuairand_without_{name}" if name else "kuairand_online_0")
        if run is None:
            continue
        cells = []
        for task in TASKS:
            t = run["tasks"][task]
            low, high = t["auc_ci"]
            cells.append(f"{t['auc']:.4f} [{low:.4f}, {high:.4f}] / {t['normalized_entropy']:.4f}")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def sync_series(runs: dict[str, dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """AUC by age of what scoring knows; at once is drawn at a second."""
    series: dict[str, list[tuple[float, float]]] = {}
    for task in TASKS:
        points = []
        for interval in SYNC_S:
            run = runs.get(f"kuairand_sync_{interval}" if interval else "kuairand_online_0")
            if run is not None:
                points.append((float(max(interval, 1)), run["tasks"][task]["auc"]))
        series[task] = points
    return series


def sync_table(runs: dict[str, dict[str, Any]]) -> list[str]:
    """The curve as a table."""
    lines = ["| what scoring knows is at most … old | " + " | ".join(TASKS) + " |", "| --- | --- | --- | --- |"]
    names = {18_000: "5 h", 1_800: "30 min", 60: "60 s", 0: "nothing (at once)"}
    for interval in SYNC_S:
        run = runs.get(f"kuairand_sync_{interval}" if interval else "kuairand_online_0")
        if run is not None:
            cells = " | ".join(f"{run['tasks'][task]['auc']:.4f}" for task in TASKS)
            lines.append(f"| {names[interval]} | {cells} |")
    return lines


def written(text: str, tables: dict[str, list[str]]) -> str:
    """The document with its tables anew: each between `<!-- NAME -->` and `<!-- end -->`."""
    for name, lines in tables.items():
        head, mark, rest = text.partition(f"<!-- {name} -->\n")
        if not mark:
            raise ValueError(f"{DOCUMENT} has no <!-- {name} -->")
        text = head + mark + "\n".join(lines) + "\n" + rest[rest.index("<!-- end -->") :]
    return text


def main() -> int:
    runs = results()
    result = report(runs)
    (RESULTS / "quality.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    tables = {"judged": judged(result["results"]), "ablation": ablation(runs), "sync": sync_table(runs)}
    DOCUMENT.write_text(written(DOCUMENT.read_text(encoding="utf-8"), tables), encoding="utf-8")
    chart = line_chart("KuaiRand, days 5-8: AUC by the age of what scoring knows", "seconds", "AUC", sync_series(runs))
    (ROOT / "docs" / "quality_sync.svg").write_text(chart, encoding="utf-8")
    print("\n".join(tables["judged"]))
    return 0 if all(row["met"] for row in result["results"]) else 1


if __name__ == "__main__":
    sys.exit(main())
