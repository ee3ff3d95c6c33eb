"""Hostile input into every door of a running system: `python -m tests.system.hostile --each 10000 --seed 1 --json`.

Doors: HTTP routes, the five topics, gRPC, files that commands read, what is typed after commands. After each, the same
processes must run (0 crashes), a click, an item and a label must come through (0 stalls), and memory must be back to where it was.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil

from recsys import config
from recsys.clock import SystemClock
from recsys.errors import BadInput
from recsys.parameters import parameter_pb2 as pb
from recsys.streams.open_log import open_log
from recsys.types import TOPICS
from tests.system.chaos_load import WINDOW_S, Accepted, Probes, Traffic
from tests.system.embedded import ROOT, Embedded, wait_for
from tests.system.hostile_commands import Commands, typed
from tests.system.hostile_files import Files
from tests.system.mutate import Mutator

OPTIONS = f"""
tasks = [{{ name = "click", types = ["click"], window_s = {WINDOW_S} }}]
training.checkpoint_s = 5
parameter.snapshot_s = 7
ranking.deadline_ms = 10000
"""
ROUTES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("POST", "/v1/recommend", {"user_id": "h1", "n": 3, "context": {"a": "b"}, "filters": {"category": ["kind-1"]}}),
    (
        "POST",
        "/v1/feedback",
        {"events": [{"event_id": "h", "user_id": "h1", "item_id": "item-1", "type": "click", "request_id": "r"}]},
    ),
    (
        "PUT",
        "/v1/items",
        {"items": [{"item_id": "h-item", "title": "x", "attributes": {"category": "c", "tags": ["t"]}}]},
    ),
    ("PATCH", "/v1/items", {"item_id": "h-item", "attributes": {"price": 3}}),
)
PATHS = (("GET", "/v1/items/{}"), ("DELETE", "/v1/items/h-{}"), ("GET", "/v1/users/{}"), ("GET", "/v1/items?limit={}"))
RESULT = ROOT / "load_tests/results/hostile.json"
SETTLE_S = 60.0
GROWTH_BYTES = 96 * 2**20
"""What a process may have grown by after a door: allocators keep some, and what is valid is learned."""


class Hostile:
    """One running system and what is sent into it."""

    def __init__(self, system: Embedded, each: int, seed: int) -> None:
        self.system, self.each, self.seed, self.mutator = system, each, seed, Mutator(seed)
        self.said: dict[str, str] = {}
        self.traffic = Traffic(system.url("ranking"), Accepted(system.folder / "accepted.txt"), seed, f"h{seed}")
        self.probes = Probes({name: system.url(name) for name in ("ranking", "trainer", "parameter")}, f"h{seed}")

    def run(self, doors: Sequence[str]) -> list[dict[str, Any]]:
        """A row for each door of these, or of all."""
        self.system.start()
        self.traffic.put_items()
        self.traffic.start()
        self.probes.start()
        self._settled(time.monotonic())
        time.sleep(2 * WINDOW_S)  # some deltas, impressions and clicks to change
        return [self._door(name, work) for name, work in self._doors() if not doors or name in doors]

    def _doors(self) -> Iterator[tuple[str, Callable[[], Counter[str]]]]:
        for method, path, valid in ROUTES:
            yield f"{method} {path}", lambda m=method, p=path, v=valid: self._route(m, p, v)
        yield "paths", self._paths
        for topic in TOPICS:
            yield f"topic {topic}", lambda t=topic: self._topic(t)
        yield "grpc", self._grpc
        yield "files", lambda: self._commands(lambda commands: Files(commands).each(self.each))
        yield "typed", lambda: self._commands(lambda commands: typed(commands, self.each))

    def _door(self, name: str, work: Callable[[], Counter[str]]) -> dict[str, Any]:
        pids, before = self.system.pids(), self._memory()
        answers = work()
        stalled = 0
        try:
            self._settled(time.monotonic())
        except AssertionError:
            stalled = 1
        after = self._memory()
        row = {
            "door": name,
            "sent": self.each,
            "seed": self.seed,
            "date": time.strftime("%Y-%m-%d"),
            "answers": dict(answers),
            "crashes": sum(self.system.pids().get(service) != pid for service, pid in pids.items())
            + answers["crashed"],
            "stalls": stalled,
            "grown_bytes": {service: after[service] - before[service] for service in pids if service in after},
        }
        print(json.dumps(row), file=sys.stderr)
        return row

    def _settled(self, since: float) -> None:
        wait_for(lambda: self.probes.healthy(since), "a click, an item and a label come through", SETTLE_S)

    def _memory(self) -> dict[str, int]:
        return {name: psutil.Process(pid).memory_info().rss for name, pid in self.system.pids().items()}

    def _route(self, method: str, path: str, valid: dict[str, Any]) -> Counter[str]:
        plain = json.dumps(valid).encode()
        answers: Counter[str] = Counter()
        with httpx.Client(base_url=self.system.url("ranking"), timeout=10.0) as http:
            for _ in range(self.each):
                try:
                    answers[str(http.request(method, path, content=self.mutator.any(plain)).status_code)] += 1
                except httpx.HTTPError as error:
                    answers[type(error).__name__] += 1
        answers["crashed"] += answers["500"]
        return answers

    def _paths(self) -> Counter[str]:
        answers: Counter[str] = Counter()
        host, port = "127.0.0.1", self.system.ports["ranking"]
        with httpx.Client(timeout=10.0) as http:
            for number in range(self.each):
                method, path = PATHS[number % len(PATHS)]
                wrong = "".join(f"%{byte:02x}" for byte in self.mutator.any(b"item-1")[:200])
                try:
                    answers[str(http.request(method, f"http://{host}:{port}{path.format(wrong)}").status_code)] += 1
                except (httpx.HTTPError, httpx.InvalidURL) as error:
                    answers[type(error).__name__] += 1
        answers["crashed"] += answers["500"]
        return answers

    def _topic(self, topic: str) -> Counter[str]:
        """Append wrong records beside the system's own."""
        log = open_log(config.load(self.system.config, {}), SystemClock(), "hostile")
        answers: Counter[str] = Counter()
        try:
            # Not the probes' own: a changed item that is valid takes the place of the one that is waited for.
            found = log.read(topic, 0, log.begin(topic, 0), 200)
            valid = [r for r in found if r.value and not r.key.startswith("probe")]
            valid = valid or list(log.read("feedback", 0, log.begin("feedback", 0), 50))
            done = 0
            while done < self.each:
                batch = [valid[(done + n) % len(valid)] for n in range(min(100, self.each - done))]
                messages = [(record.key, self.mutator.any(record.value)) for record in batch]
                try:
                    log.append(topic, messages)
                    answers["appended"] += len(messages)
                except BadInput:
                    answers["refused"] += len(messages)
                done += len(messages)
        finally:
            log.close()
        return answers

    def _grpc(self) -> Counter[str]:
        address = config.load(self.system.config, {}).parameter_address
        block = pb.Block(layout="deep", slots=b"\0" * 40, keys=b"\1" * 80)
        valid = pb.LookupRequest(schema="x", blocks=[block] * 3).SerializeToString()
        answers: Counter[str] = Counter()
        with grpc.insecure_channel(address) as channel:
            calls = [channel.unary_unary(f"/recsys.v1.Parameters/{name}") for name in ("Lookup", "Nothing")]
            calls.append(lambda data, timeout: list(channel.unary_stream("/recsys.v1.Parameters/Dense")(data, timeout)))
            for number in range(self.each):
                try:
                    calls[(number % 20 == 0) + (number % 400 == 0)](self.mutator.any(valid), timeout=5.0)
                    answers["answered"] += 1
                except grpc.RpcError as error:
                    answers[str(error.code())] += 1
        return answers

    def _commands(self, send: Callable[[Commands], None]) -> Counter[str]:
        """Into commands that run in this process, beside the running system that they ask."""
        folder = Path(tempfile.mkdtemp(dir=self.system.folder))
        with Commands(folder, self.system.url("ranking"), self.seed) as commands:
            commands.prepare(self.system.data, OPTIONS)
            send(commands)
        self.said |= commands.said
        return commands.answers


