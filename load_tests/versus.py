"""What a request and an event cost here against another commit: CPU of all processes, `load_tests.serve` in turns.

The other commit is a checkout of its own, whose services run in this environment and under this checkout's load. Example:

    git worktree add ../before COMMIT
    python -m load_tests.versus --old ../before --alternations 5 --json

Each turn is one run of each, first the one, then the other; a figure is the geometric mean of the turns' ratios, `…_low` and `…_high`
its 95% interval (Student's t over the logarithms).
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from load_tests.common import ROOT, Report, run, say
from recsys.provenance import head

FIGURES = ("request_cpu", "event_cpu")
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""97.5% quantile of Student's t for so many turns."""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--old", type=Path, required=True, help="the other commit's checkout")
    parser.add_argument("--alternations", type=int, default=5, choices=range(1, 11), metavar="1..10")
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--rate", type=float, default=10.0, help="requests per second")
    parser.add_argument("--events", type=float, default=100.0, help="feedback events per second")
    parser.add_argument("--seconds", type=float, default=60.0)


def measure(options: argparse.Namespace, report: Report) -> None:
    old = options.old.resolve()
    if not (old / "services").is_dir():
        raise SystemExit(f"--old {options.old} is no checkout of this project: `git worktree add {options.old} COMMIT`")
    say(f"{head(ROOT)[:7]} against {head(old)[:7]} in {old}")
    taken: dict[Path, list[dict[str, float]]] = {ROOT: [], old: []}
    for turn in range(options.alternations):
        for root in (ROOT, old) if turn % 2 == 0 else (old, ROOT):
            taken[root].append(serve(options, root, turn))
    for figure in FIGURES:
        new, before = ([row[figure] for row in taken[root]] for root in (ROOT, old))
        ratios = [math.log(mine / other) for mine, other in zip(new, before, strict=True)]
        report.add(f"versus_{figure}", math.exp(mean(ratios)))
        if len(ratios) > 1:
            half = STUDENT[len(ratios)] * stdev(ratios) / math.sqrt(len(ratios))
            report.add(f"versus_{figure}_low", math.exp(mean(ratios) - half), "ratio")
            report.add(f"versus_{figure}_high", math.exp(mean(ratios) + half), "ratio")
        report.add(f"{figure}_here", mean(new), "cpu ms as measured")
        report.add(f"{figure}_old", mean(before), "cpu ms as measured")


def serve(options: argparse.Namespace, root: Path, turn: int) -> dict[str, float]:
    """One run against one checkout's services: its figures as measured."""
    given = {name: getattr(options, name) for name in ("items", "rate", "events", "seconds")}
    words = [f"--{name}={value}" for name, value in (given | {"seed": options.seed + turn, "root": root}).items()]
    done = subprocess.run(
        [sys.executable, "-m", "load_tests.serve", "--json", *words], cwd=ROOT, stdout=subprocess.PIPE, check=True
    )
    result: dict[str, Any] = json.loads(done.stdout)
    rows = {row["name"]: row["value"] for row in result["results"]}
    found = {figure: float(rows[f"{figure}_raw"]) for figure in FIGURES}
    say(f"turn {turn + 1}, {root.name}: " + ", ".join(f"{name} {value:.3f} ms" for name, value in found.items()))
    return found


if __name__ == "__main__":
    sys.exit(run("versus", measure, arguments))
