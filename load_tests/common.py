"""What every load test needs: a report against the budgets, the hardware it ran on, and running services."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import platform
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import psutil
from rich.console import Console
from rich.table import Table

from load_tests import calibrate
from load_tests.processes import Family
from recsys.provenance import cpu_model, git, head
from recsys.testing.servers import free_port

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "load_tests" / "results"
SERVICES = ("ranking", "trainer", "parameter")
ROUNDS = 7
"""Rounds of a repeatable figure, windows of a percentile: the median of them is the figure."""
READY_S = 120.0

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A named figure; `budget` None: reported, not judged."""

    name: str
    unit: str
    better: str
    budget: float | None = None

    def met(self, value: float | None) -> bool:
        """Whether it was measured and keeps its budget, if it has one."""
        if value is None or not math.isfinite(value):
            return False
        if self.budget is None:
            return True
        return value <= self.budget if self.better == "lower" else value >= self.budget

    def scaled(self, value: float, slowness: float) -> float:
        """The value on the reference machine: times shrink and rates grow by how much slower this one is."""
        if self.unit in ("s", "ms"):
            return value / slowness
        return value * slowness if self.unit.endswith("/s") else value

    def row(self, value: float | None) -> dict[str, Any]:
        return {
            "name": self.name,
            "value": None if value is None or not math.isfinite(value) else float(f"{value:.6g}"),
            "unit": self.unit,
            "better": self.better,
            "budget": self.budget,
            "met": self.met(value),
        }


def read_budgets() -> dict[str, Any]:
    """budgets.toml."""
    return tomllib.loads((ROOT / "load_tests" / "budgets.toml").read_text(encoding="utf-8"))


class Report:
    """The figures of one load test; its calibration is measured when it is made and when it is finished."""

    def __init__(self, test: str, load: Mapping[str, Any]) -> None:
        budgets = read_budgets()
        self.test, self._load = test, dict(load)
        self._reference: dict[str, float] = budgets["calibration"]
        self._budgeted = {name: Figure(name=name, **budget) for name, budget in budgets[test].items()}
        self._values: dict[str, tuple[Figure, float | None]] = {}
        self._kept: Mapping[str, Any] = {"results": []}
        self._rounds = calibrate.measure()

    @property
    def names(self) -> list[str]:
        """The figures reported so far."""
        return list(self._values)

    def add(self, name: str, value: float | None, unit: str = "", better: str = "lower") -> None:
        """One figure as measured; unit and better of a budgeted one are those of its budget."""
        figure = self._budgeted.get(name) or Figure(name=name, unit=unit, better=better)
        if not figure.unit or name in self._values:
            raise ValueError(f"figure {name!r} has no unit, no budget, or was reported already: look at budgets.toml")
        self._values[name] = (figure, value)

    def keep(self) -> None:
        """Let the committed figures stand, scaled as they were then, where this run measures none of that name."""
        if (saved := RESULTS / f"{self.test}.json").exists():
            self._kept = json.loads(saved.read_text(encoding="utf-8"))

    def percentiles(self, name: str, values_ms: Sequence[float]) -> None:
        """Two figures in ms, NAME_p50 and NAME_p99, over all values."""
        for percent in (50, 99):
            value = percentile(values_ms, percent) if len(values_ms) else None
            self.add(f"{name}_p{percent}", value, "ms")

    def finish(self) -> dict[str, Any]:
        """The result: budgeted figures first, those never measured with value null; `kept`: of which commit an earlier figure is."""
        for loop, seconds in calibrate.measure().items():
            self._rounds[loop] = self._rounds[loop] + seconds
        slowness = slowness_of(self._rounds, self._reference)
        kept = {
            row["name"]: row
            for row in self._kept["results"]
            if row["value"] is not None and row["name"].removesuffix("_raw") not in self._values
        }
        rows = []
        for name in [*self._budgeted, *(n for n in self._values if n not in self._budgeted)]:
            figure, value = self._values.get(name, (self._budgeted.get(name), None))
            assert figure is not None
            if name in kept:
                rows.append(kept[name])
            elif value is not None and figure.scaled(1.0, 2.0) != 1.0:
                rows.append(figure.row(figure.scaled(value, slowness)))
                rows.append(Figure(name=f"{name}_raw", unit=figure.unit, better=figure.better).row(value))
            else:
                rows.append(figure.row(value))
        rows += [row for name, row in kept.items() if name not in self._budgeted]
        return {
            **commit(),
            "hardware": hardware(),
            "seed": self._load.get("seed"),
            "load": self._load,
            "kept": {name: self._kept.get("kept", {}).get(name, self._kept["commit"]) for name in kept},
            "calibration": {
                "rounds_s": self._rounds,
                "median_s": {loop: median(seconds) for loop, seconds in self._rounds.items()},
                "reference_s": self._reference,
                "slowness": slowness,
            },
            "results": rows,
        }


