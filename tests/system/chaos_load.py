"""The traffic of a chaos run: users who are shown lists and click, and probes that tell whether health is true."""

from __future__ import annotations

import json
import math
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from recsys.testing.world import World

EVENTS_PER_S, REQUESTS_PER_S = 20.0, 3.0
THROUGH_S, CALM_TIMES = 5.0, 8.0
"""What was accepted must be in answers this soon while health says ready; on a machine that is busy with something else, in so many
times what it takes while nobody is killed."""
POLL_S = 0.5
WINDOW_S = 1.5
"""Label windows of the run."""
SHOWN = 8
ITEMS = 120


def now_ms() -> int:
    return time.time_ns() // 1_000_000


class Accepted:
    """Ids of the events that were answered `accepted`, kept on disk so that a run can be resumed."""

    def __init__(self, path: Path) -> None:
        self._file, self._lock = path.open("a+"), threading.Lock()
        self._file.seek(0)
        self.ids: dict[str, str] = dict(line.split("\t") for line in self._file.read().splitlines())

    def add(self, event_id: str, user_id: str) -> None:
        with self._lock:
            if event_id not in self.ids:
                self.ids[event_id] = user_id
                self._file.write(f"{event_id}\t{user_id}\n")
                self._file.flush()

    def __len__(self) -> int:
        return len(self.ids)


class Traffic:
    """Sends until told to stop, each event again and again, under its id, until it was accepted."""

    def __init__(self, url: str, accepted: Accepted, seed: int, run: str) -> None:
        self.url, self.accepted, self._run = url, accepted, run
        self.world = World(seed, num_users=60, num_items=ITEMS, num_kinds=8)
        self._items = {item.item_id for item in self.world.items()}
        self._rng = random.Random(seed)
        self._waiting: list[dict[str, Any]] = []
        self._lock = threading.Lock()
        self._number = 0
        self._stop = threading.Event()
        self.requests = self.answered = 0
        self._threads = [
            threading.Thread(target=self._every, args=(pace, work), daemon=True)
            for pace, work in ((0.25, self._send), (1 / REQUESTS_PER_S, self._ask))
        ]

    def put_items(self) -> None:
        items = [
            {"version": 1, "item_id": i.item_id, "title": i.title, "attributes": dict(i.attributes)}
            for i in self.world.items()
        ]
        httpx.put(f"{self.url}/v1/items", json={"items": items}, timeout=20.0).raise_for_status()

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def _every(self, pace_s: float, work: Callable[[httpx.Client], None]) -> None:
        with httpx.Client(base_url=self.url, timeout=10.0) as http:
            due = time.monotonic()
            while not self._stop.is_set():
                due = max(due + pace_s, time.monotonic() - 5.0)  # open loop, but no flood after an outage
                try:
                    work(http)
                except httpx.HTTPError:
                    self._stop.wait(0.1)
                self._stop.wait(max(0.0, due - time.monotonic()))

    def _event(self, user_id: str, item_id: str, **more: Any) -> dict[str, Any]:
        with self._lock:
            self._number += 1
            event_id = f"{self._run}-{self._number}"
        return {
            "version": 1,
            "event_id": event_id,
            "user_id": user_id,
            "item_id": item_id,
            "type": "click",
            "time_ms": now_ms(),
            **more,
        }

    def _send(self, http: httpx.Client) -> None:
        for _ in range(round(EVENTS_PER_S / 4)):
            item_id = f"item-{self._rng.randrange(ITEMS)}"
            self._waiting.append(self._event(self.world.users[self._rng.randrange(60)], item_id))
        self.flush(http)

    def flush(self, http: httpx.Client) -> None:
        """Send what was not accepted yet; what is answered `duplicate` was accepted before, without our knowing."""
        batch = self._waiting[:500]
        answer = http.post("/v1/feedback", json={"events": batch})
        if answer.status_code != 200:
            return
        for event, outcome in zip(batch, answer.json()["outcomes"], strict=True):
            assert outcome["status"] in ("accepted", "duplicate"), outcome
            self.accepted.add(event["event_id"], event["user_id"])
        del self._waiting[: len(batch)]

    def _ask(self, http: httpx.Client) -> None:
        user = self.world.any_user()
        user_id = self.world.users[user]
        self.requests += 1
        answer = http.post("/v1/recommend", json={"user_id": user_id, "n": SHOWN})
        if answer.status_code != 200:
            return
        self.answered += 1
        body = answer.json()
        ids = [item["item_id"] for item in body["items"]]
        known = [i for i in ids if i in self._items]
        clicked = self.world.clicks(user, known).tolist()
        for item_id, hit in zip(known, clicked, strict=True):
            if hit:
                self._waiting.append(self._event(user_id, item_id, request_id=body["request_id"]))

    def stop(self, timeout_s: float = 60.0) -> int:
        """End, after all that waits was accepted; how many were not."""
        self._stop.set()
        for thread in self._threads:
            thread.join(30.0)
        deadline = time.monotonic() + timeout_s
        with httpx.Client(base_url=self.url, timeout=10.0) as http:
            while self._waiting and time.monotonic() < deadline:
                try:
                    self.flush(http)
                except httpx.HTTPError:
                    time.sleep(0.2)
        return len(self._waiting)


