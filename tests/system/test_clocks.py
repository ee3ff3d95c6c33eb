"""Clocks that are wrong by an hour, a day and decades, one after the other on one folder: learning, answers and the account go on."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.system import ledger
from tests.system.crash_matrix import Matrix, closing
from tests.system.crashing import Nursery
from tests.system.embedded import wait_for
from tests.system.services import ORDER

pytestmark = pytest.mark.system
HOUR_MS, DAY_MS = 3_600_000, 86_400_000
IN_2100_MS = 4_102_444_800_000
NOW_MS = time.time_ns() // 1_000_000
CLOCKS = (HOUR_MS, -HOUR_MS, DAY_MS, -DAY_MS, IN_2100_MS - NOW_MS, 60_000 - NOW_MS, 0)
LEARN_S = 60.0


def shown_and_clicked(system: Matrix, name: str) -> int:
    """A list for a new user, who clicks its first item; how many items it has. Clients send no times."""

    def answered() -> list[str]:
        answer = system.call("POST", "/v1/recommend", {"user_id": name, "n": 6})
        ids = [item["item_id"] for item in answer["items"]]
        event = {"user_id": name, "item_id": ids[0], "request_id": answer["request_id"]} if ids else {}
        if ids:
            assert [outcome["status"] for outcome in system.click({"event_id": name, **event})] == ["accepted"]
        return ids

    return len(wait_for(answered, f"a list with the clock {system.ahead_ms} ms ahead", LEARN_S))


def learned(system: Matrix) -> dict[tuple[str, ...], float]:
    return system.samples("trainer", "recsys_examples_total")


def test_a_wrong_clock_stops_nothing_and_is_forgiven(nursery: Nursery, tmp_path: Path) -> None:
    with closing(Matrix(tmp_path, "", nursery)) as system:
        shown = 0
        for number, ahead_ms in enumerate(CLOCKS):
            for name in system.processes:
                system.kill(name)
            system.ahead_ms = ahead_ms
            system.start()
            if not number:
                system.traffic.put_items()
            items = shown_and_clicked(system, f"user-{number}")
            shown += items
            # The windows close by this clock: both labels of each item are learned, the click as a click.
            wait_for(
                lambda items=items: sum(learned(system).values()) == 2 * items, f"labels with {ahead_ms} ms", LEARN_S
            )
            assert learned(system)["1", "click"] == 1, f"the click with the clock {ahead_ms} ms ahead"
            for before in range(number + 1):
                wait_for(lambda n=before: system.history(f"user-{n}") == [f"user-{n}"], "each history", LEARN_S)
            wait_for(lambda: all(system.ready(name) for name in ORDER), "every process ready", LEARN_S)
        labels = ledger.of(system.loaded, system.records("impression"), system.records("feedback")).labels
        assert sum(labels.values()) == 2 * shown and labels["1", "click"] == len(CLOCKS)
        system.settle()
        audit, replay = system.audited(), system.replayed()
    assert audit["closes"], audit
    assert replay["equal"] and replay["from_step"] == 0, replay
    assert audit["labels"]["click"]["positive"] == len(CLOCKS)