def choose_parts(parser: argparse.ArgumentParser, parts: Sequence[str]) -> None:
    """`--parts`, of a load test that keeps the committed figures of the others."""
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=parts,
        default=parts,
        help="what to measure; figures of other parts stay as they were saved (default: all)",
    )


def slowness_of(rounds: Mapping[str, Sequence[float]], reference: Mapping[str, float]) -> float:
    """How many times slower than the reference machine: geometric mean over the loops."""
    return math.prod(median(rounds[loop]) / reference[loop] for loop in reference) ** (1 / len(reference))


def percentile(values: Sequence[float], percent: float) -> float:
    """A value that was measured, never between two: the smallest that so many percent do not exceed."""
    return float(np.percentile(np.asarray(values, np.float64), percent, method="inverted_cdf"))


def windowed(at_s: Sequence[float], values: Sequence[float], percent: float, windows: int = ROUNDS) -> float:
    """The median over equal windows of time of each window's percentile: one disturbance spoils one window."""
    at, measured = np.asarray(at_s, np.float64), np.asarray(values, np.float64)
    edges = np.linspace(at.min(), at.max(), windows + 1)
    window = np.clip(np.searchsorted(edges, at, side="right") - 1, 0, windows - 1)
    return median(percentile(measured[window == w].tolist(), percent) for w in range(windows) if (window == w).any())


def commit() -> dict[str, Any]:
    """The commit checked out, null where there is none, and whether files differ from it."""
    found = head(ROOT)
    return {"commit": found or None, "dirty": not found or bool(git(ROOT, "status", "--porcelain").strip())}