KINDS = ("click", "item", "label")
OF = {"ranking": ("click", "item"), "trainer": ("label",), "parameter": ("label",)}
"""Whose health answers for which probe."""


class Probes:
    """Polls health, and sends a click, an item and a label about every second to see whether it is true."""

    def __init__(self, urls: dict[str, str], run: str) -> None:
        self._urls, self._run = urls, run
        self._stop = threading.Event()
        self._since: dict[str, float] = {}
        """When the probe that is under way was accepted, by kind."""
        self._done_s: dict[str, float] = {}
        self._prompt_s: dict[str, float] = {}
        """When the last probe began that came through within `through_s`: while somebody catches up, they come through late."""
        self._ready: dict[str, bool] = {}
        self._down: dict[str, float] = {}
        """Since when each process has not said ready."""
        self._up: dict[str, float] = {}
        """Since when each has said ready without a pause."""
        self.during, self.hit = "", 0.0
        """The last kill, and when it was."""
        self._looked_s: dict[str, float] = {}
        """When the last answer was asked for that had not what was accepted, by kind."""
        self._took_s: list[float] = []
        """Of probes that came through."""
        self.through_s = THROUGH_S
        self.untrue: list[dict[str, Any]] = []
        self.polls = 0
        self._counting = threading.Lock()
        work = (self._clicks, self._items, self._labels)
        self._threads = [threading.Thread(target=self._loop, args=(one,), daemon=True) for one in work]
        self._threads.append(threading.Thread(target=self._poll, daemon=True))

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(30.0)

    def healthy(self, after: float) -> bool:
        """Whether every process says ready, and every kind of probe that began after `after` (monotonic) came through."""
        return all(self._ready.get(name) for name in self._urls) and all(
            self._done_s.get(kind, 0.0) > after for kind in KINDS
        )

    def _loop(self, work: Callable[[httpx.Client, int], None]) -> None:
        number = 0
        with httpx.Client(base_url=self._urls["ranking"], timeout=3.0) as http:
            while not self._stop.is_set():
                number += 1
                try:
                    work(http, number)
                except (httpx.HTTPError, KeyError, json.JSONDecodeError):
                    self._stop.wait(0.2)
                self._stop.wait(0.5)

    def _through(self, kind: str, began: float, seen: Callable[[], bool]) -> None:
        """Wait until what was accepted is seen, however long."""
        self._looked_s.pop(kind, None)
        self._since[kind] = began
        try:
            while not self._stop.is_set():
                asked_s = time.monotonic()
                try:
                    if seen():
                        self._done_s[kind] = began
                        took_s = time.monotonic() - began
                        self._took_s.append(took_s)
                        if took_s <= self.through_s:
                            self._prompt_s[kind] = began
                        return
                    self._looked_s[kind] = asked_s
                except (httpx.HTTPError, KeyError, json.JSONDecodeError):
                    pass
                self._stop.wait(0.1)
        finally:
            self._since.pop(kind, None)

    def _clicks(self, http: httpx.Client, number: int) -> None:
        event_id, user_id = f"{self._run}-click-{number}", f"probe-click-{number % 20}"
        event = {"event_id": event_id, "user_id": user_id, "item_id": f"item-{number % ITEMS}", "type": "click"}
        http.post("/v1/feedback", json=event).raise_for_status()
        self._through(
            "click",
            time.monotonic(),
            lambda: event_id in [e["event_id"] for e in http.get(f"/v1/users/{user_id}").json()["history"]],
        )

    def _items(self, http: httpx.Client, number: int) -> None:
        item_id, kind = f"probe-item-{number % 50}", f"{self._run}-{number}"
        item = {"item_id": item_id, "title": "Probe", "attributes": {"category": kind}}
        http.put("/v1/items", json=item).raise_for_status()
        asked = {"user_id": "probe-item", "n": 1, "filters": {"category": kind}}
        self._through(
            "item",
            time.monotonic(),
            lambda: [i["item_id"] for i in http.post("/v1/recommend", json=asked).json()["items"]] == [item_id],
        )

    def _labels(self, http: httpx.Client, number: int) -> None:
        asked = {"user_id": f"probe-label-{number % 20}", "n": 2}
        answer = http.post("/v1/recommend", json=asked).raise_for_status().json()
        if not answer["items"] or "unlogged" in answer["degraded"]:
            return
        final_ms = now_ms() + int(WINDOW_S * 1000)
        began = time.monotonic() + WINDOW_S
        self._through(
            "label",
            began,
            lambda: http.post("/v1/recommend", json=asked).json()["as_of"]["parameters"]["time_ms"] >= final_ms,
        )

    def _poll(self) -> None:
        with httpx.Client(timeout=2.0) as http:
            while not self._stop.is_set():
                for name, url in self._urls.items():
                    began = time.monotonic()
                    late = [k for k in OF[name] if began - self._since.get(k, began) > self.through_s]
                    through = all(self._prompt_s.get(kind, 0.0) > self._down.get(name, began) for kind in KINDS)
                    try:
                        answer = http.get(f"{url}/readyz")
                        said, why = answer.status_code, answer.json().get("reason", "")
                    except (httpx.HTTPError, json.JSONDecodeError):
                        said, why = 0, ""  # no answer is no claim
                    with self._counting:
                        self._judge(name, said, late, through, why)
                self._stop.wait(POLL_S)

    def taken(self) -> tuple[list[dict[str, Any]], int]:
        """What was untrue, and how many polls there were, since it was asked last."""
        with self._counting:
            found = self.untrue, self.polls
            self.untrue, self.polls = [], 0
        return found

    def calm(self) -> None:
        """Nobody was killed so far: what probes took until now is what they take on this machine."""
        took = sorted(self._took_s)
        if took:
            self.through_s = max(THROUGH_S, CALM_TIMES * took[len(took) * 9 // 10])

    def _claimed_s(self, kind: str) -> float:
        """Since when every process that this kind of probe goes through has said ready; never where one does not."""
        ways = self._urls if kind == "label" else ("ranking",)
        return max(self._up.get(name, math.inf) for name in ways)

    def _untrue(self, name: str, said: int, late: list[str], why: str) -> None:
        """Keep what helps to find the cause."""
        now_s = time.monotonic()
        self.untrue.append(
            {
                "process": name,
                "said": said,
                "why": why,
                "late": {kind: round(now_s - self._since.get(kind, now_s), 1) for kind in late},
                "ready_for_s": {each: round(now_s - since_s, 1) for each, since_s in self._up.items()},
                "during": self.during,
                "after_s": round(now_s - self.hit, 1),
                "time_ms": now_ms(),
            }
        )

    def _judge(self, name: str, said: int, late: list[str], through: bool, why: str) -> None:
        """`late` and `through` were so before it was asked."""
        self.polls += 1
        self._ready[name] = said == 200
        # Not through meanwhile, though somebody asked since all that answer for it say ready: a probe whose way was down could not look.
        still = [kind for kind in late if kind in self._since and self._looked_s.get(kind, 0.0) > self._claimed_s(kind)]
        if said == 200 and still:
            self._untrue(name, said, still, why)
        if said == 200:
            self._down.pop(name, None)
            self._up.setdefault(name, time.monotonic())
            return
        self._up.pop(name, None)
        self._down.setdefault(name, time.monotonic())
        # Probes of every kind began and came through in time while it said so all along: it was not true.
        if said == 503 and through:
            self._untrue(name, said, [], why)
