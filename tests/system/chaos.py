"""Kills at random under load: `python -m tests.system.chaos --mode embedded --kills 20 --seed 1 --json`.

Every process is killed (SIGKILL), frozen (SIGSTOP, 2 to 30 s) or ended (SIGTERM) at least once in ten, under at least 20 events
and 3 requests a second; then the log, the histories and `recsys audit` must agree on what was accepted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import psutil

from recsys import config
from recsys.clock import SystemClock
from recsys.provenance import head
from recsys.streams.open_log import open_log
from recsys.testing.servers import Server, kafka_server, redis_server
from tests.system.chaos_load import WINDOW_S, Accepted, Probes, Traffic
from tests.system.embedded import ROOT, Embedded, cmdline, recsys, wait_for

SERVICES = ("trainer", "parameter", "ranking", "builder", "up")
SERVERS = ("broker", "redis")
HOW = ("kill", "stop", "term")
EACH_WITHIN = 10
"""Every process is reached at least once in so many."""
RECOVER_S = 120.0
CALM_S = 8.0
"""Before the first kill: in which it is seen how long probes take."""
OPTIONS = f"""
tasks = [{{ name = "click", types = ["click"], window_s = {WINDOW_S} }}]
training.checkpoint_s = 5
parameter.snapshot_s = 7
retrieval.rebuild_s = 6
ranking.deadline_ms = 10000
"""


def schedule(mode: str, kills: int, seed: int, longest_freeze_s: float = 30.0) -> list[tuple[str, str, float]]:
    """(process, how, seconds of a freeze) of each kill: the same for the same seed."""
    rng = random.Random(seed)
    targets = list(SERVICES + (SERVERS if mode == "kafka" else ()))
    found: list[tuple[str, str, float]] = []
    while len(found) < kills:
        deck = targets + [rng.choice(targets) for _ in range(EACH_WITHIN - len(targets))]
        rng.shuffle(deck)
        found += [(target, rng.choice(HOW), rng.uniform(2.0, longest_freeze_s)) for target in deck]
    return found[:kills]


class Chaos:
    """One run over one folder, whose progress is in one file."""

    def __init__(self, options: argparse.Namespace, system: Embedded, servers: dict[str, Server]) -> None:
        self.options, self.system, self.servers = options, system, servers
        self.state: dict[str, Any] = options.state
        run = f"c{options.seed}-{self.state['runs']}"
        self.accepted = Accepted(system.folder / "accepted.txt")
        self.traffic = Traffic(system.url("ranking"), self.accepted, options.seed + self.state["runs"], run)
        self.probes = Probes({name: system.url(name) for name in ("ranking", "trainer", "parameter")}, run)

    def run(self) -> None:
        """The kills that are left."""
        self.system.start()
        self.traffic.put_items()
        self.traffic.start()
        self.probes.start()
        started = time.monotonic()
        wait_for(lambda: self.probes.healthy(started), "every probe comes through", RECOVER_S)
        time.sleep(CALM_S)
        self.probes.calm()
        self._note("descriptors_before", descriptors(self.system))
        plan = schedule(self.options.mode, self.options.kills, self.options.seed, self.options.longest_freeze)
        rng = random.Random(self.options.seed + self.state["kills"])
        for target, how, freeze_s in plan[self.state["kills"] :]:
            time.sleep(rng.uniform(0.5, 4.0))
            took = self._hit(target, how, freeze_s)
            self.state["kills"] += 1
            self.state["recovery_s"].setdefault(target, []).append(round(took, 2))
            self._tally()
            print(f"{self.state['kills']}/{len(plan)} {how} {target}: back after {took:.1f} s", file=sys.stderr)
        self._note("descriptors_after", descriptors(self.system))

    def _hit(self, target: str, how: str, freeze_s: float) -> float:
        """Do it; seconds from its end until every process says ready and new probes came through."""
        process = self._process(target)
        self.probes.during, self.probes.hit = f"{how} {target}", time.monotonic()
        number = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}[how]
        with contextlib.suppress(psutil.NoSuchProcess):  # a builder may have ended
            process.send_signal(number)
            if how == "stop":
                time.sleep(freeze_s)
                process.send_signal(signal.SIGCONT)
                self.probes.hit = time.monotonic()
        began = time.monotonic()
        if how != "stop":
            if target == "up":
                assert self.system.process is not None
                self.system.process.wait(60)
                wait_for(lambda: not self._children(), "the services end with their supervisor", 60)
                self.system.start()
            elif target in self.servers:
                self.servers[target].stop(kill=True)
                self.servers[target].start()
        wait_for(lambda: self.probes.healthy(began), f"recovery from {how} of {target}", RECOVER_S)
        return time.monotonic() - began

    def _process(self, target: str) -> psutil.Process:
        if target in self.servers:
            pid = self.servers[target].pid
            assert pid is not None
            return psutil.Process(pid)
        assert self.system.process is not None
        if target == "up":
            return psutil.Process(self.system.process.pid)
        if target == "builder":
            found: psutil.Process = wait_for(self._builder, "a builder runs", 60)
            return found
        return psutil.Process(wait_for(lambda: self.system.pids().get(target), f"{target} runs", 60))

    def _builder(self) -> psutil.Process | None:
        pid = self.system.pids().get("ranking")
        with contextlib.suppress(psutil.Error):
            if pid:
                return next(iter(psutil.Process(pid).children()), None)
        return None

    def _children(self) -> list[psutil.Process]:
        wanted = str(self.system.config)
        return [p for p in psutil.process_iter() if wanted in cmdline(p) and "serve" in cmdline(p)]

    def result(self) -> dict[str, Any]:
        """Stop the traffic, let it settle, and account."""
        unsent = self.traffic.stop()
        began = time.monotonic()
        wait_for(lambda: self.probes.healthy(began), "probes after the traffic", RECOVER_S)
        self.probes.stop()
        self._tally()
        logged = feedback_ids(self.system)
        lost = [event_id for event_id in self.accepted.ids if event_id not in logged]
        kept = {user: self.system.history(user) for user in set(self.accepted.ids.values())}
        twice = sum(len(events) - len(set(events)) for events in kept.values())
        audit = recsys("audit", "--config", self.system.config, "--json", timeout_s=600)
        replay = recsys("audit", "--replay", "--config", self.system.config, "--json", timeout_s=1800)
        return {
            "mode": self.options.mode,
            "seed": self.options.seed,
            "kills": self.state["kills"],
            "accepted": len(self.accepted),
            "unsent": unsent,
            "lost": len(lost),
            "twice": twice,
            "equal": _said(replay, "equal"),
            "closes": _said(audit, "closes"),
            "polls": self.state["polls"],
            "untrue_health": len(self.state["untrue"]),
            "through_s": round(self.probes.through_s, 1),
            "untrue": self.state["untrue"][:20],
            "recovery_s": {
                name: {"median": sorted(took)[len(took) // 2], "max": max(took), "kills": len(took)}
                for name, took in sorted(self.state["recovery_s"].items())
            },
            "descriptors": {"before": self.state["descriptors_before"], "after": self.state["descriptors_after"]},
        }

    def _tally(self) -> None:
        """Save what the probes found since the last time: a run that is cut off keeps it."""
        untrue, polls = self.probes.taken()
        self.state["untrue"] += untrue
        self.state["polls"] += polls
        self._save()

    def _note(self, name: str, value: Any) -> None:
        if self.state.get(name) is None or name.endswith("after"):
            self.state[name] = value
        self._save()

    def _save(self) -> None:
        if self.options.resume:
            self.options.resume.write_text(json.dumps(self.state), encoding="utf-8")


def _said(done: Any, name: str) -> bool:
    """What a command's JSON says; False, with its own words on stderr, when it says nothing."""
    try:
        return bool(json.loads(done.stdout)[name])
    except (json.JSONDecodeError, KeyError):
        print(done.stdout[-2000:] + done.stderr[-2000:], file=sys.stderr)
        return False


