"""One run of the site through one system: `load_tests.month` starts it in a process of its own, as
`python -m load_tests.month_run FOLDER JSON`, and reads FOLDER/run.json and each day's FOLDER/examples-DAY.npz."""

from __future__ import annotations

import heapq
import json
import logging
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from load_tests.common import say
from load_tests.month_system import FULL_REQUESTS, System, disk_bytes, private_bytes, settings
from recsys.clock import ManualClock
from recsys.keys import key_of
from recsys.testing.site import DAY_MS, HOUR_MS, Site, Traffic, Visit, item_id, number_of
from recsys.training.steps import StepReport
from recsys.types import Item

START_MS = 1_700_000_000_000 // DAY_MS * DAY_MS
"""Midnight, long past: log time never leads the wall clock."""
TURN_MS = 300_000
"""The trainer takes what came, and serving what it learned, this often: at 667 requests a day as many as in 2 s of 3 million a month."""
LEFT_MS, STAYED_MS = 50_000, 520_000
"""A page sends its clicks together so long after it was shown, its likes and purchases so long after."""
DOWN_MS = 5_000
"""Of a restart: what was clicked before it still comes inside of its window."""
DRAIN_MS = 700_000
"""After the last hour: longer than the longest label window."""
PUT_ITEMS, SHOWN = 1000, 20
ENOUGH_IMPRESSIONS, LAST_WEEK_MS = 20, 7 * DAY_MS
WINDOW_OF = {"click": "click", "like": "like", "purchase": "like"}
"""Feedback type → the task whose label it is."""


class Ledger:
    """What must have been learned, and what was."""

    def __init__(self, tasks: tuple[str, ...]) -> None:
        self.tasks = tasks
        self.expected, self.positive = Counter[str](), Counter[str]()
        self.trained, self.trained_positive = Counter[str](), Counter[str]()
        self.outcomes, self.joined = Counter[str](), Counter[str]()
        self.steps = self.skipped = self.letters = 0

    def on_step(self, report: StepReport, _: float) -> None:
        self.steps += 1
        self.joined.update(report.outcomes)
        self.skipped += sum(report.skipped_batches.values())
        self.letters += len(report.dead_letters)
        for emission in report.emissions:
            final = emission.final & emission.shown[:, None]
            for task, name in enumerate(self.tasks):
                self.trained[name] += int(final[:, task].sum())
                self.trained_positive[name] += int((final & emission.labels)[:, task].sum())

    def shown(self, items: int) -> None:
        """So many items were shown, and logged."""
        for task in self.tasks:
            self.expected[task] += items

    def accepted(self, events: list[dict[str, Any]], outcomes: list[dict[str, str]]) -> None:
        """Feedback was answered; what joins a list must become a label."""
        for event, outcome in zip(events, outcomes, strict=True):
            self.outcomes[outcome["status"] + (f" ({outcome['note']})" if outcome.get("note") else "")] += 1
            if "request_id" in event and outcome["status"] == "accepted":
                self.positive[WINDOW_OF[event["type"]]] += 1

    @property
    def lost(self) -> int:
        """Labels that should have become final and did not, or did more than once; positives likewise."""
        pairs = ((self.expected, self.trained), (self.positive, self.trained_positive))
        return sum(abs(wanted[task] - got[task]) for wanted, got in pairs for task in self.tasks)


class Examples:
    """Of every item shown with a prediction: when, to whom, what was predicted, the true probability, and whether it was clicked."""

    def __init__(self) -> None:
        self._rows: dict[str, list[np.ndarray[Any, Any]]] = {}

    def add(self, visit: Visit, predictions: list[float], truth: Any, clicked: Any) -> None:
        size = len(predictions)
        row = {
            "at_ms": np.full(size, visit.at_ms),
            "visit": np.full(size, visit.number),
            "user": np.full(size, visit.user),
            "shelf": np.full(size, visit.shelf is not None),
            "prediction": np.array(predictions, np.float32),
            "truth": np.array(truth, np.float32),
            "clicked": np.array(clicked, np.bool_),
        }
        for name, values in row.items():
            self._rows.setdefault(name, []).append(values)

    def save(self, path: Path) -> None:
        """Write what came since the last call, and let go of it: what the test remembers must not look like what the system does."""
        np.savez_compressed(path, **{name: np.concatenate(parts) for name, parts in self._rows.items()})  # type: ignore[arg-type]
        self._rows.clear()


