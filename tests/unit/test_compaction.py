"""The topic `item` of the embedded log is compacted behind its readers, not under them."""

from __future__ import annotations

from pathlib import Path

from recsys.clock import ManualClock
from recsys.events.messages import dump_item
from recsys.streams.sqlite_file import DELETED_MS
from recsys.streams.sqlite_log import SqliteLog
from recsys.types import Item

START_MS = 1_700_000_000_000


def written(log: SqliteLog, *items: Item) -> None:
    log.append("item", [(item.item_id, dump_item(item)) for item in items])


def item(name: str, version: int) -> Item:
    return Item(item_id=name, title=f"{version} " + "x" * 2000)


def compacted(folder: Path, clock: ManualClock) -> SqliteLog:
    """The log, opened anew and written to: it looks at its size then, and is done when it is closed."""
    log = SqliteLog(folder, clock=clock, retention_bytes=2**20)
    written(log, Item(item_id="last"))
    log.close()
    return SqliteLog(folder, clock=clock)


def kept(log: SqliteLog) -> list[tuple[int, str]]:
    return [(record.offset, record.key) for record in log.read("item", 0, 0, 10_000)]


def test_what_a_reader_has_before_it_stays_with_what_it_replaces(tmp_path: Path) -> None:
    clock = ManualClock(START_MS)
    log = SqliteLog(tmp_path, clock=clock)
    written(log, *(item(name, version) for version in range(3) for name in "abc"))  # 0 to 8
    log.commit("trainer", "item", 0, 6)
    written(log, *(item(f"more{n}", 0) for n in range(1000)))
    log.close()
    log = compacted(tmp_path, clock)
    # The state at 6 is the second version of each; what comes then is whole.
    assert kept(log)[:7] == [(3, "a"), (4, "b"), (5, "c"), (6, "a"), (7, "b"), (8, "c"), (9, "more0")]
    log.commit("trainer", "item", 0, 1009)
    log.close()
    log = compacted(tmp_path, clock)
    assert kept(log)[0] == (6, "a")
    log.close()


def test_deletions_are_kept_for_a_day(tmp_path: Path) -> None:
    clock = ManualClock(START_MS)
    log = SqliteLog(tmp_path, clock=clock)
    written(log, *(item(f"i{n}", 0) for n in range(600)), *(Item(item_id=f"i{n}", deleted=True) for n in range(500)))
    log.append("item", [("odd", b"no JSON"), ("list", b"[1]"), ("i500", b"")])
    log.commit("trainer", "item", 0, 1103)
    clock.advance(DELETED_MS - 1000)
    written(log, *(item(f"j{n}", 0) for n in range(600)), Item(item_id="j0", deleted=True))
    log.commit("trainer", "item", 0, 1704)
    log.close()
    log = compacted(tmp_path, clock)
    assert sum(b'"deleted":true' in record.value for record in log.read("item", 0, 0, 10_000)) == 501
    log.close()
    clock.advance(2000)
    log = compacted(tmp_path, clock)
    left = kept(log)
    assert {key for _, key in left} == {f"i{n}" for n in range(501, 600)} | {f"j{n}" for n in range(600)} | {
        *("odd", "list", "last")
    }
    assert left[-1][0] == 1705
    log.close()
