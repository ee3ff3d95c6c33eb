"""What happens to a log and a store that several processes share: `python -m tests.system.troubles --away 600 --json`.

Under traffic: every record of every topic is delivered twice; Redis loses everything (FLUSHALL); the broker is away, and comes
back with a new leader epoch; the topics of events get another partition. Then the account of `crash_matrix`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import redis
from kafka import KafkaAdminClient

from recsys.clock import SystemClock
from recsys.errors import LogTruncated
from recsys.provenance import head
from recsys.streams.open_log import open_log
from recsys.testing.servers import Server, kafka_server, redis_server
from recsys.types import Record
from tests.system.crash_matrix import Matrix, closing, good, on
from tests.system.crashing import Nursery
from tests.system.embedded import ROOT, wait_for
from tests.system.services import ORDER

RESULT = ROOT / "load_tests" / "results" / "troubles.json"
BACK_S = 120.0


class Troubled:
    """One system on a broker and a Redis."""

    def __init__(self, system: Matrix, broker: Server, store: Server) -> None:
        self._system, self._broker, self._store = system, broker, store
        self._number = 0
        self.recovery_s: dict[str, float] = {}

    def _recovered(self, what: str, began: float) -> None:
        """A click that is sent now is in its history, an answer is whole, and every process says that it is ready."""
        system = self._system
        self._number += 1
        user = f"after-{self._number}"
        wait_for(lambda: self._accepted(user), f"a click accepted after {what}", BACK_S)
        wait_for(lambda: system.history(user) == [user], f"its effect after {what}", BACK_S)
        wait_for(lambda: not self._degraded(), f"whole answers after {what}", BACK_S)
        wait_for(lambda: all(system.ready(name) for name in ORDER), f"every process ready after {what}", BACK_S)
        self.recovery_s[what] = round(time.monotonic() - began, 2)

    def _accepted(self, user: str) -> bool:
        outcomes = self._system.click({"event_id": user, "user_id": user, "item_id": "item-1"})
        return outcomes[0]["status"] in ("accepted", "duplicate")

    def _degraded(self) -> bool:
        return bool(self._system.call("POST", "/v1/recommend", {"user_id": "user-1", "n": 4})["degraded"])

    def deliver_twice(self) -> None:
        """Every record of every topic once more, as a producer does that did not hear that the first one arrived."""
        system, began = self._system, time.monotonic()
        records = {topic: self._all(topic) for topic in ("item", "impression", "feedback", "parameters")}
        with contextlib.closing(open_log(system.loaded, SystemClock(), "twice")) as log:
            for topic, found in records.items():
                log.append(topic, [(record.key, record.value) for record in found])
            log.flush(BACK_S)
        self._recovered("everything delivered twice", began)

    def _all(self, topic: str) -> list[Record]:
        """What a topic holds; `parameters` may be shortened meanwhile."""
        found: list[Record] = []

        def read() -> bool:
            try:
                found[:] = self._system.records(topic)
            except LogTruncated:
                return False
            return True

        wait_for(read, f"topic {topic}")
        return found

    def flush(self) -> None:
        """The store forgets everything; the log gives it again."""
        began = time.monotonic()
        with contextlib.closing(redis.Redis(port=self._store.port)) as client:
            client.flushall()
        self._recovered("FLUSHALL", began)

    def away(self, seconds: float) -> None:
        """The broker is killed for so long; feedback is accepted, answers go on."""
        system = self._system
        self._broker.stop(kill=True)
        until = time.monotonic() + seconds
        accepted, answered = len(system.accepted), system.traffic.answered
        wait_for(lambda: len(system.accepted) > accepted + 20, "feedback accepted without the broker", BACK_S)
        wait_for(lambda: system.traffic.answered > answered + 3, "answers without the broker", BACK_S)
        wait_for(lambda: time.monotonic() > until, "the time that it is away", seconds + 10)
        began = time.monotonic()
        self._broker.start()
        self._recovered(f"the broker away for {seconds:.0f} s", began)

    def repartition(self) -> None:
        """Another partition for both topics of events; the services are told by a restart."""
        system, began = self._system, time.monotonic()
        prefix, count = system.loaded.log.topic_prefix, system.loaded.log.partitions + 1
        with contextlib.closing(KafkaAdminClient(bootstrap_servers=system.loaded.log.bootstrap_servers)) as admin:
            admin.create_partitions({f"{prefix}{topic}": count for topic in ("impression", "feedback")})
        for name in ORDER:
            system.kill(name)
        system.start()
        self._recovered("another partition", began)
        assert all(any(r.partition == count - 1 for r in system.records(topic)) for topic in ("impression", "feedback"))


def run(system: Matrix, broker: Server, store: Server, away_s: float) -> dict[str, Any]:
    """All of it, one after the other, and the account."""
    system.begin()
    troubled = Troubled(system, broker, store)
    troubled.deliver_twice()
    troubled.flush()
    troubled.away(away_s)
    troubled.repartition()
    return {**system.result(), "recovery_s": troubled.recovery_s}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.system.troubles", description=__doc__)
    parser.add_argument("--away", type=float, default=600.0, help="seconds without the broker")
    parser.add_argument("--json", action="store_true", help="print one JSON object alone on stdout")
    parser.add_argument("--save", action="store_true", help=f"also write {RESULT.relative_to(ROOT)}")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="troubles-")))
        for name in ("broker", "redis"):
            (folder / name).mkdir()
        broker = stack.enter_context(kafka_server(folder / "broker"))
        store = stack.enter_context(redis_server(folder / "redis"))
        nursery = stack.enter_context(contextlib.closing(Nursery()))
        system = stack.enter_context(closing(Matrix(folder, on(broker.port, store.port, "troubles"), nursery)))
        found = run(system, broker, store, options.away)
    found = {"date": date.today().isoformat(), "commit": head(ROOT), "good": good(found), **found}
    print(json.dumps(found, indent=None if options.json else 1))
    if options.save:
        RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0 if found["good"] else 1


if __name__ == "__main__":
    sys.exit(main())
