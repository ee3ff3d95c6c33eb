"""Embedded user state has a bound: the users longest away make room, a flood of new ones is not faster, older files have it too."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from recsys.config import Config
from recsys.config.stores import LogConfig
from recsys.state.open_state import open_state
from recsys.state.sqlite_state import SqliteState
from recsys.types import HistoryEvent, UserUpdate

DAY_MS = 86_400_000
MAX_BYTES = 2**20


def came(user_id: str, day: int, items: int = 20) -> UserUpdate:
    """A user's visit on a day."""
    shown = tuple(f"a-rather-long-item-id-{n}" for n in range(items))
    event = HistoryEvent(time_ms=day * DAY_MS, event_id=f"{user_id}-{day}", item_id="i", type="click")
    return UserUpdate(user_id=user_id, events=(event,), seen=shown, seen_ms=day * DAY_MS)


def used_bytes(path: Path) -> int:
    with sqlite3.connect(path) as connection:
        pages, free, size = (
            connection.execute(f"PRAGMA {n}").fetchone()[0] for n in ("page_count", "freelist_count", "page_size")
        )
    connection.close()
    return int((pages - free) * size)


def fill(store: SqliteState, users: int, day: int, prefix: str, batch: int = 500) -> None:
    for start in range(0, users, batch):
        store.apply([came(f"{prefix}{n}", day) for n in range(start, min(start + batch, users))], {"feedback/0": start})


def test_users_longest_away_make_room_and_who_came_back_stays(tmp_path: Path) -> None:
    store = SqliteState(tmp_path / "state.db", 50, 1000, MAX_BYTES)
    fill(store, 1000, 100, "old-")
    store.apply([came("old-7", 130)], {})
    fill(store, 3000, 120, "new-")
    assert store.full_ratio < 1.5
    store.apply([came("last", 131)], {"feedback/0": 9})
    store.apply([came("last", 132)], {"feedback/0": 10})
    assert len(store.get("last").history) == 2
    assert store.get("old-7").history, "it was there later than the others"
    assert sum(bool(store.get(f"old-{n}").history) for n in range(1000)) == 1
    assert store.positions() == {"feedback/0": 10}
    store.close()


def test_flood_of_new_users_does_not_outgrow_the_bound(tmp_path: Path) -> None:
    store = SqliteState(tmp_path / "state.db", 50, 1000, MAX_BYTES)
    fill(store, 20_000, 200, "flood-", batch=1000)
    store.close()
    assert used_bytes(tmp_path / "state.db") < 2 * MAX_BYTES, "a batch more than the bound, at most"


def test_users_of_a_file_of_before_are_bounded_too(tmp_path: Path) -> None:
    store = SqliteState(tmp_path / "state.db", 50, 1000)
    fill(store, 3000, 300, "user-")
    store.close()
    with sqlite3.connect(tmp_path / "state.db") as connection:
        connection.execute("DROP TABLE users")
    connection.close()
    again = SqliteState(tmp_path / "state.db", 50, 1000, MAX_BYTES)
    assert len(again.get("user-1").history) == 1
    for day in range(40):
        again.apply([came("here", 300 + day)], {})
    again.close()
    assert used_bytes(tmp_path / "state.db") < 1.1 * MAX_BYTES


def test_the_bound_is_that_of_the_log(tmp_path: Path) -> None:
    config = Config(data_dir=tmp_path, log=LogConfig(retention_bytes=MAX_BYTES))
    store = open_state(config)
    assert isinstance(store, SqliteState)
    fill(store, 6000, 1, "u", batch=1000)
    store.close()
    assert used_bytes(tmp_path / "state.db") < 2 * MAX_BYTES
