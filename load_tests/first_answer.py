"""Seconds from the start of `recsys up`, on an empty folder and with nothing compiled, to the first personalised answer.

Personalised: after three clicks on items of one kind, at least three of the ten items shown are of that kind, and the list
differs from the one before. A round takes about ten seconds; three are the default.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from statistics import median

import httpx

from load_tests.common import Report, Running, run, say, services

KINDS, PER_KIND, SHOWN, CLICKS = 10, 10, 10, 3
WAIT_S = 30.0


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=3)


def measure(options: argparse.Namespace, report: Report) -> None:
    """The median round, and where its time went."""
    rounds = [one_round() for _ in range(options.rounds)]
    for number, round_ in enumerate(rounds):
        say(f"round {number + 1}: " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in round_.items()))
    report.add("first_answer", median(r["answer"] for r in rounds))
    report.add("ready", median(r["ready"] for r in rounds), "s")
    report.add("click_to_answer", median(r["answer"] - r["clicked"] for r in rounds), "s")


def one_round() -> dict[str, float]:
    """Seconds since the start at which the services were ready, the clicks were sent, the answer was personal."""
    with tempfile.TemporaryDirectory(prefix="recsys-numba-") as empty:
        started = time.perf_counter()
        with services(environment={"NUMBA_CACHE_DIR": empty}) as running:
            running.wait_ready()
            ready = time.perf_counter() - started
            clicked = personalise(running) - started
            return {"ready": ready, "clicked": clicked, "answer": time.perf_counter() - started}


def personalise(running: Running) -> float:
    """Put the items, click three of the kind shown least, wait until the list shows it; returns when the clicks were sent."""
    items = [
        {"version": 1, "item_id": f"item-{i}", "title": f"Item {i}", "attributes": {"category": f"kind-{i % KINDS}"}}
        for i in range(KINDS * PER_KIND)
    ]
    with httpx.Client(base_url=running.url(), timeout=10.0) as http:
        http.put("/v1/items", json={"items": items}).raise_for_status()
        last = {"cursor": len(items) - 1}
        _until(lambda: bool(http.get("/v1/items", params=last).json()["items"]), "the catalogue was not known")
        before = _shown(http)
        kind = min(range(KINDS), key=lambda k: (_count(before, k), k))
        now_ms = time.time_ns() // 1_000_000
        events = [
            {
                "version": 1,
                "event_id": f"click-{n}",
                "user_id": "first",
                "item_id": f"item-{kind + n * KINDS}",
                "type": "click",
                "time_ms": now_ms + n,
            }
            for n in range(CLICKS)
        ]
        clicked = time.perf_counter()
        http.post("/v1/feedback", json={"events": events}).raise_for_status()
        _until(lambda: _personal(_shown(http), before, kind), "the list did not follow the clicks")
    return clicked


def _personal(shown: list[str], before: list[str], kind: int) -> bool:
    return _count(shown, kind) >= 3 and shown != before


def _count(shown: list[str], kind: int) -> int:
    return sum(int(item_id.removeprefix("item-")) % KINDS == kind for item_id in shown)


def _shown(http: httpx.Client) -> list[str]:
    answer = http.post("/v1/recommend", json={"user_id": "first", "n": SHOWN}).raise_for_status().json()
    return [item["item_id"] for item in answer["items"]]


def _until(done: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not done():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{otherwise} within {WAIT_S:.0f} s")
        time.sleep(0.002)


if __name__ == "__main__":
    sys.exit(run("first_answer", measure, arguments))
