"""The part of `load_tests.retrieval` that needs a running system: new items, memory, start, and what a request costs."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import psutil

from load_tests.common import Report, Running, percentile, say, services
from recsys.testing.world import World

SMALL = 10_000
ITEMS_A_PUT, USERS, CLICKS_EACH = 5000, 100, 20
REQUESTS, NEW = 300, 100
IDLE_S = 5.0
WAIT_S = 600.0


def measure(report: Report, num_items: int, seed: int) -> None:
    """10,000 items first, then all of them, with the same users and the same trained rows."""
    world = World(seed, num_items=num_items)
    items = [
        {"version": 1, "item_id": item.item_id, "title": item.title, "attributes": dict(item.attributes)}
        for item in world.items()
    ]
    with services("[retrieval]\nrebuild_s = 60.0\n") as running, httpx.Client(timeout=30.0) as http:
        running.wait_ready()
        http.base_url = httpx.URL(running.url())
        Served(report, running, http, seed).run(items)


class Served:
    """One running system and what was put into it."""

    def __init__(self, report: Report, running: Running, http: httpx.Client, seed: int) -> None:
        self._report, self._running, self._http = report, running, http
        self._rng = np.random.default_rng(seed)
        self._new = 0

    def run(self, items: list[dict[str, Any]]) -> None:
        small = min(SMALL, len(items) // 2)
        self._put(items[:small])
        self._click(small)
        self._indexed(small)
        before, cpu = self._memory(), self._request_cpu()
        started = time.monotonic()
        self._put(items[small:])
        self._report.add("put_rate", (len(items) - small) / (time.monotonic() - started), "items/s", "higher")
        self._until(lambda: self._running.metric("recsys_catalogue_items") >= len(items), "the catalogue")
        self._indexed(len(items))
        added = self._memory() - before
        titles = sum(len(item["title"].encode()) for item in items[small:])
        self._report.add("memory_per_item", (added - titles) / (len(items) - small), "bytes an item")
        large = self._request_cpu()
        self._report.add("request_cpu_small", cpu, "cpu ms")
        self._report.add("request_cpu_large", large, "cpu ms")
        self._report.add("request_cpu_growth", large / cpu, "ratio")
        self._new_items(len(items))
        self._restart(len(items))

    def _until(self, done: Callable[[], bool], what: str, wait_s: float = WAIT_S) -> None:
        deadline = time.monotonic() + wait_s
        while not done():
            if time.monotonic() > deadline:
                raise RuntimeError(f"{what} did not come within {wait_s:.0f} s")
            time.sleep(0.2)

    def _put(self, items: list[dict[str, Any]]) -> None:
        say(f"putting {len(items)} items")
        for start in range(0, len(items), ITEMS_A_PUT):
            body = {"items": items[start : start + ITEMS_A_PUT]}
            self._http.put("/v1/items", json=body).raise_for_status()

    def _click(self, num_items: int) -> None:
        now_ms = time.time_ns() // 1_000_000
        for user in range(USERS):
            events = [
                {
                    "version": 1,
                    "event_id": f"{user}-{n}",
                    "user_id": f"user-{user}",
                    "item_id": f"item-{item}",
                    "type": "click",
                    "time_ms": now_ms + n,
                }
                for n, item in enumerate(self._rng.integers(num_items, size=CLICKS_EACH).tolist())
            ]
            self._http.post("/v1/feedback", json={"events": events}).raise_for_status()

    def _indexed(self, num_items: int) -> None:
        """Until a generation over that many items is in use."""
        say(f"waiting for a generation over {num_items} items")
        self._until(lambda: self._running.metric("recsys_generation_items") >= num_items, "the generation")

    def _memory(self) -> int:
        """Ranking's own, after as many requests as make it touch what it maps."""
        for _ in range(REQUESTS):
            self._recommend()
        return int(self._running.family.members()["ranking"][0].memory_info().rss)

    def _recommend(self, **more: Any) -> list[dict[str, Any]]:
        body = {"user_id": f"user-{self._rng.integers(USERS)}", "n": 20, **more}
        answer = self._http.post("/v1/recommend", json=body).raise_for_status().json()
        found: list[dict[str, Any]] = answer["items"]
        return found

    def _request_cpu(self) -> float:
        """CPU ms of one request over all processes, without what they use when nobody asks."""
        idle = self._cpu_over(lambda: time.sleep(IDLE_S))
        started = time.monotonic()
        used = self._cpu_over(lambda: [self._recommend() for _ in range(REQUESTS)])
        return (used - idle * (time.monotonic() - started) / IDLE_S) * 1000 / REQUESTS

    def _cpu_over(self, act: Callable[[], Any]) -> float:
        before = sum(self._running.cpu_s().values())
        act()
        return sum(self._running.cpu_s().values()) - before

    def _new_items(self, num_items: int) -> None:
        """From the answer to PUT until the source `nearest` brings the item, asked for by an attribute of its own."""
        say(f"{NEW} new items")
        waits_ms = []
        for _ in range(NEW):
            self._new += 1
            tag, item_id = f"new-{self._new}", f"item-{num_items + self._new}"
            item = {"version": 1, "item_id": item_id, "title": tag, "attributes": {"category": "kind-1", "tags": [tag]}}
            self._http.put("/v1/items", json={"items": [item]}).raise_for_status()
            started = time.perf_counter()
            while not any("nearest" in found["sources"] for found in self._recommend(filters={"tags": tag})):
                if time.perf_counter() - started > 10.0:
                    raise RuntimeError(f"{item_id} was not searchable within 10 s")
            waits_ms.append((time.perf_counter() - started) * 1000)
        for percent in (50, 99):
            self._report.add(f"searchable_p{percent}", percentile(waits_ms, percent), "ms")

    def _saved(self, num_items: int) -> bool:
        """Whether ranking's file of the catalogue holds that many items."""
        path = self._running.folder / "data" / "ranking" / "catalogue.json"
        return path.exists() and sum(json.loads(path.read_bytes())["positions"].values()) >= num_items

    def _restart(self, num_items: int) -> None:
        """Kill ranking; from its new process's start until it says it is ready."""
        say("restarting ranking")
        self._until(lambda: self._saved(num_items), "the catalogue's file", 150.0)
        ranking = self._running.family.members()["ranking"][0]
        os.kill(ranking.pid, signal.SIGKILL)
        self._until(lambda: self._started() not in (None, ranking.pid), "a new ranking process")
        created = psutil.Process(self._started()).create_time()
        self._running.wait_ready()
        self._report.add("start", time.time() - created, "s")

    def _started(self) -> int | None:
        try:
            (process, *_) = self._running.family.members().get("ranking", (None,))
        except psutil.Error:  # it ends just now
            return None
        return process.pid if process else None
