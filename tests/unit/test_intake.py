"""Feedback as it comes in: copies at once, appends that fail, and notes that say what will not use an event."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from recsys import metrics
from recsys.candidates.sources import Sources
from recsys.clock import ManualClock
from recsys.config import Config, parse
from recsys.errors import LogFull
from recsys.events.recent import HORIZON_MS, digest_of
from recsys.features.catalogue import Catalogue
from recsys.features.schema import Schema
from recsys.streams.memory_log import MemoryLog
from recsys.types import Feedback, HistoryEvent, Item
from services.ranking.feedback_intake import Intake
from services.ranking.parse import Refused

NOW_MS = 1_800_000_000_000


class Gate(MemoryLog):
    """Appends wait until the gate is open, and fail while it is `full`."""

    def __init__(self, clock: ManualClock) -> None:
        super().__init__(clock)
        self.open, self.inside, self.full = threading.Event(), threading.Semaphore(0), False
        self.open.set()

    def append(self, topic: str, messages: Sequence[tuple[str, bytes]]) -> None:
        self.inside.release()
        self.open.wait()
        if self.full:
            raise LogFull("the disk is full")
        super().append(topic, messages)


class Door:
    """An intake over a log with a gate."""

    def __init__(self, **options: object) -> None:
        config = parse(options) if options else Config()
        schema = Schema.of(config)
        self.clock = ManualClock(NOW_MS)
        self.log = Gate(self.clock)
        self.sources = Sources(config, schema, Catalogue(schema))
        self.sources.item(Item(item_id="i"))
        self.intake = Intake(config, self.log, self.clock, self.sources, lambda: True)

    def take(self, *events: Feedback | Refused) -> list[str]:
        return [" ".join(filter(None, (o["status"], o.get("note")))) for o in self.intake.take(events)]


def event(event_id: str = "e", **fields: object) -> Feedback:
    about = {"user_id": "u", "item_id": "i", "type": "click", "time_ms": NOW_MS} | fields
    return Feedback(event_id=event_id, **about)  # type: ignore[arg-type]


def at_once(count: int, do: Callable[[], object], door: Door, first_inside: bool = True) -> list[object]:
    """The results of `count` calls of which the first waits in the log until the others have begun; errors are results."""
    begun = threading.Semaphore(0)

    def one() -> object:
        begun.release()
        try:
            return do()
        except LogFull as error:
            return error

    door.log.open.clear()
    with ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(one)]
        door.log.inside.acquire()
        futures += [pool.submit(one) for _ in range(count - 1)]
        for _ in range(count):
            begun.acquire()
        door.log.open.set()
        return [future.result() for future in futures]


def test_of_copies_at_once_one_is_accepted_and_the_log_has_one() -> None:
    door = Door()
    for late_ms in (0, 2 * HORIZON_MS):
        made = event(f"e{late_ms}", time_ms=NOW_MS - late_ms)
        found = at_once(12, lambda made=made: door.take(made)[0], door)  # type: ignore[misc]
        assert sorted(str(one).split()[0] for one in found) == ["accepted"] + ["duplicate"] * 11
        assert door.take(made) == ["duplicate"]
    assert door.log.end("feedback", 0) == 2


def test_nobody_is_told_duplicate_of_an_event_that_could_not_be_appended() -> None:
    door = Door()
    door.log.full = True
    assert all(isinstance(one, LogFull) for one in at_once(6, lambda: door.take(event()), door))
    door.log.full = False
    assert door.take(event()) == ["accepted"]
    assert door.log.end("feedback", 0) == 1


def test_a_batch_with_a_copy_on_its_way_waits_for_it_and_keeps_its_own() -> None:
    door = Door()
    door.log.open.clear()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(door.take, event("a"))
        door.log.inside.acquire()
        second = pool.submit(door.take, event("b"), event("a"), event("b"), Refused(id="x", field="f", reason="r"))
        door.log.inside.acquire()
        assert not second.done()
        door.log.open.set()
        assert first.result() == ["accepted"]
        assert second.result() == ["accepted", "duplicate", "duplicate", "rejected"]


def test_a_copy_of_what_came_by_the_log_is_a_duplicate() -> None:
    door = Door()
    made = event()
    past = HistoryEvent(time_ms=NOW_MS, event_id="e", item_id="i", type="click")
    door.sources.events.feedback(made, (), past, NOW_MS)
    assert door.take(made) == ["duplicate"]


def test_within_the_horizon_a_copy_without_a_time_of_its_own_is_refused() -> None:
    door = Door()
    for minutes, status in ((0, "accepted"), (30, "duplicate"), (59, "duplicate")):
        door.clock.set(NOW_MS + 60_000 * minutes)
        assert door.take(event(time_ms=door.clock.now_ms())) == [status]


@pytest.mark.parametrize(
    ("fields", "note"),
    [
        ({}, ""),
        ({"type": "view"}, ""),
        ({"type": "dislike"}, ""),
        ({"type": "hide"}, ""),
        ({"type": "Click"}, "unknown_type"),
        ({"type": "Click", "item_id": "x", "request_id": "r"}, "unknown_type"),
        ({"item_id": "x"}, "unknown_item"),
        ({"item_id": "put"}, ""),
        ({"request_id": "r"}, "unknown_request"),
        ({"request_id": "made"}, ""),
        ({"type": "long"}, "no_request"),
        ({"type": "long", "request_id": "made"}, ""),
        ({"time_ms": NOW_MS - HORIZON_MS - 1, "item_id": "x"}, "too_late"),
        ({"time_ms": NOW_MS - HORIZON_MS}, ""),
        ({"time_ms": NOW_MS + 60_000}, ""),
        ({"time_ms": NOW_MS + 60_001}, "clamped_time"),
        ({"time_ms": 2**53, "item_id": "x", "request_id": "r"}, "unknown_item,unknown_request,clamped_time"),
    ],
    ids=str,
)
def test_a_note_says_what_will_not_use_an_event(fields: dict[str, object], note: str) -> None:
    door = Door(tasks=[{"name": "long", "types": ["long", "click"]}])
    door.intake.put(["put"])
    door.intake.answered("made")
    assert door.take(event(**fields)) == [f"accepted {note}".strip()]


def test_what_came_by_the_log_is_noted_once_and_what_came_here_is_not_noted_again() -> None:
    door, noted = Door(), metrics.FEEDBACK_NOTES.labels("unknown_type")
    before = noted._value.get()
    mine = event("mine", type="odd")
    assert door.take(mine) == ["accepted unknown_type"]
    for one in (mine, event("theirs", type="odd"), event("good")):
        door.intake.heard(one, digest_of(one.event_id), NOW_MS)
    assert noted._value.get() == before + 2


def test_a_wrong_producer_is_said_once_a_minute_and_type(caplog: pytest.LogCaptureFixture) -> None:
    door = Door()
    for number in range(200):
        door.take(event(f"e{number}", type=("Click", "CLICK")[number % 2], time_ms=door.clock.now_ms()))
        door.clock.advance(1000)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 * 4
    assert "Click" in said[0] and "no section" in said[0]