def feedback_ids(system: Embedded) -> Counter[str]:
    """Event ids of the whole topic `feedback`, by a reader of its own."""
    log = open_log(config.load(system.config, {}), SystemClock(), "chaos-reader")
    found: Counter[str] = Counter()
    try:
        for partition in range(log.partitions("feedback")):
            offset, end = log.begin("feedback", partition), log.end("feedback", partition)
            while offset < end:
                batch = log.read("feedback", partition, offset)
                found.update(json.loads(record.value)["event_id"] for record in batch)
                offset = batch.next
    finally:
        log.close()
    return found


def descriptors(system: Embedded) -> dict[str, dict[str, int]]:
    """Open files and threads of each service."""
    found = {}
    for name, pid in system.pids().items():
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            found[name] = {"descriptors": process.num_fds(), "threads": process.num_threads()}
    return found


@contextlib.contextmanager
def prepared(mode: str, folder: Path) -> Iterator[tuple[Embedded, dict[str, Server]]]:
    """The system's configuration, and the servers that it needs, running."""
    with contextlib.ExitStack() as stack:
        servers: dict[str, Server] = {}
        extra = OPTIONS
        if mode == "kafka":
            for name in SERVERS:
                (folder / name).mkdir(exist_ok=True)
            servers["broker"] = stack.enter_context(kafka_server(folder / "broker"))
            servers["redis"] = stack.enter_context(redis_server(folder / "redis", persistent=True))
            extra += (
                f'log = {{ kind = "kafka", bootstrap_servers = "127.0.0.1:{servers["broker"].port}", partitions = 2 }}\n'
                f'state = {{ kind = "redis", url = "redis://127.0.0.1:{servers["redis"].port}/0" }}\n'
            )
        system = Embedded(folder, extra)
        stack.callback(system.close)
        yield system, servers


