"""Events per second that are accepted over HTTP, and appended to and read from each log: rounds of closed loops, their median.

HTTP: batches of 1,000 over two connections; single events over eight (`ingest_single`, the figure judged) and over one. The
services consume and learn meanwhile, and catch up before each measurement. The logs are called directly, in batches of 1,000
and up to 7 MB a round; Kafka's needs Java and Maven, or KAFKA_HOME: without them its figures are null.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import numpy as np
import orjson
import psutil

from load_tests.client import Client, closed_loop
from load_tests.common import ROUNDS, Report, Running, run, say, services
from recsys import config
from recsys.clock import SystemClock
from recsys.streams.base import EventLog
from recsys.streams.open_log import open_log
from recsys.testing.servers import kafka_server

ITEMS, USERS, BATCH = 1000, 5000, 1000
LOG_BATCHES = 20
"""Batches of one round on a log: 20,000 records, a tenth of a second to a second."""
BATCH_CONNECTIONS, SINGLE_CONNECTIONS = 2, 8


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=1.0, help="of one round over HTTP")


def measure(options: argparse.Namespace, report: Report) -> None:
    events = Events(options.seed)
    with services() as running:
        running.wait_ready()
        asyncio.run(over_http(running, report, events, options.seconds))
    for kind, opened in (("sqlite", sqlite_log), ("kafka", kafka_log)):
        try:
            with opened() as log:
                through_log(kind, log, report, events)
        except RuntimeError as error:
            say(f"{kind} was not measured: {error}")
            for name in ("append", "read"):
                report.add(f"log_{kind}_{name}", None, "records/s", "higher")


class Events:
    """An endless stream of distinct clicks."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._numbers = itertools.count()

    def take(self, count: int) -> list[dict[str, Any]]:
        now_ms = time.time_ns() // 1_000_000
        users, items = self._rng.integers(0, USERS, count), self._rng.integers(0, ITEMS, count)
        return [
            {
                "version": 1,
                "event_id": f"ingest-{number}",
                "user_id": f"user-{user}",
                "item_id": f"item-{item}",
                "type": "click",
                "time_ms": now_ms,
            }
            for number, user, item in zip(self._numbers, users.tolist(), items.tolist(), strict=False)
        ]

    def batches(self, count: int) -> list[bytes]:
        """Bodies of so many requests of one batch each."""
        return [orjson.dumps({"events": self.take(BATCH)}) for _ in range(count)]

    def singles(self, count: int) -> list[bytes]:
        """Bodies of so many requests of one event each."""
        return [orjson.dumps(event) for event in self.take(count)]


async def over_http(running: Running, report: Report, events: Events, seconds: float) -> None:
    """Batches, then single events over eight connections and over one."""
    items = [{"version": 1, "item_id": f"item-{n}", "title": f"Item {n}"} for n in range(ITEMS)]
    httpx.put(f"{running.url()}/v1/items", json={"items": items}, timeout=30.0).raise_for_status()
    client = Client(running.port)
    rates = await _rounds(client, BATCH_CONNECTIONS, seconds, lambda: events.batches(int(80 * seconds)))
    report.add("ingest_batch", median(rates) * BATCH)
    report.add("ingest_consumed", await _backlog(running, client), "events/s", "higher")
    for connections in (SINGLE_CONNECTIONS, 1):
        before = running.cpu_s()["ranking"]
        rates = await _rounds(client, connections, seconds, lambda: events.singles(int(4000 * seconds)))
        single, used = median(rates), running.cpu_s()["ranking"] - before
        report.add(f"ingest_single_{connections}conn_cpu", used * 1000 / (sum(rates) * seconds), "ms")
        report.add(f"ingest_single_{connections}conn", single, "events/s", "higher")
        if connections == SINGLE_CONNECTIONS:
            report.add("ingest_single", single)
        await _backlog(running, client)
    for name, memory in running.memory_bytes().items():
        report.add(f"memory_{name}", memory, "bytes")
    client.close()


async def _rounds(client: Client, connections: int, seconds: float, make: Callable[[], list[bytes]]) -> list[float]:
    """Calls per second of each round; each round's bodies are made before it begins."""
    rates = []
    for _ in range(ROUNDS):
        rates.append(await closed_loop(seconds, connections, _sender(client, make())))
    say(f"{connections} connections: calls/s " + ", ".join(f"{rate:.1f}" for rate in rates))
    return rates


def _sender(client: Client, bodies: list[bytes]) -> Callable[[int], Awaitable[bool]]:
    async def send(number: int) -> bool:
        reply = await client.call("POST", "/v1/feedback", bodies[number])
        return reply.status == 200 and all(o["status"] == "accepted" for o in reply.json()["outcomes"])

    return send


async def _backlog(running: Running, client: Client) -> float:
    """Wait until state and counters contain everything accepted; returns events per second while that lasted."""
    name = "recsys_consumer_lag_records"
    accepted_ms, started = time.time_ns() // 1_000_000, time.perf_counter()
    lag = running.metric(name)
    while True:
        reply = await client.post("/v1/recommend", {"user_id": "waiting", "n": 1, "candidates": ["item-0"]})
        if reply.json()["as_of"]["counters"]["time_ms"] >= accepted_ms:
            return lag / (time.perf_counter() - started)
        await asyncio.sleep(0.05)


@contextmanager
def sqlite_log() -> Iterator[EventLog]:
    """The embedded log in an empty folder."""
    with tempfile.TemporaryDirectory(prefix="recsys-log-") as folder:
        log = open_log(config.parse({"data_dir": folder}), SystemClock(), "load")
        try:
            yield log
        finally:
            log.close()


@contextmanager
def kafka_log() -> Iterator[EventLog]:
    """Kafka's log over a broker of its own. RuntimeError: it cannot be started."""
    home = psutil.Process().environ().get("KAFKA_HOME")
    with tempfile.TemporaryDirectory(prefix="recsys-log-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        (folder / "kafka").mkdir()
        with kafka_server(folder / "kafka", kafka_home=Path(home) if home else None) as server:
            broker = {"kind": "kafka", "bootstrap_servers": f"127.0.0.1:{server.port}"}
            log = open_log(config.parse({"data_dir": str(folder / "data"), "log": broker}), SystemClock(), "load")
            try:
                yield log
            finally:
                log.close()


def through_log(kind: str, log: EventLog, report: Report, events: Events) -> None:
    """Accepted, readable, and read records per second."""
    accepted, readable, read = [], [], []
    log.partitions("feedback")
    for _ in range(ROUNDS):
        batches = [[(e["user_id"], orjson.dumps(e)) for e in events.take(BATCH)] for _ in range(LOG_BATCHES)]
        offset = log.end("feedback", 0)
        started = time.perf_counter()
        for batch in batches:
            log.append("feedback", batch)
        accepted.append(LOG_BATCHES * BATCH / (time.perf_counter() - started))
        log.flush()
        readable.append(LOG_BATCHES * BATCH / (time.perf_counter() - started))
        started, count = time.perf_counter(), 0
        while count < LOG_BATCHES * BATCH:
            records = log.read("feedback", 0, offset, BATCH)
            count += len(records)
            offset = records.next
        read.append(count / (time.perf_counter() - started))
    report.add(f"log_{kind}_append", median(accepted), "records/s", "higher")
    report.add(f"log_{kind}_append_until_readable", median(readable), "records/s", "higher")
    report.add(f"log_{kind}_read", median(read), "records/s", "higher")


if __name__ == "__main__":
    sys.exit(run("ingest", measure, arguments))
