"""Users held parsed by the process that writes them: never other than the store has them at the positions that were looked at."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.errors import StateUnavailable
from recsys.state.cache import UserCache
from recsys.state.memory_state import MemoryState
from recsys.state.merge import UserEntry
from recsys.state.sqlite_state import SqliteState
from recsys.types import HistoryEvent, UserState, UserUpdate

LARGE = 10 * 2**20


def cached(path: Path, max_bytes: int = LARGE, file_bytes: int = 2**30) -> tuple[SqliteState, UserCache]:
    cache = UserCache(max_bytes)
    return SqliteState(path, 5, 4, file_bytes, cache), cache


def click(user: str, time_ms: int, item: str = "i") -> UserUpdate:
    event = HistoryEvent(time_ms=time_ms, event_id=f"e{time_ms}", item_id=item, type="click")
    return UserUpdate(user_id=user, events=(event,))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.db"


def without_file(path: Path) -> None:
    """What was written is damaged behind the store's back: what still comes was held."""
    with sqlite3.connect(path) as other:
        other.execute("UPDATE history SET value = 'x'")
    other.close()


def test_what_was_written_or_read_is_not_read_again(path: Path) -> None:
    store, _ = cached(path)
    store.apply([click("u", 1), click("v", 1)], {"feedback/0": 2})
    store.close()
    store, _ = cached(path)
    store.apply([click("u", 2)], {"feedback/0": 3})
    read = store.get("v")
    without_file(path)
    assert store.get("v") is read and len(read.history) == 1
    store.apply([click("u", 3), click("v", 2)], {"feedback/0": 4})
    assert [len(store.get(user).history) for user in ("u", "v")] == [3, 2]
    assert len(read.history) == 1, "what somebody has does not change"
    store.close()
    again = SqliteState(path, 5, 4)
    assert [len(again.get(user).history) for user in ("u", "v")] == [3, 2], "all of it was written through"
    again.close()


def test_another_writer_is_seen_once_the_positions_are_looked_at(path: Path) -> None:
    mine, _ = cached(path)
    other, _ = cached(path)
    mine.apply([click("u", 1)], {"feedback/0": 1})
    assert len(mine.get("u").history) == 1
    other.apply([click("u", 2)], {"feedback/0": 2}, {"feedback/0": 1})
    assert mine.positions() == {"feedback/0": 2}
    assert len(mine.get("u").history) == 2, "older than the positions that this process says"
    other.apply([click("u", 3)], {"impression/0": 9})
    mine.apply([click("u", 4)], {"feedback/0": 3}, {"feedback/0": 2})
    assert len(mine.get("u").history) == 4, "what the other wrote in between is lost"
    with pytest.raises(StateUnavailable):
        other.apply([click("u", 5)], {"feedback/0": 3}, {"feedback/0": 2})
    assert len(other.get("u").history) == 4
    mine.close()
    other.close()


@settings(max_examples=40, deadline=None)
@given(
    turns=st.lists(
        st.tuples(
            st.integers(0, 1),
            st.lists(st.tuples(st.sampled_from("uvw"), st.integers(0, 9), st.booleans()), max_size=4),
            st.sampled_from("uvw"),
        ),
        max_size=20,
    ),
    max_bytes=st.sampled_from([0, 3000, LARGE]),
)
def test_two_writers_agree_with_one_in_memory(
    tmp_path_factory: pytest.TempPathFactory,
    turns: list[tuple[int, list[tuple[str, int, bool]], str]],
    max_bytes: int,
) -> None:
    path, oracle = tmp_path_factory.mktemp("two") / "state.db", MemoryState(5, 4)
    stores = [cached(path, max_bytes)[0] for _ in range(2)]
    for number, (writer, clicks, reader) in enumerate(turns, 1):
        updates = [UserUpdate(user_id=u, forget=True) if forget else click(u, at, f"i{at}") for u, at, forget in clicks]
        for store in (oracle, stores[writer]):
            store.apply(updates, {"feedback/0": number})
        for store in stores:
            assert store.positions() == {"feedback/0": number}
            assert store.get(reader) == oracle.get(reader)
    assert [stores[0].get(user) for user in "uvw"] == [oracle.get(user) for user in "uvw"]
    for store in stores:
        store.close()


