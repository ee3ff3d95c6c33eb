"""A default system runs a month without a hand: 30 days of a generated site, a restart a day, bounds that press like 3 million requests.

The services' own objects in one process on the embedded log; the clock is set by hand. Every other restart is a kill. A second run,
beside it on the other core, meets the same site with ten times the bounds. Example:

    python -m load_tests.month --days 3 --scale 0.1 --json

`month_quality_…`: progressive AUC of clicks, predictions as served, over the lists that the site made itself (half of the requests: what
is on them does not depend on the system). Instead of the clicks drawn it weighs each item by its true probability: the expected
AUC, without the noise of the draw. `…_se`: standard error, by bootstrap over users. `auc_…_clicked` is over clicks as drawn, `auc_…_best`
what the true probabilities reach.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from load_tests.common import ROOT, Floats, Report, run, say
from load_tests.month_run import default_options
from recsys.evaluation.bootstrap import Resamples

WIDE_TIMES = 10
"""How much wider the second run's bounds are."""
THIRD_WEEK, LAST_WEEK, LAST_DAYS = (14 / 30, 21 / 30), (23 / 30, 1.0), 10 / 30
"""As shares of the days."""
DAY_MS = 86_400_000


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--days", type=int, default=30)
    parser.add_argument(
        "--scale", type=float, default=1.0, help="so much of the site: users, items, requests, events (default: 1)"
    )
    parser.add_argument("--once", action="store_true", help="leave out the run with ten times the bounds")
    parser.add_argument("--folder", type=Path, help="keep the data folders here (default: a temporary folder)")


def measure(options: argparse.Namespace, report: Report) -> None:
    with tempfile.TemporaryDirectory(prefix="recsys-month-") as name:
        folder = options.folder or Path(name)
        runs = start_runs(folder, options)
        for path, process in runs:
            if process.wait():
                raise RuntimeError(f"the run in {path.name} ended with {process.returncode}: its last lines are above")
        results = [json.loads((path / "run.json").read_text(encoding="utf-8")) for path, _ in runs]
        examples = [read_examples(path) for path, _ in runs]
    upkeep(report, results[0])
    quality(report, examples, options.days)
    for name, result in zip(("", "wide_"), results, strict=False):
        details(report, name, result)


def start_runs(folder: Path, options: argparse.Namespace) -> list[tuple[Path, subprocess.Popen[bytes]]]:
    """One process a run, each on one thread, side by side."""
    runs = []
    for times in (1,) if options.once else (1, WIDE_TIMES):
        path = folder / f"bounds-times-{times}"
        path.mkdir(parents=True)
        wanted = default_options(options.days, options.scale, options.seed) | {"times": times}
        command = [sys.executable, "-m", "load_tests.month_run", str(path), json.dumps(wanted)]
        # Each day's new threads would get heaps of their own, whose free parts look like growth; a service keeps its threads.
        environment = psutil.Process().environ() | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
        runs.append((path, subprocess.Popen(command, cwd=ROOT, env=environment, stdout=sys.stderr)))
        say(f"{options.days} days with {times} times the bounds, in {path}")
    return runs


def read_examples(folder: Path) -> dict[str, Any]:
    """All days' examples, in order of time."""
    days = [dict(np.load(path)) for path in sorted(folder.glob("examples-*.npz"))]
    return {name: np.concatenate([day[name] for day in days]) for name in days[0]}


def upkeep(report: Report, result: dict[str, Any]) -> None:
    """What grew, and what was lost."""
    days = result["days"]
    memory = [[day["private"] for day in days], [sum(day["own"].values()) for day in days]]
    report.add("month_memory_growth", max(map(growth, memory)))
    report.add("month_disk_growth", growth([day["disk_mean"] for day in days]))
    items = result["new_items"]
    report.add("month_new_item_rows", items["with_row"] / items["shown"] if items["shown"] else None)
    report.add("new_items_judged", items["shown"], "items", "higher")
    ledger = result["ledger"]
    report.add("month_steps_lost", abs(result["steps"] - ledger["steps"]) + ledger["skipped"])
    report.add("month_labels_lost", result["lost"])
    report.add("month_restarts_failed", len(result["failed"]))
    for failed in result["failed"]:
        say(failed)


def growth(values: list[float]) -> float | None:
    """By how much of their mean values grow over the last ten of thirty days: a straight line through them, so that one reading
    moves it little."""
    last = np.array(values[-max(2, round(len(values) * LAST_DAYS)) :], np.float64)
    if len(last) < 2:
        return None
    slope = np.polyfit(np.arange(len(last)), last, 1)[0]
    return float(slope * len(last) / last.mean())


