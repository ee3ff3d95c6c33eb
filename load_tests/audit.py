"""How long `recsys audit` and `recsys audit --replay` take on a system that accepted a million events: the replay from nothing, since
no checkpoint was taken in between.

A hundredth of the events are clicks on lists that were asked for; the rest are plain ones. Example:

    python -m load_tests.audit --events 20000 --json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from typing import Any

import httpx
import numpy as np

from load_tests.common import ROOT, Report, Running, run, say, services
from load_tests.ingest import BATCH, ITEMS, USERS, Events

SHOWN, CLICKS = 20, 5
SETTINGS = "[training]\ncheckpoint_s = 1000000\n"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--events", type=int, default=1_000_000)


def measure(options: argparse.Namespace, report: Report) -> None:
    with services(SETTINGS) as running:
        running.wait_ready()
        answers = fill(running, options.events, options.seed)
        running.stop()
        plain, taken_s = audit(running)
        replay, replayed_s = audit(running, "--replay")
    report.add("audit", taken_s)
    report.add("audit_replay", replayed_s)
    report.add("audit_open", float(not (plain["closes"] and replay["equal"])))
    report.add("accepted", plain["partitions"]["feedback/0"]["accepted"], "events", "higher")
    report.add("answers", answers, "answers", "higher")
    report.add("steps", replay["to_step"] - replay["from_step"], "steps", "higher")


def fill(running: Running, events: int, seed: int) -> int:
    """Accept so many events; how many answers some of them were clicks on."""
    rng, plain, answers = np.random.default_rng(seed), Events(seed), 0
    with httpx.Client(base_url=running.url(), timeout=60.0) as http:
        items = [
            {"version": 1, "item_id": f"item-{n}", "attributes": {"category": f"kind-{n % 20}"}} for n in range(ITEMS)
        ]
        http.put("/v1/items", json={"items": items}).raise_for_status()
        for batch in range(events // BATCH):
            clicks: list[dict[str, Any]] = []
            for _ in range(BATCH // 100 // CLICKS):
                user = f"user-{rng.integers(USERS)}"
                answer = http.post("/v1/recommend", json={"user_id": user, "n": SHOWN}).raise_for_status().json()
                answers += 1
                names = [item["item_id"] for item in answer["items"]]
                for name in rng.permutation(names)[:CLICKS].tolist():
                    of = {"user_id": user, "item_id": name, "type": "click", "request_id": answer["request_id"]}
                    clicks.append({"version": 1, "event_id": f"{answer['request_id']}-{name}", **of})
            send(http, [*clicks, *plain.take(BATCH - len(clicks))])
            if batch % 100 == 99:
                say(f"{(batch + 1) * BATCH:,} events accepted")
    while running.metric("recsys_consumer_lag_records", "trainer") > 0:
        time.sleep(1.0)
    return answers


def send(http: httpx.Client, events: list[dict[str, Any]]) -> None:
    """Until they are accepted."""
    while (answer := http.post("/v1/feedback", json={"events": events})).status_code == 503:
        time.sleep(float(answer.headers.get("Retry-After", 1)))
    answer.raise_for_status()


def audit(running: Running, *more: str) -> tuple[dict[str, Any], float]:
    """What it says, and how many seconds it took."""
    config = running.folder / "config.toml"
    command = [sys.executable, "-m", "services.cli.main", "audit", *more, "--config", str(config), "--json"]
    started = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=False)
    took = time.monotonic() - started
    found: dict[str, Any] = json.loads(done.stdout)
    say(f"audit {' '.join(more)}: exit code {done.returncode} after {took:.1f} s; {found.get('why')}")
    return found, took


if __name__ == "__main__":
    sys.exit(run("audit", measure, arguments))
