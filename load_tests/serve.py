"""`/v1/recommend` under load: open loop, Poisson arrivals, while feedback comes in and the trainer learns from it.

Latency is taken from the instant a request was due; p50 and p99 are the median over seven windows of time of each window's
percentile (`…_run`: over the whole run, as measured). Freshness is over all probes of the run: from the instant feedback was
answered (trained rows: from the instant the label was final) to the first answer whose `as_of` covers it. `request_cpu` is what
one request adds to the CPU time of all processes, its training included: the run against the same feedback and probes without
requests. `event_cpu` is what one event adds to that of an idle system, in batches of 50; `idle_cpu` is what that takes.
`stage_…` is the time that stages took, probes' included, per request. The label windows are one second.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from load_tests.client import Client, Sample, open_loop, poisson
from load_tests.common import ROOT, Report, Running, percentile, run, say, services, windowed

USERS, KINDS, TAGS = 2000, 200, 500
HISTORY = 20
"""Clicks of each user before the run: with an empty history a request costs less than it will."""
POST, ITEMS_A_PUT = 50, 1000
WINDOW_S = 1.0
RECENT_S = 0.5
"""Lists shown at most this long ago are clicked: the label's window, 1 s, is still open when the click arrives."""
PROBES_A_SECOND, POLL_S, GIVE_UP_MS = 3, 0.005, 10_000
QUIET_S, EVENTS_S, IDLE_AFTER_S = 10.0, 20.0, 60.0
WARM_S = 5.0
COVERED = ("user_state", "counters")
STAGES = "recsys_stage_seconds_sum"
SETTINGS = f"""
[[tasks]]
name = "click"
types = ["click"]
window_s = {WINDOW_S}
[[tasks]]
name = "like"
types = ["like", "purchase"]
window_s = {WINDOW_S}
weight = 0.5
prior = 0.01
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--rate", type=float, default=20.0, help="requests per second")
    parser.add_argument("--events", type=float, default=200.0, help="feedback events per second, in POSTs of 50")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--root", type=Path, default=ROOT, help="checkout whose services are run (default: this one)")


def measure(options: argparse.Namespace, report: Report) -> None:
    with services(SETTINGS, root=options.root) as running:
        running.wait_ready()
        asyncio.run(Serve(options, report, running).run())


def now_ms() -> int:
    return time.time_ns() // 1_000_000


@dataclass(slots=True)
class Seen:
    """What the run saw."""

    degraded: int = 0
    errors: int = 0
    events: int = 0
    probes: int = 0
    untrue: int = 0
    """Answers that claimed to contain a click that the user's history did not."""
    fresh_ms: dict[str, list[float]] = field(default_factory=lambda: {kind: [] for kind in (*COVERED, "trained")})


