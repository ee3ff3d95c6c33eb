"""Every gap of `crashing`, one after the other, under traffic: `python -m tests.system.crash_matrix --mode embedded --json`.

After each crash the same service starts again and the traffic goes on. At the end nothing accepted is lost or there twice, each
label of the log is learned once, `recsys audit` closes, and the whole run, over all its crashes, is equal bit for bit to its
journal run once from the first step. The long form audits after each gap, too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from recsys.clock import SystemClock
from recsys.config import Config
from recsys.files import Manifests
from recsys.provenance import head
from recsys.streams.open_log import open_log
from recsys.streams.positions import split
from recsys.testing.servers import kafka_server, redis_server
from tests.system import ledger
from tests.system.chaos_load import ITEMS, Accepted, Traffic
from tests.system.crashing import Armed, Forked, Nursery
from tests.system.embedded import ROOT, wait_for
from tests.system.gaps import GAPS, OF_KAFKA, Gap
from tests.system.services import Services

RESULT = ROOT / "load_tests" / "results" / "crash_matrix.json"
DIE_S, READY_S, SETTLE_S, AUDIT_S = 90.0, 90.0, 90.0, 900.0
"""On a busy machine; nobody waits longer than it takes."""
WINDOW_S = 1.5
ROWS = 1001
"""Of the file that is imported: two calls."""
POISON = b"\xff no message"
OPTIONS = f"""
tasks = [{{ name = "click", types = ["click"], window_s = {WINDOW_S} }}, {{ name = "like", types = ["like"], window_s = 1.8 }}]
model = {{ dim = 4, expert_hidden = [8, 4], attention = [8], tower_dim = 4 }}
training = {{ batch_size = 4, checkpoint_s = 0.6, expire_every_steps = 20, dense_publish_s = 0.5 }}
parameter.snapshot_s = 0.6
ranking.deadline_ms = 10000
"""


def gaps_of(mode: str) -> list[Gap]:
    return [*GAPS.values(), *(OF_KAFKA.values() if mode == "kafka" else ())]


class Matrix(Services):
    """Three services that a nursery forks, and the traffic that brings them to their gaps."""

    def __init__(self, folder: Path, extra: str, nursery: Nursery) -> None:
        super().__init__(folder, OPTIONS + extra)
        self._nursery = nursery
        self.armed = Armed(folder / "armed")
        self.ahead_ms = 0
        """What the clocks of the services that are started from now on are wrong by."""
        self.accepted = Accepted(folder / "accepted.txt")
        self.traffic = Traffic(self.url("ranking"), self.accepted, 5, "m")
        self.begun = False
        self.recovery_s: dict[str, float] = {}
        self._imported = folder / "rows.jsonl"

    def spawn(self, name: str) -> None:
        self.processes[name] = self._fork("serve", name, "--config", str(self.config))

    def _fork(self, *arguments: str) -> Forked:
        process = "import" if arguments[0] == "import" else arguments[1]
        armed = self.armed.folder / process
        return self._nursery.spawn(arguments, self.output_of(process), armed, ahead_ms=self.ahead_ms)

    def begin(self) -> None:
        self.start()
        self.traffic.put_items()
        self.traffic.start()
        self.begun = True
        wait_for(lambda: self.traffic.answered > 3, "answers", READY_S)

    def cross(self, gap: Gap) -> None:
        """Let a process die there, and start it again."""
        if gap.process != "trainer":
            self.armed.let_build(gap.name.startswith("generation: "))
        began = time.monotonic()
        {"builder": self._cross_builder, "import": self._cross_import}.get(gap.process, self._cross)(gap)
        took, back_s = time.monotonic() - began, self.recovery_s[gap.name]
        print(f"{gap.process} died at {gap.name!r}: {took:.1f} s, back after {back_s:.1f} s", file=sys.stderr)

    def _cross(self, gap: Gap) -> None:
        if gap.how == "start":
            self._die_at_start(gap)
        else:
            self._die(gap)
        wait_for(lambda: self._dead(gap.process), f"the end of {gap.process} at {gap.name!r}", DIE_S)
        self._after(gap, self.processes[gap.process].wait())

    def _dead(self, name: str) -> bool:
        return self.processes[name].poll() is not None

    def _die(self, gap: Gap) -> None:
        if gap.how == "stop":
            self.traffic.put_items()
            self.call("GET", f"/v1/items/item-{ITEMS - 1}")  # read, so that there is a catalogue to save
        self.armed.arm(gap)
        if gap.how == "stop":
            self.processes[gap.process].terminate()
        elif gap.how == "poison":
            self._poison()

    def _die_at_start(self, gap: Gap) -> None:
        """Killed just after a checkpoint it runs no step again: then it is killed once more."""
        while True:
            self.kill(gap.process)
            self.armed.arm(gap)
            self.spawn(gap.process)
            wait_for(lambda: self._dead(gap.process) or self.ready(gap.process), f"an end at {gap.name!r}", DIE_S)
            if self._dead(gap.process):
                return

    def _after(self, gap: Gap, code: int) -> None:
        assert code == -signal.SIGKILL, f"{gap.name}: {code} {self.output_of(gap.process).read_text()[-3000:]}"
        assert not self.armed.holds(gap), f"{gap.process} died elsewhere than at {gap.name!r}"
        began = time.monotonic()
        self.spawn(gap.process)
        self.wait_ready(gap.process)
        self.recovery_s[gap.name] = round(time.monotonic() - began, 2)
        if gap.process == "trainer":
            wait_for(lambda: self.metric("recsys_journal_steps_total", "trainer") > 0, "another step", DIE_S)

    def _poison(self) -> None:
        """What no producer of ours writes, in topic `feedback`."""
        log = open_log(self.loaded, SystemClock(), "matrix")
        try:
            log.append("feedback", [("poison", POISON)])
            log.flush()
        finally:
            log.close()

    def _cross_builder(self, gap: Gap) -> None:
        before = self.metric("recsys_generation_failures_total")
        self.armed.arm(gap)
        began = time.monotonic()
        wait_for(lambda: not self.armed.holds(gap), f"the builder's end at {gap.name!r}", DIE_S)
        wait_for(lambda: self.metric("recsys_generation_failures_total") > before, "ranking saw it", DIE_S)
        self.recovery_s[gap.name] = round(time.monotonic() - began, 2)

    def _cross_import(self, gap: Gap) -> None:
        if not self._imported.exists():
            rows = (
                json.dumps({"version": 1, "user_id": f"row-{n % 50}", "item_id": f"item-{n % ITEMS}", "type": "click"})
                for n in range(ROWS)
            )
            self._imported.write_text("\n".join(rows), encoding="utf-8")
        self.armed.arm(gap)
        began = time.monotonic()
        self._import(-signal.SIGKILL)
        assert not self.armed.holds(gap), gap.name
        self.recovery_s[gap.name] = round(time.monotonic() - began, 2)

    def _import(self, code: int) -> None:
        """Import the rows, or what is left of them; it must end so."""
        ended = self._fork("import", "events", str(self._imported), "--config", str(self.config)).wait(DIE_S)
        assert ended == code, self.output_of("import").read_text()[-3000:]

    def audited(self, *more: str) -> dict[str, Any]:
        """What `recsys audit` says of the running or stopped system."""
        return self._audit(self.config, *more)

    def _audit(self, file: Path, *more: str) -> dict[str, Any]:
        output = self.folder / f"audit-{time.monotonic_ns()}.txt"
        armed = self.armed.folder / "audit"
        self._nursery.spawn(("audit", "--config", str(file), "--json", *more), output, armed).wait(AUDIT_S)
        said = output.read_text(encoding="utf-8")
        try:
            found: dict[str, Any] = json.loads(said.splitlines()[-1])
        except (IndexError, json.JSONDecodeError):
            return {"why": [said[-3000:]]}
        return {**found, "why": found.get("why", []) if isinstance(found.get("why", []), list) else [found["why"]]}

    def settle(self) -> int:
        """End the traffic; wait until all labels are final, kept and served; stop trainer and parameter. How many events were not
        accepted."""
        if self._imported.exists():
            self._import(0)
        unsent = self.traffic.stop() if self.begun else 0
        with contextlib.closing(open_log(self.loaded, SystemClock(), "matrix")) as log:

            def learned() -> bool:
                kept = self._newest("trainer").get("positions", {})
                return all(offset >= log.end(*split(key)) for key, offset in kept.items())

            wait_for(learned, "a checkpoint of the whole log", SETTLE_S)
            wait_for(lambda: self.metric("recsys_open_impressions", "trainer") == 0, "every window closed", SETTLE_S)
            self.stop_service("trainer")
            end = log.end("parameters", 0)
            wait_for(lambda: self._newest("parameter").get("position") == end, "a snapshot of all deltas", SETTLE_S)
            self.stop_service("parameter")
        return unsent

    def _newest(self, name: str) -> dict[str, Any]:
        return next(iter(Manifests(self.data / name).look()), {})

    def stop_service(self, name: str) -> None:
        """As an operator does; it must end well."""
        self.processes[name].terminate()
        assert self.processes[name].wait(SETTLE_S) == 0, self.output_of(name).read_text()[-3000:]

    def result(self) -> dict[str, Any]:
        """Account for the whole run."""
        unsent = self.settle()
        impressions, feedback = self.records("impression"), self.records("feedback")
        of_log = ledger.of(self.loaded, impressions, feedback, [POISON])
        logged = Counter(json.loads(r.value)["event_id"] for r in feedback if r.value != POISON)
        kept = self._histories(of_log)
        twice = sum(len(events) - len(set(events)) for events in kept.values())
        otherwise = [user for user, events in of_log.histories.items() if kept[user] != events]
        audit, replay = self.audited(), self.replayed()
        labels = {
            (value, task): counts.get(name, 0)
            for task, counts in audit.get("labels", {}).items()
            for value, name in (("1", "positive"), ("0", "negative"))
        }
        imported = sum(event_id.startswith("import-") for event_id in logged)
        return {
            "gaps": self.recovery_s,
            "accepted": len(self.accepted),
            "unsent": unsent,
            "lost": sum(event_id not in logged for event_id in self.accepted.ids),
            "imported": imported,
            "twice": twice,
            "histories_wrong": len(otherwise),
            "labels": sum(of_log.labels.values()),
            "labels_wrong": sum(abs(labels.get(k, 0) - n) for k, n in of_log.labels.items()),
            "closes": bool(audit.get("closes")),
            "equal": bool(replay.get("equal")),
            "steps": [replay.get("from_step"), replay.get("to_step")],
            "served_step": replay.get("served_step"),
            "why": [
                *(f"{user} has {kept[user]}, the log says {of_log.histories[user]}" for user in otherwise[:3]),
                *audit["why"],
                *replay.get("differences", replay["why"]),
            ][:20],
        }

    def _histories(self, of_log: ledger.Ledger) -> dict[str, list[str]]:
        """Of every user, as ranking has them once it has read the log, or has had the time to."""

        def found() -> dict[str, list[str]]:
            return {user: self.history(user) for user in of_log.histories}

        with contextlib.suppress(AssertionError):
            wait_for(lambda: found() == of_log.histories, "every history")
        return found()

    def replayed(self) -> dict[str, Any]:
        """`recsys audit --replay` over a copy of the data folder whose journal reaches back to the first step."""
        copy = self.folder / "copy"
        shutil.copytree(self.data / "trainer", copy / "trainer")
        shutil.copytree(self.data / "parameter", copy / "parameter")
        for path in self.armed.folder.glob("journal-*.jsonl"):
            shutil.copyfile(path, copy / "trainer" / path.name)
        for older in (copy / "trainer").glob("*.previous.json"):
            older.unlink()
        if (self.data / "log").exists():
            (copy / "log").symlink_to(self.data / "log")
        file = self.folder / "copy.toml"
        said = self.config.read_text(encoding="utf-8").replace(json.dumps(str(self.data)), json.dumps(str(copy)))
        file.write_text(said, encoding="utf-8")
        return self._audit(file, "--replay")


class Crashed(NamedTuple):
    """A run, its data folder as it was when all were killed amid the traffic, and the configuration of both."""

    result: dict[str, Any]
    data: Path
    loaded: Config


def good(result: dict[str, Any]) -> bool:
    """Whether all is accounted for, and equal from the first step on."""
    wrong = ("unsent", "lost", "twice", "histories_wrong", "labels_wrong")
    audits = all(each["closes"] and each["equal"] for each in result.get("after_each", {}).values())
    begun = result["steps"][0] == 0 and result["imported"] in (0, ROWS)
    return bool(not any(result[name] for name in wrong) and result["closes"] and result["equal"] and audits and begun)


def at_once(system: Matrix, gaps: Sequence[Gap], kept: Path | None = None) -> dict[str, Any]:
    """The trainer's gaps beside those of all others; one account at the end. `kept`: where to copy the data folder to, as it was when
    all three were killed amid the traffic."""
    system.begin()
    lanes = [g for g in gaps if g.process == "trainer"], [g for g in gaps if g.process != "trainer"]

    def run(lane: Sequence[Gap]) -> None:
        for gap in lane:
            system.cross(gap)

    with ThreadPoolExecutor(len(lanes)) as pool:
        for done in [pool.submit(run, lane) for lane in lanes]:
            done.result()
    if kept is not None:
        for name in system.processes:
            system.kill(name)
        shutil.copytree(system.data, kept, ignore=shutil.ignore_patterns("*.sock", "*.lock"))
        system.start()
    return system.result()


def one_by_one(system: Matrix, gaps: Sequence[Gap]) -> dict[str, Any]:
    """Gap after gap, each with an account and a re-run of its own before the next."""
    system.begin()
    after: dict[str, dict[str, Any]] = {}
    for gap in gaps:
        system.cross(gap)
        before = system.metric("recsys_checkpoint_seconds_count", "trainer")
        wait_for(
            lambda before=before: system.metric("recsys_checkpoint_seconds_count", "trainer") > before,
            "a checkpoint",
            60,
        )
        audit, replay = system.audited(), system.audited("--replay")
        after[gap.name] = {"closes": bool(audit.get("closes")), "equal": bool(replay.get("equal"))}
        if not all(after[gap.name].values()):
            after[gap.name]["why"] = [*audit["why"], *replay.get("differences", replay["why"])][:10]
    return {**system.result(), "after_each": after}


@contextlib.contextmanager
def prepared(mode: str, folder: Path, nursery: Nursery) -> Iterator[Matrix]:
    """The system, and what it needs running."""
    with contextlib.ExitStack() as stack:
        extra = ""
        if mode == "kafka":
            for name in ("broker", "redis"):
                (folder / name).mkdir()
            broker = stack.enter_context(kafka_server(folder / "broker"))
            redis = stack.enter_context(redis_server(folder / "redis", persistent=True))
            extra = on(broker.port, redis.port, "matrix")
        yield stack.enter_context(closing(Matrix(folder, extra, nursery)))


def on(kafka_port: int, redis_port: int, name: str) -> str:
    """The end of a configuration on Kafka and Redis, with topics and keys of its own."""
    return (
        f'log = {{ kind = "kafka", bootstrap_servers = "127.0.0.1:{kafka_port}", topic_prefix = "{name}-", partitions = 2 }}\n'
        f'state = {{ kind = "redis", url = "redis://127.0.0.1:{redis_port}/0", prefix = "{name}" }}\n'
    )


@contextlib.contextmanager
def closing(system: Matrix) -> Iterator[Matrix]:
    try:
        yield system
    finally:
        if system.begun:
            system.traffic.stop(0.0)
        system.close()


def run(mode: str, how: Callable[[Matrix, Sequence[Gap]], dict[str, Any]], gaps: Sequence[Gap]) -> dict[str, Any]:
    """One mode, in a folder of its own."""
    with (
        contextlib.closing(Nursery()) as nursery,
        tempfile.TemporaryDirectory(prefix="crash-matrix-") as folder,
        prepared(mode, Path(folder), nursery) as system,
    ):
        return how(system, gaps)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.system.crash_matrix", description=__doc__)
    parser.add_argument("--mode", choices=("embedded", "kafka", "both"), default="both")
    parser.add_argument(
        "--gaps", nargs="*", metavar="WORD", default=[], help="those whose name begins so; default: all"
    )
    parser.add_argument("--at-once", action="store_true", help="as in CI: one account at the end")
    parser.add_argument("--json", action="store_true", help="print one JSON object alone on stdout")
    parser.add_argument("--save", action="store_true", help=f"also write {RESULT.relative_to(ROOT)}")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    for mode in ("embedded", "kafka") if options.mode == "both" else (options.mode,):
        wanted = [g for g in gaps_of(mode) if not options.gaps or g.name.startswith(tuple(options.gaps))]
        found = run(mode, at_once if options.at_once else one_by_one, wanted)
        results[mode] = {"date": date.today().isoformat(), "commit": head(ROOT), "good": good(found), **found}
    print(json.dumps(results, indent=None if options.json else 1))
    if options.save:
        before = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
        RESULT.write_text(json.dumps({**before, **results}, indent=1) + "\n", encoding="utf-8")
    return 0 if all(each["good"] for each in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
