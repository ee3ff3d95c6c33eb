"""Three times what the system answers: the breaker stays closed, feedback is accepted, learning goes on, nothing grows, and soon after
the load's end all is as before.

First what it answers is found, open loop, by rates that rise until a twentieth is refused. Users click on lists that come within their
patience; their clicks, and as many plain ones again, are sent in batches four times a second. Everything is seen from outside: over HTTP,
and what the processes hold. Example:

    python -m load_tests.overload --items 2000 --seconds 6 --json
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import math
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import orjson
import psutil

from load_tests.client import Client, open_loop, poisson
from load_tests.common import Report, Running, percentile, run, say, services
from load_tests.serve import SETTINGS

USERS, KINDS = 2000, 40
SHOWN, CLICK_RATE = 20, 0.08
BATCHES_A_SECOND = 4
TIMES = 3.0
FIRST_RATE, FASTER, STEP_S, REFUSED = 20.0, 1.5, 3.0, 0.05
PROBES, NORMAL = 5, 3.0
"""Normal again: so many answers in a row within so many times the median of before, and nothing left to learn from."""
GIVE_UP_S = 60.0
GAUGES_S = 2.0
"""The trainer's gauges are at most so old."""
TASKS = 2


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--items", type=int, default=20_000)
    parser.add_argument("--seconds", type=float, default=30.0, help="of the overload (default: 30)")
    parser.add_argument("--patience", type=float, default=2.0, help="seconds a user waits for a list (default: 2)")


def measure(options: argparse.Namespace, report: Report) -> None:
    with services(SETTINGS) as running:
        running.wait_ready()
        asyncio.run(Overload(options, report, running).run())