class Judged:
    """Examples of some weeks and runs together, so that a resample draws the same users in all of them."""

    def __init__(self, parts: list[dict[str, Any]]) -> None:
        drawn = Resamples(np.concatenate([part["user"] for part in parts]))
        ends = np.cumsum([len(part["user"]) for part in parts])[:-1]
        self._parts, self._of, self._weights = parts, np.split(drawn.of, ends), drawn.weights

    def ratio(self) -> tuple[float, float]:
        """Expected AUC of the first part over that of the second, and its standard error."""
        first, second = (auc(part["prediction"], part["truth"]) for part in self._parts)
        drawn = [
            [
                auc(part["prediction"], part["truth"], weights[of])
                for part, of in zip(self._parts, self._of, strict=True)
            ]
            for weights in self._weights
        ]
        ratios = [a / b for a, b in drawn]
        return first / second, float(np.std(ratios))


def auc(predictions: Floats, truth: Floats, weight: Floats | None = None) -> float:
    """How often an item that is clicked stands above one that is not, ties counting half; `truth`: labels, or their probabilities."""
    order = np.argsort(predictions, kind="stable")
    scores, up = predictions[order], truth[order].astype(np.float64)
    down = 1.0 - up
    if weight is not None:
        up, down = up * weight[order], down * weight[order]
    starts = np.flatnonzero(np.append(True, scores[1:] != scores[:-1]))
    up, down = np.add.reduceat(up, starts), np.add.reduceat(down, starts)
    pairs = up.sum() * down.sum()
    return float((up * (np.cumsum(down) - down / 2)).sum() / pairs) if pairs else float("nan")


def part(
    examples: dict[str, Any], days: int, share: tuple[float, float], *, shelf: bool | None = True
) -> dict[str, Any]:
    """The examples of some of the days; `shelf` None: of every list."""
    at = (examples["at_ms"] / (days * DAY_MS) >= share[0]) & (examples["at_ms"] / (days * DAY_MS) < share[1])
    at &= np.isfinite(examples["prediction"])
    at &= True if shelf is None else examples["shelf"] == shelf
    return {name: values[at] for name, values in examples.items()}


def quality(report: Report, examples: list[dict[str, Any]], days: int) -> None:
    """The last week against the third, and against the run with wide bounds."""
    weeks = {"third": THIRD_WEEK, "last": LAST_WEEK}
    pairs = {"month_quality_last_week": [part(examples[0], days, weeks[name]) for name in ("last", "third")]}
    if len(examples) > 1:
        pairs["month_quality_bounded"] = [part(run, days, LAST_WEEK) for run in examples]
    for name, parts in pairs.items():
        ratio, error = Judged(parts).ratio()
        report.add(name, ratio)
        report.add(f"{name}_se", error, "ratio")
    for prefix, run_examples in zip(("", "wide_"), examples, strict=False):
        for week, share in weeks.items():
            shelf, every = (part(run_examples, days, share, shelf=shelf) for shelf in (True, None))
            report.add(f"{prefix}auc_{week}_week", auc(shelf["prediction"], shelf["truth"]), "auc", "higher")
            report.add(f"{prefix}auc_{week}_week_clicked", auc(shelf["prediction"], shelf["clicked"]), "auc", "higher")
            report.add(f"{prefix}auc_{week}_week_best", auc(shelf["truth"], shelf["truth"]), "auc", "higher")
            report.add(f"{prefix}auc_{week}_week_every_list", auc(every["prediction"], every["truth"]), "auc", "higher")
            chosen = part(run_examples, days, share, shelf=False)
            report.add(
                f"{prefix}clicks_{week}_week_chosen", float(chosen["truth"].mean()), "share of items shown", "higher"
            )


def details(report: Report, prefix: str, result: dict[str, Any]) -> None:
    """How much happened, and how large it all was at the end."""
    last, ledger = result["days"][-1], result["ledger"]
    for name in ("requests", "events"):
        report.add(f"{prefix}{name}", result["counts"].get(name, 0), name, "higher")
    degraded = sum(count for name, count in result["counts"].items() if name.startswith("degraded"))
    report.add(f"{prefix}degraded", degraded, "answers")
    refused = sum(count for status, count in ledger["outcomes"].items() if not status.startswith("accepted"))
    report.add(f"{prefix}events_refused", refused, "events")
    report.add(f"{prefix}dead_letters", ledger["letters"], "records")
    report.add(f"{prefix}labels", sum(ledger["trained"].values()), "labels", "higher")
    report.add(f"{prefix}memory_private", last["private"], "bytes")
    report.add(f"{prefix}memory_own", sum(last["own"].values()), "bytes")
    report.add(f"{prefix}disk", sum(last["disk"].values()), "bytes")
    report.add(f"{prefix}took", sum(day["seconds"] for day in result["days"]), "wall seconds")
    for layout, rows in last["rows"].items():
        report.add(f"{prefix}rows_{layout}", rows, "rows")


if __name__ == "__main__":
    sys.exit(run("month", measure, arguments))