class Run:
    """A site's days through a system, in order of time."""

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        self._folder, self._days, traffic = folder, options["days"], Traffic(**options["traffic"])
        self._site = Site(traffic, self._days, options["seed"])
        fewer, times = options["fewer"], options["times"]
        config = settings(folder / "data", seed=options["seed"], fewer=fewer, share=times * options["scale"] / fewer)
        self._clock = ManualClock(START_MS)
        self._ledger = Ledger(tuple(task.name for task in config.tasks))
        self._system = System(config, self._clock, self._ledger.on_step)
        self._examples, self._impressions = Examples(), np.zeros(len(self._site.kind), np.int32)
        self._queue: list[tuple[int, int, Any]] = []
        self._queued = 0
        self._failed: list[str] = []
        self._disk: list[int] = []
        """Of each hour of the day."""
        self._days_seen: list[dict[str, Any]] = []
        self._counts = Counter[str]()

    def run(self) -> dict[str, Any]:
        """All days; what was counted."""
        self._system.open()
        self._put([(0, item) for item in self._site.first_items()])
        self._system.turn()
        for day in range(self._days):
            started = time.perf_counter()
            for hour in range(24 * day, 24 * day + 24):
                self._hour(hour)
            self._end_day(day, time.perf_counter() - started)
        self._to(self._days * DAY_MS + DRAIN_MS)
        self._system.turn()
        result = {
            "days": self._days_seen,
            "failed": self._failed,
            "new_items": self._new_items(),
            "ledger": {n: v for n, v in vars(self._ledger).items() if not n.startswith("_")},
            "lost": self._ledger.lost,
            "steps": self._system.runner.trainer.steps,
            "counts": self._counts,
        }
        self._system.close(killed=False)
        return result

    def _hour(self, number: int) -> None:
        hour = self._site.hour(number)
        start = number * HOUR_MS
        for turn in range(start, start + HOUR_MS, TURN_MS):
            end = turn + TURN_MS
            self._at(turn, lambda end=end: self._stock(hour, end - TURN_MS, end))
            sent = [event for event in hour.events if turn <= event["time_ms"] < end]
            self._at(end - 1, lambda sent=sent: self._send(sent))
            self._at(end - 1, self._system.turn)
        for visit in hour.visits:
            self._at(visit.at_ms, lambda visit=visit: self._visit(visit))
        self._to(start + HOUR_MS - 1)
        # Files are merged and cut now and then: one look a day would see that, not growth.
        self._disk.append(sum(disk_bytes(self._system.config.data_dir).values()))

    def _at(self, at_ms: int, act: Any) -> None:
        self._queued += 1
        heapq.heappush(self._queue, (at_ms, self._queued, act))

    def _to(self, until_ms: int) -> None:
        """Everything that is to happen until then."""
        while self._queue and self._queue[0][0] <= until_ms:
            at_ms, _, act = heapq.heappop(self._queue)
            # A restart takes its time: what was to happen meanwhile happens right after it.
            self._clock.set(max(self._clock.now_ms(), START_MS + at_ms))
            act()
        self._clock.set(max(self._clock.now_ms(), START_MS + until_ms))

    def _stock(self, hour: Any, start: int, end: int) -> None:
        self._put([(at, item) for at, item in hour.arrivals if start <= at < end])
        gone = [item for at, item in hour.departures if start <= at < end]
        if gone and not self._system.delete(gone):
            raise RuntimeError(f"not all of {len(gone)} items were deleted")

    def _put(self, arrivals: list[tuple[int, Item]]) -> None:
        rows = [{"item_id": i.item_id, "title": i.title, "attributes": dict(i.attributes)} for _, i in arrivals]
        for first in range(0, len(rows), PUT_ITEMS):
            if not self._system.put(rows[first : first + PUT_ITEMS]):
                raise RuntimeError("not all items were accepted")

    def _visit(self, visit: Visit) -> None:
        asked: dict[str, Any] = {"user_id": visit.user_id, "n": SHOWN}
        if visit.shelf is not None:
            asked["candidates"] = visit.shelf
        request_id = f"{visit.number:032x}"
        answer = self._system.recommend(asked, request_id)
        self._counts["requests"] += 1
        for reason in answer.degraded:
            self._counts[f"degraded ({reason})"] += 1
        shown = [item.item_id for item in answer.items]
        if not shown:
            self._counts["empty answers"] += 1
            return
        if "unlogged" not in answer.degraded:
            self._ledger.shown(len(shown))
        self._impressions[[number_of(item) for item in shown]] += 1
        clicked, events = self._site.reactions(visit, request_id, shown)
        predictions = [item.predictions.get("click", np.nan) for item in answer.items]
        self._examples.add(visit, predictions, self._site.probability(visit.user, shown), clicked)
        for after_ms, types in ((LEFT_MS, ("click",)), (STAYED_MS, ("like", "purchase"))):
            if sent := [event for event in events if event["type"] in types]:
                self._at(visit.at_ms + after_ms, lambda sent=sent: self._send(sent))

    def _send(self, events: list[dict[str, Any]]) -> None:
        if not events:
            return
        rows = [event | {"time_ms": START_MS + event["time_ms"]} for event in events]
        self._ledger.accepted(rows, self._system.feedback(rows))
        self._counts["events"] += len(rows)

    def _end_day(self, day: int, took_s: float) -> None:
        """Measure, restart, and see that it goes on where it was. Every other restart is a kill."""
        system, before = self._system, self._system.runner
        self._examples.save(self._folder / f"examples-{day:03d}.npz")
        own, private, rows = system.own_bytes(), private_bytes(), system.rows()
        steps, positions = before.trainer.steps, dict(before.intake.positions)
        del before
        killed = day % 2 == 1
        system.close(killed=killed)
        closed, disk = private_bytes(), disk_bytes(system.config.data_dir)
        self._clock.advance(DOWN_MS)
        try:
            system.open()
        except Exception as error:
            self._failed.append(f"day {day}: {error!r}")
            raise
        if system.runner.trainer.steps != steps or system.runner.intake.positions != positions:
            self._failed.append(f"day {day}: went on at step {system.runner.trainer.steps}, stood at {steps}")
        if reason := system.ranking.not_ready():
            self._failed.append(f"day {day}: ranking is not ready: {reason}")
        seen = {"private": private, "closed": closed, "own": own, "disk": disk, "rows": rows, "steps": steps}
        seen["seconds"], seen["disk_mean"] = took_s, sum(self._disk) / len(self._disk)
        self._disk.clear()
        self._days_seen.append(seen)
        say(
            f"day {day + 1}: {took_s:.0f} s, {private / 2**20:.0f} MiB ({closed / 2**20:.0f} closed), own {sum(own.values()) / 2**20:.1f}, "
            f"disk {sum(disk.values()) / 2**20:.1f}, rows {rows}, step {steps}, {dict(self._counts)}, {dict(self._ledger.outcomes)}"
        )

    def _new_items(self) -> dict[str, int]:
        """The last week's items that are still there and were shown often enough, and how many have a row of their own."""
        site, end = self._site, self._days * DAY_MS
        young = np.flatnonzero(
            (site.born_ms > max(0, end - LAST_WEEK_MS)) & (site.born_ms <= end) & (site.gone_ms > end)
        )
        shown = young[self._impressions[young] >= ENOUGH_IMPRESSIONS].tolist()
        keys = np.array([key_of(item_id(n)) for n in shown], np.int64)
        return {"shown": len(shown), "with_row": int(self._system.has_row(keys).sum()) if shown else 0}


def default_options(days: int, scale: float, seed: int) -> dict[str, Any]:
    """A month's site, or so many days of one that is smaller."""
    whole = Traffic()
    parts = {n: max(1, round(getattr(whole, n) * scale)) for n in ("active", "users", "new_items", "visits", "events")}
    fewer = FULL_REQUESTS / (30 * whole.visits)
    return {"days": days, "seed": seed, "scale": scale, "fewer": fewer, "traffic": asdict(whole) | parts}


def main() -> int:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    folder = Path(sys.argv[1])
    result = Run(folder, json.loads(sys.argv[2])).run()
    (folder / "run.json").write_text(json.dumps(result), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