def hardware() -> dict[str, Any]:
    """The machine."""
    return {
        "cpu": cpu_model(),
        "cores": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def say(message: str) -> None:
    """Progress, on stderr."""
    print(f"{time.strftime('%H:%M:%S')} {message}", file=sys.stderr, flush=True)


def run(
    test: str,
    measure: Callable[[argparse.Namespace, Report], None],
    arguments: Callable[[argparse.ArgumentParser], None],
) -> int:
    """One load test's command: its figures as JSON alone on stdout (a table without --json), kept with --save."""
    parser = argparse.ArgumentParser(prog=f"python -m load_tests.{test}")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout, all else on stderr")
    parser.add_argument("--save", action="store_true", help=f"also write load_tests/results/{test}.json")
    parser.add_argument("--seed", type=int, default=0)
    arguments(parser)
    options = parser.parse_args()
    settings = {name: value for name, value in vars(options).items() if name not in ("json", "save")}
    load = {
        name: value for name, value in settings.items() if not isinstance(value, Path)
    }  # a path says where, not what
    report = Report(test, load)
    measure(options, report)
    result = report.finish()
    if options.save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{test}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if options.json:
        print(json.dumps(result))
    else:
        _print(result)
    return 0


def _print(result: Mapping[str, Any]) -> None:
    table = Table("figure", "value", "unit", "budget", "met")
    for row in result["results"]:
        budget = "" if row["budget"] is None else f"{row['budget']:g}"
        value = "not measured" if row["value"] is None else f"{row['value']:.6g}"
        table.add_row(row["name"], value, row["unit"], budget, ("yes" if row["met"] else "NO") if budget else "")
    Console(width=120).print(table)


class Running:
    """`recsys up` on an empty folder and free ports."""

    def __init__(self, folder: Path, process: subprocess.Popen[bytes], ports: Mapping[str, int]) -> None:
        self.folder, self._up, self._ports = folder, psutil.Process(process.pid), dict(ports)
        self.family = Family(self._up)
        self.port = ports["ranking"]
        self._process = process

    def url(self, service: str = "ranking") -> str:
        return f"http://127.0.0.1:{self._ports[service]}"

    def wait_ready(self) -> None:
        """Until every service says it is ready; RuntimeError with the end of the output when one does not."""
        deadline = time.monotonic() + READY_S
        while not all(self._ready(service) for service in SERVICES):
            if self._process.poll() is not None or time.monotonic() > deadline:
                output = (self.folder / "up.txt").read_text(errors="replace")[-2000:]
                raise RuntimeError(f"`recsys up` was not ready after {READY_S:.0f} s: {output}")
            time.sleep(0.02)

    def _ready(self, service: str) -> bool:
        try:
            return httpx.get(f"{self.url(service)}/readyz", timeout=2.0).status_code == 200
        except httpx.HTTPError:
            return False

    def metric(self, name: str, service: str = "ranking") -> float:
        """The sum of a metric's samples as the service exports it."""
        return sum(self.by_label(name, service).values())

    def by_label(self, name: str, service: str = "ranking") -> dict[str, float]:
        """A metric's samples by the value of their last label, which is empty where there is none."""
        lines = httpx.get(f"{self.url(service)}/metrics", timeout=5.0).text.splitlines()
        found: dict[str, float] = {}
        for line in lines:
            if line.startswith((f"{name} ", f"{name}{{")):
                sample, value = line.rsplit(" ", 1)
                label = sample.rsplit('="', 1)[1].rstrip('"}') if "{" in sample else ""
                found[label] = found.get(label, 0.0) + float(value)
        return found

    def cpu_s(self) -> dict[str, float]:
        """CPU seconds used so far by the supervisor and by each service, with what they started, ended processes included."""
        return self.family.cpu_s()

    def memory_bytes(self) -> dict[str, int]:
        """Resident memory of the same."""
        return self.family.memory_bytes()

    def stop(self) -> None:
        """SIGTERM and wait; what does not end is killed with its services."""
        family = [self._up, *self._up.children(recursive=True)] if self._up.is_running() else []
        self._process.terminate()
        _, left = psutil.wait_procs(family, timeout=30)
        for process in left:
            process.kill()
        self._process.wait()


@contextlib.contextmanager
def services(settings: str = "", environment: Mapping[str, str] | None = None, root: Path = ROOT) -> Iterator[Running]:
    """`recsys up`, just started (not yet ready), with these settings (TOML tables) and additional environment; `root`: of which
    checkout."""
    ports = {service: free_port() for service in SERVICES}
    with tempfile.TemporaryDirectory(prefix="recsys-load-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        config = folder / "config.toml"
        config.write_text(
            f"data_dir = {json.dumps(str(folder / 'data'))}\nranking.port = {ports['ranking']}\n"
            f"parameter.metrics_port = {ports['parameter']}\ntrainer.metrics_port = {ports['trainer']}\n{settings}"
        )
        command = [sys.executable, "-m", "services.cli.main", "up", "--config", str(config)]
        with (folder / "up.txt").open("wb") as output:
            process = subprocess.Popen(
                command,
                cwd=root,
                env=psutil.Process().environ() | {"PYTHONPATH": str(root)} | dict(environment or {}),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        running = Running(folder, process, ports)
        try:
            yield running
        except BaseException:
            for log in sorted((folder / "data").glob("*.log")):
                say(f"end of {log.name}:\n{log.read_text(errors='replace')[-1500:]}")
            raise
        finally:
            running.stop()
