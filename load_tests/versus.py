"""What a request and an event cost here against another commit: CPU of all processes, both systems beside each other on one machine.

The other commit is a checkout of its own, whose services run in this environment. Both have the same items, users and histories; then
they are loaded in turns of some seconds, first the one, then the other, so that a machine that drifts slows both. Example:

    git worktree add ../before COMMIT
    python -m load_tests.versus --old ../before --turns 20 --json

A cost is what a turn's load adds to what the same processes take when nothing comes (`idle_cpu`), training included. A figure is the
ratio of the sums over all turns, `…_low` and `…_high` its 95% interval, by bootstrap over the turns.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from load_tests.common import ROOT, Report, Running, run, say, services
from load_tests.serve import SETTINGS
from recsys.provenance import head

KINDS, TAGS, USERS, HISTORY, SHOWN = 200, 500, 500, 20, 20
BATCHES_A_SECOND, SETTLE_S, RESAMPLES = 4, 2.0, 2000
"""Labels are final a second after they were shown, and learned at once."""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--old", type=Path, required=True, help="the other commit's checkout")
    parser.add_argument("--turns", type=int, default=20, help="of each system")
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--rate", type=float, default=10.0, help="requests per second")
    parser.add_argument("--events", type=float, default=100.0, help="feedback events per second")
    parser.add_argument("--seconds", type=float, default=5.0, help="of one turn's requests, and of its events")


class System:
    """One checkout's services, and what their processes have used."""

    def __init__(self, running: Running, seed: int) -> None:
        self._running, self._rng, self._number = running, np.random.default_rng(seed), 0
        self._http = httpx.Client(base_url=running.url(), timeout=60.0)
        self.turns: list[dict[str, float]] = []

    def fill(self, items: int) -> None:
        """Items, and some clicks of each user."""
        self._running.wait_ready()
        for start in range(0, items, 1000):
            batch = [
                {
                    "version": 1,
                    "item_id": f"item-{n}",
                    "title": f"Thing {n}",
                    "attributes": {"category": f"kind-{n % KINDS}", "tags": [f"tag-{n % TAGS}", f"tag-{n * 7 % TAGS}"]},
                }
                for n in range(start, min(items, start + 1000))
            ]
            self._http.put("/v1/items", json={"items": batch}).raise_for_status()
        self._items = items
        for user in range(USERS):
            self._post([self._click(user) for _ in range(HISTORY)])
        for _ in range(50):
            self._recommend()

    def turn(self, options: argparse.Namespace) -> None:
        """Requests for some seconds, then events; what each added to the CPU of the processes, in ms."""
        requests = self._load(lambda: self._recommend(), options.rate, options.seconds)
        batch = max(1, round(options.events / BATCHES_A_SECOND))
        events = self._load(
            lambda: self._post([self._click(int(self._rng.integers(USERS))) for _ in range(batch)]),
            BATCHES_A_SECOND,
            options.seconds,
        )
        started, before = time.monotonic(), self._used_ms()
        time.sleep(options.seconds / 2)
        idle = (self._used_ms() - before) / (time.monotonic() - started)
        took_s = options.seconds + SETTLE_S
        self.turns.append(
            {
                "request_cpu": (requests - idle * took_s) / (options.rate * options.seconds),
                "event_cpu": (events - idle * took_s) / (batch * BATCHES_A_SECOND * options.seconds),
                "idle_cpu": idle,
            }
        )

    def _load(self, work: Any, rate: float, seconds: float) -> float:
        began, before = time.monotonic(), self._used_ms()
        for number in range(round(rate * seconds)):
            work()
            time.sleep(max(0.0, began + (number + 1) / rate - time.monotonic()))
        time.sleep(max(0.0, began + seconds + SETTLE_S - time.monotonic()))
        return self._used_ms() - before

    def _recommend(self) -> None:
        """One user looks, and clicks on the first."""
        user = f"user-{self._rng.integers(USERS)}"
        answer = self._http.post("/v1/recommend", json={"user_id": user, "n": SHOWN}).raise_for_status().json()
        for item in answer["items"][:1]:
            click = {"user_id": user, "item_id": item["item_id"], "request_id": answer["request_id"]}
            self._post([{"version": 1, "event_id": answer["request_id"], "type": "click", **click}])

    def _click(self, user: int) -> dict[str, Any]:
        self._number += 1
        item = min(int(self._rng.zipf(1.3)), self._items) - 1
        named = {"event_id": f"event-{self._number}", "user_id": f"user-{user}", "item_id": f"item-{item}"}
        return {"version": 1, "type": "click", "time_ms": time.time_ns() // 1_000_000, **named}

    def _post(self, events: list[dict[str, Any]]) -> None:
        self._http.post("/v1/feedback", json={"events": events}).raise_for_status()

    def _used_ms(self) -> float:
        return sum(self._running.cpu_s().values()) * 1000


def measure(options: argparse.Namespace, report: Report) -> None:
    old = options.old.resolve()
    if not (old / "services").is_dir():
        raise SystemExit(f"--old {options.old} is no checkout of this project: `git worktree add {options.old} COMMIT`")
    say(f"{head(ROOT)[:7]} against {head(old)[:7]} in {old}")
    with services(SETTINGS) as running, services(SETTINGS, root=old) as other:
        here, there = System(running, options.seed), System(other, options.seed)
        for system in (here, there):
            system.fill(options.items)
        for number in range(options.turns):
            for system in (here, there) if number % 2 else (there, here):
                system.turn(options)
            say(f"turn {number + 1}: {_told(here.turns[-1])}; old {_told(there.turns[-1])}")
    judge(here.turns, there.turns, options.seed, report)


def _told(turn: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f} ms" for name, value in turn.items())


def judge(mine: list[dict[str, float]], theirs: list[dict[str, float]], seed: int, report: Report) -> None:
    """Ratios of the sums over the turns, with their intervals."""
    drawn = np.random.default_rng(seed).integers(0, len(mine), (RESAMPLES, len(mine)))
    for figure in ("request_cpu", "event_cpu", "idle_cpu"):
        new, before = (np.array([turn[figure] for turn in turns]) for turns in (mine, theirs))
        low, high = np.quantile(new[drawn].sum(1) / before[drawn].sum(1), (0.025, 0.975))
        report.add(f"versus_{figure}", float(new.sum() / before.sum()), "ratio")
        report.add(f"versus_{figure}_low", float(low), "ratio")
        report.add(f"versus_{figure}_high", float(high), "ratio")
        unit = "cpu ms a second" if figure == "idle_cpu" else "cpu ms as measured"
        report.add(f"{figure}_here", float(new.mean()), unit)
        report.add(f"{figure}_old", float(before.mean()), unit)


if __name__ == "__main__":
    sys.exit(run("versus", measure, arguments))