def test_what_could_not_be_written_is_not_held(path: Path) -> None:
    store, _ = cached(path)
    store.apply([click("u", 1)], {"feedback/0": 1})
    breaker = sqlite3.connect(path)
    breaker.execute("CREATE TRIGGER no BEFORE INSERT ON positions BEGIN SELECT RAISE(ABORT, 'disk says no'); END")
    breaker.commit()
    with pytest.raises(StateUnavailable, match="disk says no"):
        store.apply([click("u", 2)], {"feedback/0": 2})
    assert len(store.get("u").history) == 1
    breaker.execute("DROP TRIGGER no")
    breaker.commit()
    breaker.close()
    store.apply([click("u", 2)], {"feedback/0": 2})
    assert len(store.get("u").history) == 2
    store.close()


def test_who_leaves_the_file_is_held_no_more(path: Path) -> None:
    store, _ = cached(path, file_bytes=100_000)
    seen = tuple(f"a-rather-long-item-id-{n}" for n in range(4))
    for n in range(2000):
        store.apply([UserUpdate(user_id=f"u{n}", seen=seen, seen_ms=n * 86_400_000)], {"feedback/0": n})
    assert store.get("u0") == UserState()
    store.apply([click("u0", 1)], {"feedback/0": 2000})
    held = store.get("u0")
    store.close()
    again = SqliteState(path, 5, 4)
    assert again.get("u0") == held and not held.seen
    again.close()


def test_of_too_many_those_longest_not_asked_for_go(path: Path) -> None:
    store, cache = cached(path, max_bytes=100_000)
    for n in range(300):
        store.apply([click(f"u{n}", 1)], {"feedback/0": n})
        assert len(store.get("u0").history) == 1
        assert 0 < cache.bytes <= 100_000
    assert cache.state("u0") is not None and cache.state("u299") is not None
    assert cache.state("u1") is None and len(store.get("u1").history) == 1
    store.close()


def test_the_bytes_of_a_user_grow_with_what_strangers_send() -> None:
    """Ids may have 256 bytes: a count of events alone would be off by three."""
    short, long = UserEntry(), UserEntry()
    for entry, item in ((short, "i"), (long, "i" * 256)):
        for at in range(50):
            entry.apply(click("u", at, item), 50, 10)
        entry.packed_history()
    assert long.memory_bytes - short.memory_bytes > 50 * 2 * 250
    assert short.copy().memory_bytes == short.memory_bytes


def test_a_read_that_a_write_overtook_is_not_kept() -> None:
    cache = UserCache(LARGE)
    before, old, new = cache.changes, UserEntry(), UserEntry()
    new.apply(click("u", 2), 5, 5)
    cache.written({"u": new}, (), {"feedback/0": 1})
    cache.read("u", old, before)
    found = cache.state("u")
    assert found is not None and len(found.history) == 1


def test_readers_beside_the_writer_never_go_back(path: Path) -> None:
    store, _ = cached(path, max_bytes=3000)  # of three users one is always read from the file
    went_back: list[tuple[int, int]] = []
    done = threading.Event()

    def read() -> None:
        last = dict.fromkeys("uvw", 0)
        while not done.is_set():
            for user in "uvw":
                newest = max((event.time_ms for event in store.get(user).history), default=0)
                if newest < last[user]:
                    went_back.append((last[user], newest))
                last[user] = newest

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for at in range(1, 300):
        store.apply([click(user, at) for user in "uvw"], {"feedback/0": at})
    done.set()
    for reader in readers:
        reader.join()
    assert not went_back
    store.close()


@given(st.lists(st.integers(0, 2**6 - 1), min_size=1, max_size=8))
def test_a_copy_that_is_changed_leaves_the_entry_as_it_was(steps: list[int]) -> None:
    """They share what no update touched."""

    def update(number: int, bits: int) -> UserUpdate:
        event = HistoryEvent(
            time_ms=number, event_id=f"e{number}", item_id=f"i{number % 3}", type="click", arrival=number
        )
        return UserUpdate(
            user_id="u",
            events=(event,) if bits & 1 else (),
            acted=(event,) if bits & 2 else (),
            hidden=(f"i{number}",) if bits & 4 else (),
            seen=(f"i{number}", "a") if bits & 8 else (),
            seen_ms=number * 1000,
            forget=bits & 48 == 48,
        )

    plain, entry = UserEntry(), UserEntry()
    for number, bits in enumerate(steps):
        before = entry.state()
        changed = entry.copy()
        for twice in range(2):
            changed.apply(update(2 * number + twice, bits), 2, 3)
            plain.apply(update(2 * number + twice, bits), 2, 3)
        assert entry.state() == before and changed.state() == plain.state()
        entry = changed
