"""Items come and go, the topic `item` is compacted, processes restart: what is kept names items, never places in a list."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest

from recsys.clock import SystemClock
from recsys.events import messages
from recsys.features.schema import Schema
from recsys.keys import key_of
from recsys.parameters.deltas import DeltaReader
from recsys.streams.base import EventLog
from recsys.streams.open_log import open_log
from recsys.types import Feedback, Impression, Item, ShownItem
from tests.system.embedded import START_S, wait_for
from tests.system.services import Services, now_ms

pytestmark = pytest.mark.system

SMALL = "log.retention_bytes = 1048576\n"
DAY = 1000
"""Items that come and go together."""
USERS = 40
"""With one waiting positive each: fewer than the towers' 64, so that they wait across a restart; twice as many fill a batch."""


@contextlib.contextmanager
def writing(system: Services) -> Iterator[EventLog]:
    log = open_log(system.loaded, SystemClock(), "test")
    try:
        yield log
    finally:
        log.close()


def put(log: EventLog, items: Sequence[Item]) -> None:
    log.append("item", [(item.item_id, messages.dump_item(item)) for item in items])


def day_of(day: int, title: str = "x" * 250, count: int = DAY) -> list[Item]:
    return [
        Item(item_id=f"day{day}-{n}", title=f"{day}-{n} {title}", attributes={"category": f"c{day}-{n % 20}"})
        for n in range(count)
    ]


def gone(day: int, count: int = DAY) -> list[Item]:
    return [Item(item_id=f"day{day}-{n}", deleted=True) for n in range(count)]


def visit(log: EventLog, users: Sequence[str], day: int) -> set[str]:
    """Each user is shown five items of their own and clicks two of them; all items that were shown."""
    shown: set[str] = set()
    for number, user in enumerate(users):
        items = tuple(ShownItem(item_id=f"day{day}-{5 * number + n}", position=n + 1, propensity=1.0) for n in range(5))
        shown.update(item.item_id for item in items)
        impression = Impression(request_id=f"r-{user}", user_id=user, time_ms=now_ms(), items=items)
        log.append("impression", [(user, messages.dump_impression(impression))])
        for n in (0, 1):
            click = Feedback(
                event_id=f"e-{user}-{n}",
                user_id=user,
                item_id=items[n].item_id,
                type="click",
                time_ms=now_ms(),
                request_id=impression.request_id,
            )
            log.append("feedback", [(user, messages.dump_feedback(click))])
    return shown


def read_all(system: Services) -> bool:
    """Whether the trainer runs and has read every record."""
    assert system.processes["trainer"].poll() is None, system.output_of("trainer").read_text()[-3000:]
    lags = system.samples("trainer", "recsys_consumer_lag_records")
    return bool(lags) and not any(lags.values())


def tower_items(system: Services, names: set[str]) -> set[str]:
    """Items of these names with a published row of the towers; no other item has one."""
    slot, reader = Schema.of(system.loaded).item_slots[0], DeltaReader()
    keys: set[int] = set()
    for record in system.records("parameters"):
        for rows in delta.rows if (delta := reader.feed(record.value)) else ():
            if rows.layout == "tower":
                keys |= set(rows.keys[rows.slots == slot].tolist())
    found = {name for name in names if key_of(name) in keys}
    assert len(found) == len(keys)
    return found


def test_towers_learn_the_same_items_after_compactions_and_restarts(tmp_path: Path) -> None:
    with contextlib.closing(Services(tmp_path / "churn", SMALL)) as system:
        with writing(system) as log:
            for day in range(4):
                put(log, day_of(day))
                put(log, gone(day - 1) if day else [])
            shown = visit(log, [f"first-{n}" for n in range(USERS)], 3)
        system.spawn("trainer")
        system.wait_ready("trainer")
        wait_for(lambda: read_all(system), "all records read")
        system.processes["trainer"].terminate()
        system.processes["trainer"].wait(START_S)
        assert not tower_items(system, shown)  # they all wait
        assert system.records("item")[0].offset == 0
        with writing(system) as log:
            put(log, day_of(3, "anew"))
            put(log, day_of(4))
        assert system.records("item")[0].offset > 0  # compacted: every item has another number now
        for turn in ("second", "third"):
            system.spawn("trainer")
            system.wait_ready("trainer")
            wait_for(lambda: read_all(system), "all items read")
            with writing(system) as log:
                shown |= visit(log, [f"{turn}-{n}" for n in range(USERS)], 4)
            wait_for(lambda: read_all(system), "all records read")
            if turn == "second":
                wait_for(partial(tower_items, system, shown), "a batch of the towers")
                system.kill("trainer")  # its journal names records of `item` that the next compaction takes
                with writing(system) as log:
                    put(log, [*gone(4), *day_of(4, "again")])
        assert {f"day3-{5 * n + 1}" for n in range(USERS)} <= tower_items(system, shown)


def named(system: Services, day: int) -> list[str]:
    """Items shown now, each under its own title."""
    items = system.call("POST", "/v1/recommend", {"user_id": f"u{day}", "n": 20})["items"]
    assert [item["title"].split()[0] for item in items] == [item["item_id"].removeprefix("day") for item in items]
    return [item["item_id"] for item in items]


def catalogue_bytes(system: Services) -> int:
    """Of the newest file; the one before it is kept, too."""
    files = [path.stat() for path in (system.data / "ranking").glob("catalogue-*.columns")]
    return max(files, key=lambda file: file.st_mtime_ns).st_size


def test_catalogue_of_ranking_follows_the_items_alive_and_no_row_shows_two_items(tmp_path: Path) -> None:
    days, count = 30, 500
    with contextlib.closing(Services(tmp_path / "ranking", "capacity.memory_bytes = 25000000\n")) as system:
        system.spawn("ranking")
        system.wait_ready("ranking")
        for day in range(days):
            with writing(system) as log:
                put(log, day_of(day, "", count))
                put(log, gone(day - 1, count) if day else [])
            named(system, day)
        last = {f"day{days - 1}-{n}" for n in range(count)}
        wait_for(lambda: set(named(system, days)) <= last and named(system, days), "the last day's items are shown")
        wait_for(lambda: system.metric("recsys_catalogue_items") == count, "all deletions are read")
        # Two days at once and what is kept of deleted items, of 2.5 MB; all that ever were would be beyond it.
        assert 0.1 < system.metric("recsys_catalogue_full_ratio") < 0.4
        system.processes["ranking"].terminate()
        system.processes["ranking"].wait(START_S)
        size = catalogue_bytes(system)
        assert 0 < size < 300_000
        system.spawn("ranking")
        system.wait_ready("ranking")
        assert set(named(system, days)) <= last and system.metric("recsys_catalogue_items") == count
        assert system.metric("recsys_catalogue_full_ratio") < 0.4
        with writing(system) as log:
            put(log, gone(days - 1, count))
            put(log, day_of(days, "", 10))
        wait_for(lambda: len(named(system, days)) == 10, "only the ten items left are shown")
        # Rows that were given up are emptied once no answer holds them any more: on its next turn.
        wait_for(lambda: system.metric("recsys_catalogue_full_ratio") < 0.07, "the deleted items' rows are empty")
        system.processes["ranking"].terminate()
        system.processes["ranking"].wait(START_S)
        assert 0 < catalogue_bytes(system) < size / 4