def good(rows: Sequence[dict[str, Any]]) -> bool:
    """No crash, no stall, memory where it was."""
    return all(
        not row["crashes"] and not row["stalls"] and max(row["grown_bytes"].values(), default=0) < GROWTH_BYTES
        for row in rows
    )


def run(
    each: int, seed: int, folder: Path, doors: Sequence[str] = (), messages: Path | None = None
) -> list[dict[str, Any]]:
    """All doors of a fresh system, or these; `messages`: file of what commands said, each message once."""
    system = Embedded(folder, OPTIONS)
    hostile = Hostile(system, each, seed)
    try:
        return hostile.run(doors)
    finally:
        hostile.traffic.stop(0.0)
        hostile.probes.stop()
        system.close()
        if messages:
            messages.write_text("\n".join(hostile.said.values()), encoding="utf-8", errors="replace")


def saved(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """These rows, and of doors that were not among them those of the last run."""
    names = {row["door"] for row in rows}
    before = json.loads(RESULT.read_text(encoding="utf-8"))["doors"] if RESULT.exists() else []
    return [*(row for row in before if row["door"] not in names), *rows]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.system.hostile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m tests.system.hostile --each 500 --seed 2 --json",
    )
    parser.add_argument("--each", type=int, default=10_000, help="messages into each door")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--doors", nargs="+", default=(), metavar="DOOR", help="these alone, such as files typed")
    parser.add_argument("--messages", type=Path, metavar="FILE", help="write what commands said, each message once")
    parser.add_argument("--json", action="store_true", help="print one JSON object alone on stdout")
    parser.add_argument("--save", action="store_true", help="also write load_tests/results/hostile.json")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what it started ends with it
    folder = Path(tempfile.mkdtemp(prefix="hostile-"))
    rows = run(options.each, options.seed, folder, options.doors, options.messages and options.messages.resolve())
    rows = saved(rows) if options.save else rows
    result = {"ok": good(rows), "doors": rows}
    if options.save:
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result) if options.json else json.dumps(result, indent=1))
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
