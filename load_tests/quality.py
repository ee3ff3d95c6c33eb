"""What the replays of `quality.toml` come to: the judged figures, the tables of docs/quality.md, the curve.

`python -m load_tests.quality` reads load_tests/results/quality/, writes load_tests/results/quality.json, docs/quality.md's tables
and docs/quality_*.svg. It runs nothing: `recsys experiment run load_tests/quality.toml` does.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from statistics import mean
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from load_tests.chart import line_chart
from load_tests.common import RESULTS, ROOT, Figure, read_budgets
from recsys.evaluation.measures import differences

FOLDER = RESULTS / "quality"
DOCUMENT = ROOT / "docs" / "quality.md"
TASKS = ("click", "long_view", "like")
CHOICES = {
    "kuairand_dev_calibrate": "+ calibrator",
    "kuairand_dev_error_memory": "+ ReLoop2's error memory, .3",
    "kuairand_dev_without_norm": "- HoME's expert normalisation",
    "kuairand_dev_without_hierarchy": "- HoME's hierarchy mask",
    "kuairand_dev_without_feature_gate": "- HoME's feature gate",
    "kuairand_dev_without_self_gate": "- HoME's self gate",
    "kuairand_dev_without_home_parts": "- all four",
    "kuairand_dev_without_attention": "- DIN's attention: the mean of the history",
    "kuairand_dev_prelu": "PReLU for Dice",
    "kuairand_dev_softmax": "attention weights that sum to 1",
    "kuairand_dev_published": "published sizes: attention 80-40, expert layers 128-64",
    "kuairand_dev_rates_half": "all learning rates halved",
    "kuairand_dev_rates_double": "all learning rates doubled",
}
GLOBO_CHOICES = {
    "": "(as configured)",
    "without_attention": "- DIN's attention: the mean of the history",
    "light": "the network ranks the wide part's best 200 of 500",
    "nearest": "towers alone: the source `nearest`, in its own order",
    "nearest_hubness_2": "… with hubness 2",
    "nearest_hubness_10": "… with hubness 10",
    "nearest_interests": "… with 3 interests",
}
PARTS = {
    "kuairand_without_counters": "- streaming counters",
    "kuairand_without_crosses": "- crosses",
    "kuairand_without_wide": "- the wide part's learning",
    "kuairand_without_attention": "- DIN's attention: the mean of the history",
    "kuairand_without_history": "- all but the newest event of the history, everywhere",
    "kuairand_without_home_parts": "- HoME's normalisation, hierarchy, feature gate and self gate",
    "kuairand_with_calibrate": "+ calibrator",
    "kuairand_with_error_memory": "+ ReLoop2's error memory, .3",
}
WHOLE, DEV = "kuairand_online_0", "kuairand_dev"
SYNC_S = (18_000, 1_800, 60, 1, 0)
WITH = {"delay": "models alone", "with_bandit": "with the bandit"}
DELAYS_S = (0, 1, 60, 1_800, 18_000, 86_400)
AGES = {86_400: "1 d", 18_000: "5 h", 1_800: "30 min", 60: "60 s", 1: "1 s", 0: "nothing (at once)"}


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
        for metric in ("hit_rate_at_20", "mrr_at_20"):
            name = f"globo_delay_{delay}"
            values = [
                run["next_item"][metric]
                for key, run in runs.items()
                if key in (name, f"{name}_seed_1", f"{name}_seed_2")
            ]
            found[f"{name}_{metric}"] = mean(values) if values else None
    for name in ("globo_tenth", "globo_counting"):
        for metric in ("hit_rate_at_20", "mrr_at_20"):
            found[f"{name}_{metric}"] = runs.get(name, {}).get("next_item", {}).get(metric)
    for name, run in (("kuairand", "kuairand_online_0"), ("globo_tenth", "globo_tenth")):
        found[f"{name}_replay"] = runs.get(run, {}).get("seconds")
    return found


def report(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The judged figures against their budgets."""
    values = figures(runs)
    rows = [Figure(name=n, **budget).row(values[n]) for n, budget in read_budgets()["quality"].items()]
    commits = sorted({run["commit"] for run in runs.values()})
    machines = sorted({run["hardware"] for run in runs.values()})
    arguments = [run.get("arguments", []) for run in runs.values()]
    given = {int(each[each.index("--seed") + 1]) for each in arguments if "--seed" in each}
    return {"commit": commits, "hardware": machines, "seed": sorted(given), "results": rows}