class Serve:
    """The load on one running system."""

    def __init__(self, options: argparse.Namespace, report: Report, running: Running) -> None:
        self._options, self._report, self._running = options, report, running
        self._rng = np.random.default_rng(options.seed)
        self._client = Client(running.port)
        self._recent: list[tuple[float, str, str, list[str]]] = []
        self._seen = Seen()
        self._events = 0
        self._ready_at = time.monotonic()

    async def run(self) -> None:
        options, report = self._options, self._report
        await self.fill()
        say(f"warming up: {WARM_S:.0f} s")
        await self.load(options.rate, WARM_S, 1)
        say(f"{options.rate:g} requests/s and {options.events:g} events/s for {options.seconds:g} s")
        before, stages = self._running.cpu_s(), self._running.by_label(STAGES)
        samples = await self.load(options.rate, options.seconds, 2)
        used = cpu_since(before, self._running)
        stages = {name: s - stages.get(name, 0.0) for name, s in self._running.by_label(STAGES).items()}
        memory, shared_once, seen = self._running.memory_bytes(), self._running.family.shared_once_bytes(), self._seen
        say(f"feedback and probes alone: {QUIET_S:.0f} s")
        before = self._running.cpu_s()
        await self.load(0, QUIET_S, 3)
        quiet = cpu_since(before, self._running)
        idle = await self._idle_cores()
        report.add("idle_cpu", idle * 100)
        report.add("event_cpu", await self._event_cpu_ms(idle) if options.events else None)
        self.close()
        self._latency(samples, seen)
        self._freshness(seen)
        added_ms = {
            name: (used[name] / options.seconds - quiet[name] / QUIET_S) * 1000 / options.rate for name in sorted(used)
        }
        report.add("request_cpu", sum(added_ms.values()))
        report.add("memory", sum(memory.values()), "bytes")
        report.add("memory_shared_once", shared_once, "bytes")
        for name, seconds in stages.items():
            report.add(f"stage_{name}", seconds * 1000 / len(samples), "ms")
        for name in sorted(used):
            report.add(f"request_cpu_{name}", added_ms[name], "ms")
            report.add(f"cores_{name}", used[name] / options.seconds, "cores")
            report.add(f"memory_{name}", memory[name], "bytes")

    async def fill(self) -> None:
        """Items, and what users did before."""
        await self._put_items()
        await self._remember()

    async def one(self) -> Sample:
        """One request, at once."""
        (sample,) = await open_loop([0.0], self._recommend)
        return sample

    def close(self) -> None:
        self._client.close()

    async def _idle_cores(self) -> float:
        """What all processes take when nothing comes, a minute after they were ready and when what came is learned."""
        wait_s = max(2 * WINDOW_S, self._ready_at + IDLE_AFTER_S - time.monotonic())
        say(f"nothing: {wait_s:.0f} s until it counts, then {QUIET_S:.0f} s")
        await asyncio.sleep(wait_s)
        before = self._running.cpu_s()
        await asyncio.sleep(QUIET_S)
        return sum(cpu_since(before, self._running).values()) / QUIET_S

    async def _event_cpu_ms(self, idle: float) -> float:
        """What one event adds to the CPU time of all processes."""
        say(f"feedback alone: {EVENTS_S:.0f} s")
        self._seen, before = Seen(), self._running.cpu_s()
        rate = self._options.events / POST
        await open_loop(poisson(rate, EVENTS_S, self._options.seed + 20), self._feedback)
        used, sent = sum(cpu_since(before, self._running).values()), self._seen.events
        return (used - idle * EVENTS_S) * 1000 / max(1, sent)

    def _latency(self, samples: list[Sample], seen: Seen) -> None:
        report, good = self._report, [s for s in samples if s.ok]
        at, latency = [s.due_s for s in good], [s.latency_s * 1000 for s in good]
        for percent in (50, 99):
            report.add(f"recommend_p{percent}", windowed(at, latency, percent) if good else None, "ms")
            report.add(f"recommend_p{percent}_run", percentile(latency, percent) if good else None, "ms")
        seconds = self._options.seconds
        report.add("errors", seen.errors)
        report.add("degraded", seen.degraded / max(len(samples), 1), "share of answers")
        report.add("achieved_rate", len(good) / seconds, "requests a second", "higher")
        report.add("achieved_events", seen.events / seconds, "events a second", "higher")
        report.add("probe_rate", seen.probes / seconds, "requests a second")
        report.add("driver_late_p99", percentile([s.late_s * 1000 for s in samples], 99), "ms")
        report.add("labels_trained", self._running.metric("recsys_examples_total", "trainer"), "labels", "higher")
        report.add("breaker_open", self._running.metric("recsys_breaker_open", "trainer"), "0 or 1")

    def _freshness(self, seen: Seen) -> None:
        for kind, values in seen.fresh_ms.items():
            self._report.percentiles(f"freshness_{kind}", values)
            self._report.add(f"freshness_{kind}_probes", len(values), "probes", "higher")
        self._report.add("untrue_as_of", seen.untrue)

    async def _put_items(self) -> None:
        """The catalogue over HTTP; then wait until it is known."""
        count = self._options.items
        started = time.perf_counter()
        for start in range(0, count, ITEMS_A_PUT):
            items = [self._item(number) for number in range(start, min(start + ITEMS_A_PUT, count))]
            reply = await self._client.call("PUT", "/v1/items", orjson.dumps({"items": items}))
            if reply.status != 200:
                raise RuntimeError(f"PUT /v1/items answered {reply.status}: {reply.body[:300]!r}")
        put_s = time.perf_counter() - started
        self._report.add("items_put", count / put_s, "items/s", "higher")
        await _until(lambda: self._running.metric("recsys_catalogue_items") >= count)
        known_s = time.perf_counter() - started
        self._report.add("items_known", count / known_s, "items/s", "higher")
        say(f"{count} items put in {put_s:.1f} s, known after {known_s:.1f} s")

    def _item(self, number: int) -> dict[str, Any]:
        tags = [f"tag-{tag}" for tag in self._rng.integers(0, TAGS, 3)]
        attributes = {"category": f"kind-{number % KINDS}", "tags": tags}
        return {"version": 1, "item_id": str(number), "title": f"Item {number}", "attributes": attributes}

    def _pick(self) -> str:
        """An item, by popularity: the first tenth gets half of the clicks."""
        return str(int(self._options.items * self._rng.random() ** 3.32))

    async def _remember(self) -> None:
        """Every user's older clicks; wait until counters and state contain them."""
        for _ in range(USERS * HISTORY // 1000):
            events = [self._click(f"user-{self._rng.integers(USERS)}", self._pick()) for _ in range(1000)]
            await self._send(events)
        accepted_ms, started = now_ms(), time.perf_counter()
        while (await self._as_of("user-0"))["counters"]["time_ms"] < accepted_ms:
            await asyncio.sleep(0.1)
        say(f"{USERS * HISTORY} older clicks known {time.perf_counter() - started:.1f} s after the last was accepted")

    def _click(self, user: str, item_id: str, request_id: str | None = None) -> dict[str, Any]:
        self._events += 1
        event = {
            "version": 1,
            "event_id": f"load-{self._events}",
            "user_id": user,
            "item_id": item_id,
            "type": "click",
            "time_ms": now_ms(),
        }
        return event if request_id is None else event | {"request_id": request_id}

    async def _send(self, events: list[dict[str, Any]]) -> bool:
        reply = await self._client.post("/v1/feedback", {"events": events})
        good = reply.status == 200 and all(o["status"] == "accepted" for o in reply.json()["outcomes"])
        self._seen.events += len(events) if good else 0
        if not good:
            self._seen.errors += 1
            say(f"feedback answered {reply.status}: {reply.body[:300]!r}")
        return good

    async def load(self, rate: float, seconds: float, seed: int, *, probes: bool = True) -> list[Sample]:
        """Requests, feedback and probes for so long; what they see goes to a new `_seen`."""
        self._seen = Seen()
        options = self._options
        end = time.perf_counter() + seconds
        samples, *_ = await asyncio.gather(
            open_loop(poisson(rate, seconds, options.seed + seed), self._recommend),
            open_loop(poisson(options.events / POST, seconds, options.seed + seed + 10), self._feedback),
            *([self._probe_state(end), self._probe_trained(end)] if probes else []),
        )
        return samples

    async def _probe_state(self, end: float) -> None:
        """One click of a user of its own, then that user's answers until they contain it; a few times a second."""
        number = 0
        while time.perf_counter() < end:
            number += 1
            user = f"probe-{number % 100}"
            click = self._click(user, self._pick())
            await self._send([click])
            accepted, waiting = now_ms(), set(COVERED)
            while waiting and now_ms() - accepted < GIVE_UP_MS:
                as_of = await self._as_of(user)
                fresh_ms, covered = now_ms() - accepted, {k for k in waiting if as_of[k]["time_ms"] >= accepted}
                waiting -= covered
                for kind in covered:
                    self._seen.fresh_ms[kind].append(fresh_ms)
                if "user_state" in covered:
                    self._seen.untrue += not await self._has(user, click["event_id"])
                await asyncio.sleep(POLL_S)
            for kind in waiting:
                self._seen.fresh_ms[kind].append(math.inf)
            await asyncio.sleep(1 / PROBES_A_SECOND)

    async def _probe_trained(self, end: float) -> None:
        """A list and a click on it; from the end of its label's window, answers until their parameters contain it."""
        number = 0
        while time.perf_counter() < end:
            number += 1
            user = f"learner-{number % 100}"
            answer = await self._ask({"user_id": user, "n": 20})
            final = now_ms() + int(WINDOW_S * 1000)
            if answer is None:
                await asyncio.sleep(WINDOW_S)
                continue
            await self._send([self._click(user, answer["items"][0]["item_id"], answer["request_id"])])
            await asyncio.sleep((final - now_ms()) / 1000)
            while (as_of := await self._as_of(user))["parameters"]["time_ms"] < final:
                if now_ms() - final > GIVE_UP_MS:
                    break
                await asyncio.sleep(2 * POLL_S)
            fresh = as_of["parameters"]["time_ms"] >= final
            self._seen.fresh_ms["trained"].append(now_ms() - final if fresh else math.inf)

    async def _as_of(self, user: str) -> Any:
        """What an answer with one candidate, cheap to make, contains; nothing when there was no answer."""
        asked = {"user_id": user, "n": 1, "candidates": ["0"], "activation": "deferred"}
        answer = await self._ask(asked)
        return answer["as_of"] if answer else {kind: {"time_ms": 0} for kind in (*COVERED, "parameters")}

    async def _ask(self, asked: dict[str, Any]) -> dict[str, Any] | None:
        """A probe's request; an error counts."""
        self._seen.probes += 1
        reply = await self._client.post("/v1/recommend", asked)
        self._seen.errors += reply.status != 200
        return dict(reply.json()) if reply.status == 200 else None

    async def _has(self, user: str, event_id: str) -> bool:
        history = (await self._client.call("GET", f"/v1/users/{user}")).json()["history"]
        return any(event["event_id"] == event_id for event in history)

    async def _recommend(self, number: int) -> bool:
        user = f"user-{self._rng.integers(USERS)}"
        reply = await self._client.post("/v1/recommend", {"user_id": user, "n": 20})
        if reply.status != 200:
            self._seen.errors += 1
            return False
        answer = reply.json()
        self._seen.degraded += bool(answer["degraded"])
        shown = [item["item_id"] for item in answer["items"]]
        self._recent.append((time.perf_counter(), answer["request_id"], user, shown))
        return True

    async def _feedback(self, number: int) -> bool:
        """A POST of 50 clicks: up to half of them on lists shown just now, the rest on any items."""
        oldest = time.perf_counter() - RECENT_S
        self._recent = [entry for entry in self._recent if entry[0] > oldest]
        pairs = [(request, user, item) for _, request, user, shown in self._recent for item in shown]
        chosen: Sequence[int] = (
            self._rng.choice(len(pairs), min(POST // 2, len(pairs) // 5), replace=False).tolist() if pairs else []
        )
        events = [self._click(pairs[i][1], pairs[i][2], pairs[i][0]) for i in chosen]
        while len(events) < POST:
            events.append(self._click(f"user-{self._rng.integers(USERS)}", self._pick()))
        return await self._send(events)


def cpu_since(before: dict[str, float], running: Running) -> dict[str, float]:
    """CPU seconds since `before`, by process."""
    return {name: seconds - before.get(name, 0.0) for name, seconds in running.cpu_s().items()}


async def _until(done: Callable[[], bool], timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not done():
        if time.monotonic() > deadline:
            raise RuntimeError(f"the services did not catch up within {timeout_s:.0f} s")
        await asyncio.sleep(0.1)


if __name__ == "__main__":
    sys.exit(run("serve", measure, arguments))