class Overload:
    """The load on one running system."""

    def __init__(self, options: argparse.Namespace, report: Report, running: Running) -> None:
        self._options, self._report, self._running = options, report, running
        self._rng = np.random.default_rng(options.seed)
        self._client = Client(running.port)
        self._clicks: list[dict[str, Any]] = []
        self._number = 0
        self._feedback = Counter[str]()
        self._statuses = Counter[int]()

    async def run(self) -> None:
        options, report = self._options, self._report
        await self._put_items()
        async with self._batches():
            capacity = await self._capacity()
            normal_ms = await self._normal()
            await self._settle()
            before, learned = self._held(), self._learned()
            rate = TIMES * capacity
            say(
                f"answers {capacity:.0f} a second, takes {normal_ms:.0f} ms; now {rate:.0f} a second for {options.seconds:g} s"
            )
            memory, breaker = await self._overload(rate)
            while not self._statuses[503]:  # something else kept the machine busy while the capacity was measured
                rate *= 2
                say(f"nothing was refused: {rate:.0f} a second")
                memory, breaker = await self._overload(rate)
            recovery = await self._recovery(normal_ms)
        await self._settle()
        after = self._held()
        labels, answers = (now - then for now, then in zip(self._learned(), learned, strict=True))
        report.add("overload_recovery", recovery)
        report.add("overload_breaker_open", breaker)
        report.add("overload_feedback_refused", self._feedback["refused"])
        report.add("overload_learned", labels / max(1.0, answers * SHOWN * TASKS))
        report.add("overload_memory_growth", memory)
        for name in ("threads", "descriptors"):
            report.add(f"overload_{name}_growth", after[name] - before[name])
        report.add("capacity", capacity, "answers a second", "higher")
        report.add("normal", normal_ms, "ms as measured")
        report.add("feedback_accepted", self._feedback["accepted"], "events", "higher")
        for status, count in sorted(self._statuses.items()):
            report.add(f"answered_{status}", count, "answers")
        self._client.close()

    async def _put_items(self) -> None:
        for start in range(0, self._options.items, 1000):
            items = [
                {"item_id": str(n), "title": f"Item {n}", "attributes": {"category": f"kind-{n % KINDS}"}}
                for n in range(start, min(start + 1000, self._options.items))
            ]
            (await self._client.call("PUT", "/v1/items", orjson.dumps({"items": items}))).json()

    @contextlib.asynccontextmanager
    async def _batches(self) -> AsyncIterator[None]:
        """Meanwhile clicks are sent, several times a second."""
        stop = asyncio.Event()

        async def send() -> None:
            while not stop.is_set():
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), 1 / BATCHES_A_SECOND)
                clicks, self._clicks = self._clicks, []
                clicks += [
                    self._click(self._user(), str(self._rng.integers(self._options.items)))
                    for _ in range(len(clicks) + 5)
                ]
                reply = await self._client.post("/v1/feedback", {"events": clicks})
                good = [o for o in reply.json()["outcomes"] if o["status"] == "accepted"] if reply.status == 200 else []
                self._feedback["accepted"] += len(good)
                self._feedback["refused"] += len(clicks) - len(good)

        task = asyncio.create_task(send())
        try:
            yield
        finally:
            stop.set()
            await task

    def _user(self) -> str:
        return f"user-{self._rng.integers(USERS)}"

    def _click(self, user: str, item_id: str, request_id: str | None = None) -> dict[str, Any]:
        self._number += 1
        event = {"event_id": f"overload-{self._number}", "user_id": user, "item_id": item_id, "type": "click"}
        event["time_ms"] = time.time_ns() // 1_000_000
        return event if request_id is None else event | {"request_id": request_id}

    async def _recommend(self, _: int) -> bool:
        user, started = self._user(), time.perf_counter()
        reply = await self._client.post("/v1/recommend", {"user_id": user, "n": SHOWN})
        self._statuses[reply.status] += 1
        if reply.status != 200:
            return False
        if time.perf_counter() - started <= self._options.patience:
            answer = reply.json()
            shown = [item["item_id"] for item in answer["items"]]
            clicked = np.flatnonzero(self._rng.random(len(shown)) < CLICK_RATE).tolist()
            self._clicks += [self._click(user, shown[place], answer["request_id"]) for place in clicked]
        return True

    async def _capacity(self) -> float:
        """What is answered at the rate at which a twentieth is not."""
        rate, best = FIRST_RATE, 0.0
        while True:
            samples = await open_loop(poisson(rate, STEP_S, int(rate)), self._recommend)
            took_s = max(STEP_S, max(sample.due_s + sample.latency_s for sample in samples))
            answered = sum(sample.ok for sample in samples)
            best = max(best, answered / took_s)
            if answered < (1 - REFUSED) * len(samples):
                self._statuses.clear()
                return best
            rate *= FASTER

    async def _settle(self) -> None:
        """Until all that came was learned, and no connection is open."""
        self._client.close()
        await asyncio.sleep(GAUGES_S)
        deadline = time.monotonic() + GIVE_UP_S
        while not self._idle():
            if time.monotonic() > deadline:
                raise RuntimeError(f"the trainer did not catch up within {GIVE_UP_S:.0f} s")
            await asyncio.sleep(0.1)

    def _idle(self) -> bool:
        running = self._running
        return not running.metric("recsys_consumer_lag_records", "trainer") and not running.metric(
            "recsys_open_impressions", "trainer"
        )

    async def _normal(self) -> float:
        """The median latency of requests one by one."""
        times = []
        for number in range(4 * PROBES):
            started = time.perf_counter()
            await self._recommend(number)
            times.append((time.perf_counter() - started) * 1000)
        return percentile(times, 50)

    async def _overload(self, rate: float) -> tuple[float | None, float]:
        """Memory's growth from the second third to the last, as a share, and whether the breaker was ever open."""
        seconds = self._options.seconds
        memory: list[tuple[float, float]] = []
        breaker, started = 0.0, time.perf_counter()
        load = asyncio.create_task(open_loop(poisson(rate, seconds, self._options.seed + 1), self._recommend))
        while not load.done():
            at = (time.perf_counter() - started) / seconds
            memory.append((at, await asyncio.to_thread(lambda: float(sum(self._running.memory_bytes().values())))))
            breaker = max(breaker, await asyncio.to_thread(self._running.metric, "recsys_breaker_open", "trainer"))
            await asyncio.wait([load], timeout=0.5)
        await load
        second, last = (
            [held for at, held in memory if low <= at < high] for low, high in ((1 / 3, 2 / 3), (2 / 3, math.inf))
        )
        grown = float(np.median(last) / np.median(second) - 1) if second and last else None
        return grown, breaker

    async def _recovery(self, normal_ms: float) -> float:
        """Seconds from the load's end until answers are normal again and nothing waits to be learned but what is open."""
        started, good = time.perf_counter(), 0
        while good < PROBES and time.perf_counter() - started < GIVE_UP_S:
            asked = time.perf_counter()
            ok = await self._recommend(0)
            fast = (time.perf_counter() - asked) * 1000 <= NORMAL * normal_ms
            lag = await asyncio.to_thread(self._running.metric, "recsys_consumer_lag_records", "trainer")
            good = good + 1 if ok and fast and lag < 1000 else 0
            await asyncio.sleep(0.05)
        return time.perf_counter() - started if good >= PROBES else math.inf

    def _learned(self) -> tuple[float, float]:
        """Labels trained, and answers made, since the start."""
        running = self._running
        return running.metric("recsys_examples_total", "trainer"), running.metric("recsys_recommend_seconds_count")

    def _held(self) -> dict[str, int]:
        """Threads and open files of all processes."""
        held = {"threads": 0, "descriptors": 0}
        for process in itertools.chain(*self._running.family.members().values()):
            with contextlib.suppress(psutil.NoSuchProcess):
                held["threads"] += process.num_threads()
                held["descriptors"] += process.num_fds()
        return held


if __name__ == "__main__":
    sys.exit(run("overload", measure, arguments))