def judged(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A table of the judged figures."""
    lines = ["| figure | measured | at least | met |", "| --- | --- | --- | --- |"]
    for row in rows:
        long = row["unit"].startswith("s ")
        value = "not measured" if row["value"] is None else f"{row['value']:.0f} s" if long else f"{row['value']:.4f}"
        bound = f"{'≤' if row['better'] == 'lower' else '≥'} " + (
            f"{row['budget']:.0f} s" if long else f"{row['budget']:.3f}"
        )
        lines.append(f"| `{row['name']}` | {value} | {bound} | {'yes' if row['met'] else '**no**'} |")
    return lines


def paired(known: dict[str, Any], runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Of each part and choice, seed 0: how each metric differs from the whole's, on the same examples, with the difference's interval.

    From the scored examples that runs leave beside their results; where these are not at hand, what is `known` stays, if it is
    of these very results.
    """
    found = {}
    for whole, names in ((WHOLE, PARTS), (DEV, CHOICES)):
        base = scored(whole)
        for name in names:
            if base and (part := scored(name)):
                found[name] = {task: differences(base[task], part[task]) for task in TASKS}
            elif name in known and {whole, name} <= runs.keys() and _of_these(known[name], runs[whole], runs[name]):
                found[name] = known[name]
    return found


def _of_these(difference: dict[str, Any], whole: dict[str, Any], part: dict[str, Any]) -> bool:
    aucs = ((difference[task]["auc"], whole["tasks"][task]["auc"], part["tasks"][task]["auc"]) for task in TASKS)
    return all((auc["a"], auc["b"]) == (first, second) for auc, first, second in aucs)


def scored(name: str) -> dict[str, Any]:
    """A run's scored examples by task; none where its file is not at hand."""
    path = FOLDER / f"{name}.parquet"
    if not path.exists():
        return {}
    table = pq.read_table(path)
    tasks = {task: table.filter(pc.field("task") == task).drop_columns("task") for task in TASKS}
    return {
        task: np.rec.fromarrays([column.to_numpy() for column in rows.columns], names=rows.column_names)
        for task, rows in tasks.items()
    }


def parts_table(head: str, run: dict[str, Any] | None, parts: dict[str, Any], titles: dict[str, str]) -> list[str]:
    """The whole's AUC with its 95% interval and its normalised entropy, and how the parts differ."""
    lines = [f"| {head} | " + " | ".join(f"{task} AUC / NE" for task in TASKS) + " |", "| --- | --- | --- | --- |"]
    rows = {"(as configured)": run["tasks"]} if run else {}
    rows |= {title: parts[name] for name, title in titles.items() if name in parts}
    for title, tasks in rows.items():
        lines.append(f"| {title} | {' | '.join(_cell(tasks[task]) for task in TASKS)} |")
    return lines


def _cell(task: dict[str, Any]) -> str:
    """AUC with its interval and normalised entropy, or how they differ."""
    auc, entropy = task["auc"], task["normalized_entropy"]
    if isinstance(auc, float):
        return "{:.4f} [{:.4f}, {:.4f}] / {:.4f}".format(auc, *task["auc_ci"], entropy)
    return "{:+.4f} [{:+.4f}, {:+.4f}] / {:+.4f}".format(
        auc["difference"], *auc["difference_ci"], entropy["difference"]
    )


def globo_choices(runs: dict[str, dict[str, Any]]) -> list[str]:
    """What was tried on day 2 of Globo, with 95% intervals."""
    lines = ["| day 2 | hit rate at 20 | MRR at 20 | candidate recall at 300 |", "| --- | --- | --- | --- |"]
    for name, title in GLOBO_CHOICES.items():
        if run := runs.get(f"globo_dev_{name}" if name else "globo_dev"):
            found = run["next_item"]
            cells = []
            for metric in ("hit_rate_at_20", "mrr_at_20", "candidate_recall_at_300"):
                low, high = found[f"{metric}_ci"]
                cells.append(f"{found[metric]:.4f} [{low:.4f}, {high:.4f}]")
            lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def by_age(runs: dict[str, dict[str, Any]], stream: str) -> list[tuple[int, dict[str, Any]]]:
    """The runs of a stream by how old what scoring knows may be, the oldest first."""
    at_once = {"kuairand": "kuairand_online_0", "globo": "globo_delay_0"}[stream]
    names = [(age, f"{stream}_sync_{age}" if age else at_once) for age in SYNC_S]
    return [(age, runs[name]) for age, name in names if name in runs]


def sync_series(runs: dict[str, dict[str, Any]], stream: str) -> dict[str, list[tuple[float, float]]]:
    """AUC or hit rate by age of what scoring knows; at once is drawn at a tenth of a second."""
    series: dict[str, list[tuple[float, float]]] = {}
    for age, run in by_age(runs, stream):
        # Likes are far above, and would flatten the other two.
        values = {task: run["tasks"][task]["auc"] for task in TASKS[:2]} if "tasks" in run else {}
        for name, value in (values or {"hit rate": run["next_item"]["hit_rate_at_20"]}).items():
            series.setdefault(name, []).append((float(max(age, 0.1)), value))
    return series


def sync_table(runs: dict[str, dict[str, Any]]) -> list[str]:
    """The curves as a table."""
    lines = [
        "| what scoring knows is at most … old | click | long_view | like | Globo hit rate / MRR |",
        "| --- | --- | --- | --- | --- |",
    ]
    kuairand, globo = dict(by_age(runs, "kuairand")), dict(by_age(runs, "globo"))
    for age in SYNC_S:
        cells = [f"{kuairand[age]['tasks'][task]['auc']:.4f}" if age in kuairand else "" for task in TASKS]
        lines.append(f"| {AGES[age]} | {' | '.join(cells)} | {_next(globo.get(age))} |")
    return lines


def delay_table(runs: dict[str, dict[str, Any]]) -> list[str]:
    """Globo by delay: everybody else's events and the parameters are this old, the own session is not."""
    lines = [
        "| delay | hit rate / MRR | with the bandit | candidate recall at 300, with the bandit |",
        "| --- | --- | --- | --- |",
    ]
    for delay in DELAYS_S:
        plain, explored = (runs.get(f"globo_{kind}_{delay}") for kind in WITH)
        recall = f"{explored['next_item']['candidate_recall_at_300']:.4f}" if explored else ""
        lines.append(f"| {AGES[delay].split(' (')[0]} | {_next(plain)} | {_next(explored)} | {recall} |")
    return lines


def delay_series(runs: dict[str, dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Hit rate by delay, without and with the bandit; none is drawn at a tenth of a second."""
    series: dict[str, list[tuple[float, float]]] = {}
    for kind, title in WITH.items():
        for delay in DELAYS_S:
            if run := runs.get(f"globo_{kind}_{delay}"):
                series.setdefault(title, []).append((max(delay, 0.1), run["next_item"]["hit_rate_at_20"]))
    return series


def _next(run: dict[str, Any] | None) -> str:
    return f"{run['next_item']['hit_rate_at_20']:.4f} / {run['next_item']['mrr_at_20']:.4f}" if run else ""


def written(text: str, tables: dict[str, list[str]]) -> str:
    """The document with its tables anew: each between `<!-- NAME -->` and `<!-- end -->`."""
    for name, lines in tables.items():
        head, mark, rest = text.partition(f"<!-- {name} -->\n")
        if not mark:
            raise ValueError(f"{DOCUMENT} has no <!-- {name} -->")
        text = head + mark + "\n".join(lines) + "\n" + rest[rest.index("<!-- end -->") :]
    return text


def main() -> int:
    runs, path = results(), RESULTS / "quality.json"
    result = report(runs)
    known = json.loads(path.read_text(encoding="utf-8")).get("paired", {}) if path.exists() else {}
    result["paired"] = paired(known, runs)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    tables = {
        "judged": judged(result["results"]),
        "ablation": parts_table("days 5–8", runs.get(WHOLE), result["paired"], PARTS),
        "choices": parts_table("days 3–4", runs.get(DEV), result["paired"], CHOICES),
        "globo choices": globo_choices(runs),
        "sync": sync_table(runs),
        "delay": delay_table(runs),
    }
    DOCUMENT.write_text(written(DOCUMENT.read_text(encoding="utf-8"), tables), encoding="utf-8")
    for name, title, what, series in (
        (
            "sync_kuairand",
            "KuaiRand, days 5-8: AUC by the age of what scoring knows",
            "AUC",
            sync_series(runs, "kuairand"),
        ),
        (
            "sync_globo",
            "Globo, days 3-5: hit rate by the age of what scoring knows",
            "hit rate at 20",
            sync_series(runs, "globo"),
        ),
        ("delay_globo", "Globo, days 3-5: hit rate by delay", "hit rate at 20", delay_series(runs)),
    ):
        chart = line_chart(title, "seconds", what, series, zoom=True)
        (ROOT / "docs" / f"quality_{name}.svg").write_text(chart, encoding="utf-8")
    print("\n".join(tables["judged"]))
    return 0 if all(row["met"] for row in result["results"]) else 1


if __name__ == "__main__":
    sys.exit(main())