def run(arguments: Sequence[str]) -> dict[str, Any]:
    """One run, to its result."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.system.chaos",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m tests.system.chaos --mode kafka --kills 200 --seed 7 --resume chaos.json --json",
    )
    parser.add_argument("--mode", choices=("embedded", "kafka"), default="embedded")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--longest-freeze", type=float, default=30.0, help="seconds of a SIGSTOP, 2 to this")
    parser.add_argument("--resume", type=Path, help="progress; a run that was cut off goes on from it, in its folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object alone on stdout")
    parser.add_argument("--save", action="store_true", help="also write load_tests/results/chaos_MODE.json")
    options = parser.parse_args(arguments)
    resumed = options.resume is not None and options.resume.exists()
    options.state = (
        json.loads(options.resume.read_text(encoding="utf-8"))
        if resumed
        else {
            "kills": 0,
            "runs": 0,
            "folder": tempfile.mkdtemp(prefix="chaos-"),
            "recovery_s": {},
            "untrue": [],
            "polls": 0,
        }
    )
    options.state["runs"] += 1
    with prepared(options.mode, Path(options.state["folder"])) as (system, servers):
        chaos = Chaos(options, system, servers)
        try:
            chaos.run()
            return chaos.result()
        finally:
            chaos.traffic.stop(0.0)
            chaos.probes.stop()


def good(result: dict[str, Any]) -> bool:
    """Whether nothing accepted was lost or counted twice, all agrees, and health was true."""
    return bool(
        not (result["lost"] or result["twice"] or result["unsent"] or result["untrue_health"])
        and result["equal"]
        and result["closes"]
    )


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what it started ends with it
    result = {"date": date.today().isoformat(), "commit": head(ROOT)} | run(sys.argv[1:])
    if "--save" in sys.argv:
        path = ROOT / f"load_tests/results/chaos_{result['mode']}.json"
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result) if "--json" in sys.argv else json.dumps(result, indent=1))
    return 0 if good(result) else 1


if __name__ == "__main__":
    sys.exit(main())
