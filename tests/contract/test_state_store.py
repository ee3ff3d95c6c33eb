"""The contract of StateStore, on every implementation; the in-memory one is the oracle of the others."""

from __future__ import annotations

import contextlib
import itertools
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recsys.config import Config, StateConfig
from recsys.errors import ConfigError, StateUnavailable
from recsys.state import merge
from recsys.state.base import StateStore
from recsys.state.cache import UserCache
from recsys.state.memory_state import MemoryState
from recsys.state.open_state import open_state
from recsys.state.redis import RedisState
from recsys.state.sqlite_state import SqliteState
from recsys.testing.servers import Server, free_port, redis_server
from recsys.types import HistoryEvent, UserState, UserUpdate

HISTORY_LEN, SEEN_LEN = 5, 4
CACHE_BYTES = 10_000
"""Of a store that keeps users parsed: some of them leave."""
Open = Callable[[], StateStore]
_numbers = itertools.count()


@pytest.fixture(
    params=[
        "memory",
        "sqlite",
        "sqlite cached",
        pytest.param("redis", marks=pytest.mark.system),
        pytest.param("redis cached", marks=pytest.mark.system),
    ]
)
def open_new(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    """Opens another empty store."""
    opened: list[StateStore] = []

    def make() -> StateStore:
        kind, *cached = request.param.split()
        cache = UserCache(CACHE_BYTES) if cached else None
        if kind == "memory":
            store: StateStore = MemoryState(HISTORY_LEN, SEEN_LEN)
        elif kind == "sqlite":
            store = SqliteState(tmp_path / f"{next(_numbers)}.db", HISTORY_LEN, SEEN_LEN, cache=cache)
        else:
            server: Server = request.getfixturevalue("redis")
            url = f"redis://127.0.0.1:{server.port}/0"
            store = RedisState(url, f"test{next(_numbers)}", HISTORY_LEN, SEEN_LEN, cache)
        opened.append(store)
        return store

    yield make
    for store in opened:
        store.close()


def event(time_ms: int, name: str = "", kind: str = "click", item: str = "i", arrival: int = 0) -> HistoryEvent:
    return HistoryEvent(
        time_ms=time_ms, event_id=name or f"e{time_ms}", item_id=item, type=kind, session_id=None, arrival=arrival
    )


def place(event: HistoryEvent) -> tuple[int, int, str]:
    return event.place


def click(user: str, *times: int) -> UserUpdate:
    return UserUpdate(user_id=user, events=tuple(event(t) for t in times))


def test_unknown_user_has_an_empty_state_and_a_new_store_no_positions(open_new: Open) -> None:
    store = open_new()
    assert store.get("nobody") == UserState() and store.history("nobody") == ()
    assert store.positions() == {}


def test_history_keeps_the_newest_of_each_type_in_time_order(open_new: Open) -> None:
    store = open_new()
    for t in (9, 3, 7, 1, 8, 2, 6):
        store.apply([click("u", t)], {})
    store.apply([UserUpdate(user_id="u", events=(event(5, "like", "like"),))], {})
    history = store.history("u")
    assert store.get("u").history == history
    assert [e.time_ms for e in history if e.type == "click"] == [3, 6, 7, 8, 9]
    assert [e.time_ms for e in history] == [3, 5, 6, 7, 8, 9]


def test_events_of_one_time_lie_as_they_arrived_and_the_last_of_them_stay(open_new: Open) -> None:
    store = open_new()
    names = ["z", "a", "m", "b", "y", "c", "x"]  # an order that no sorting of ids gives
    events = [event(1, name, arrival=1 + n) for n, name in enumerate(names)]
    for group in (events[3:5], events[:3], events[2:4], events[5:], events[:1]):
        store.apply([UserUpdate(user_id="u", events=tuple(group))], {})
    assert [e.event_id for e in store.get("u").history] == names[-HISTORY_LEN:]
    assert [e.arrival for e in store.get("u").history] == [3, 4, 5, 6, 7]


def test_a_copy_that_arrived_later_changes_nothing(open_new: Open) -> None:
    straight, turned = open_new(), open_new()
    copies = [UserUpdate(user_id="u", events=(event(1, "a", arrival=at),)) for at in (1, 9)]
    other = UserUpdate(user_id="u", events=(event(1, "b", arrival=5),))
    straight.apply([copies[0], other, copies[1]], {})
    turned.apply([copies[1], other, copies[0]], {})
    assert straight.get("u") == turned.get("u")
    assert [(e.event_id, e.arrival) for e in turned.get("u").history] == [("a", 1), ("b", 5)]


def test_a_history_of_an_earlier_version_is_read_and_lies_before_what_comes(tmp_path: Path) -> None:
    store = SqliteState(tmp_path / "state.db", HISTORY_LEN, SEEN_LEN)
    with sqlite3.connect(tmp_path / "state.db") as connection:
        rows = b'[[5,"x","i1","click",null],[7,"y","i2","click","s"]]'
        connection.execute("INSERT INTO history VALUES ('u', ?)", (rows,))
    connection.close()
    assert [(e.event_id, e.session_id, e.arrival) for e in store.get("u").history] == [("x", None, 0), ("y", "s", 0)]
    store.apply([UserUpdate(user_id="u", events=(event(7, "a", arrival=1), event(7, "y", arrival=2)))], {})
    assert [e.event_id for e in store.get("u").history] == ["x", "y", "a"]
    store.close()


def test_all_fields_come_back(open_new: Open) -> None:
    store = open_new()
    full = HistoryEvent(time_ms=2**40, event_id="ü\n", item_id="片", type="buy", session_id="s:1", arrival=2**50)
    store.apply([UserUpdate(user_id="u", events=(full,), seen=("片", "b"))], {})
    (found,) = store.get("u").history
    assert found.arrival == 2**50
    assert (found.time_ms, found.event_id, found.item_id, found.type, found.session_id) == (
        2**40,
        "ü\n",
        "片",
        "buy",
        "s:1",
    )
    assert store.get("u").seen == ("片", "b")


def test_seen_keeps_the_last_distinct_and_seeing_again_renews(open_new: Open) -> None:
    store = open_new()
    store.apply([UserUpdate(user_id="u", seen=("a", "b", "c"))], {})
    store.apply([UserUpdate(user_id="u", seen=("a", "d", "e"))], {})
    assert store.get("u").seen == ("c", "a", "d", "e")


def test_seen_items_are_counted_once_a_minute(open_new: Open) -> None:
    store = open_new()
    for seconds in (0, 59, 60, 200, 150, 260):
        store.apply([UserUpdate(user_id="u", seen=("a", "b") if seconds < 100 else ("a",), seen_ms=seconds * 1000)], {})
    assert store.get("u").seen == ("b", "a")
    assert store.get("u").shown == ((60_000, 1), (260_000, 3))


def test_seen_items_of_an_earlier_version_are_read(tmp_path: Path) -> None:
    store = SqliteState(tmp_path / "state.db", HISTORY_LEN, SEEN_LEN)
    with sqlite3.connect(tmp_path / "state.db") as connection:
        connection.execute("INSERT INTO seen VALUES ('u', ?)", (b'["a","b"]',))
    connection.close()
    assert store.get("u") == UserState(seen=("a", "b"), shown=((0, 1), (0, 1)))
    store.apply([UserUpdate(user_id="u", seen=("a",), seen_ms=100_000)], {})
    assert store.get("u") == UserState(seen=("b", "a"), shown=((0, 1), (100_000, 2)))
    store.close()


def test_items_whose_events_left_the_history_stay_known(open_new: Open) -> None:
    store = open_new()
    for item in "abc":
        store.apply([UserUpdate(user_id="u", events=(event(ord(item), item=item),))], {})
    clicks = tuple(event(200 + n, item="x") for n in range(2 * HISTORY_LEN))
    for _ in range(2):  # a record applied again changes nothing
        store.apply([UserUpdate(user_id="u", events=clicks)], {})
    state = store.get("u")
    assert {e.item_id for e in state.history} == {"x"}
    assert sorted((e.item_id, e.time_ms) for e in state.acted if e.item_id != "x") == [("a", 97), ("b", 98), ("c", 99)]
    store.apply([UserUpdate(user_id="u", acted=(event(300, kind="dislike", item="d"), event(50, item="a")))], {})
    assert {e.item_id: e.time_ms for e in store.get("u").acted}.items() >= {("a", 97), ("d", 300)}
    store.apply([UserUpdate(user_id="u", forget=True)], {})
    assert store.get("u") == UserState()


def test_of_too_many_items_the_newest_stay_known_and_hidden(open_new: Open) -> None:
    store = open_new()
    acted = tuple(event(1000 - n, item=f"i{n}") for n in range(merge.ACTED + 3))
    store.apply([UserUpdate(user_id="u", acted=acted, hidden=tuple(f"i{n}" for n in range(merge.HIDDEN + 2)))], {})
    store.apply([UserUpdate(user_id="u", hidden=("i2",))], {})
    state = store.get("u")
    assert {e.item_id for e in state.acted} == {f"i{n}" for n in range(merge.ACTED)}
    assert len(state.hidden) == merge.HIDDEN and state.hidden[0] == "i3" and state.hidden[-1] == "i2"


def test_a_state_file_of_an_earlier_version_gets_room_for_items(tmp_path: Path) -> None:
    store = SqliteState(tmp_path / "state.db", HISTORY_LEN, SEEN_LEN)
    store.apply([click("u", 1)], {})
    store.close()
    with sqlite3.connect(tmp_path / "state.db") as connection:
        connection.execute("DROP TABLE items")
    connection.close()
    store = SqliteState(tmp_path / "state.db", HISTORY_LEN, SEEN_LEN)
    store.apply([UserUpdate(user_id="u", hidden=("a",))], {})
    state = store.get("u")
    assert (len(state.history), state.hidden, state.acted) == (1, ("a",), ())
    store.close()


def test_forget_deletes_what_came_before_and_later_updates_apply(open_new: Open) -> None:
    store = open_new()
    store.apply([click("u", 1, 2), UserUpdate(user_id="u", seen=("a",)), click("other", 1)], {"feedback/0": 3})
    store.apply([UserUpdate(user_id="u", forget=True)], {"feedback/0": 4})
    assert store.get("u") == UserState()
    assert len(store.get("other").history) == 1
    store.apply([click("u", 5), UserUpdate(user_id="u", forget=True), click("u", 1)], {"feedback/0": 7})
    assert [e.time_ms for e in store.get("u").history] == [1]
    assert store.positions() == {"feedback/0": 7}


@pytest.mark.system
def test_two_processes_on_one_redis_never_hide_each_others_writes(redis: Server) -> None:
    """Both hold users parsed; each is at the positions that it looked at last."""
    url, prefix = f"redis://127.0.0.1:{redis.port}/0", f"two{next(_numbers)}"
    mine, other = (RedisState(url, prefix, HISTORY_LEN, SEEN_LEN, UserCache(2**20)) for _ in range(2))
    mine.apply([click("u", 1)], {"feedback/0": 1})
    other.apply([click("u", 2)], {"feedback/0": 2}, {"feedback/0": 1})
    assert mine.positions() == {"feedback/0": 2} and len(mine.get("u").history) == 2
    other.apply([click("u", 3)], {"impression/0": 9})
    mine.apply([click("u", 4)], {"feedback/0": 3}, {"feedback/0": 2})
    assert len(mine.get("u").history) == 4, "what the other wrote in between is lost"
    with pytest.raises(StateUnavailable):
        other.apply([click("u", 5)], {"feedback/0": 3}, {"feedback/0": 2})
    assert len(other.get("u").history) == 4
    mine._client.delete(*mine._client.keys(f"{prefix}:*"))
    assert other.positions() == {} and other.get("u") == UserState(), (
        "a store that lost its data is not answered from memory"
    )
    for store in (mine, other):
        store.close()


def test_positions_are_kept_per_partition(open_new: Open) -> None:
    store = open_new()
    store.apply([], {"feedback/0": 1, "impression/1": 2**40})
    store.apply([], {"feedback/0": 5})
    assert store.positions() == {"feedback/0": 5, "impression/1": 2**40}


def test_what_follows_positions_that_the_store_lost_is_not_applied(open_new: Open) -> None:
    store = open_new()
    store.apply([click("u", 1)], {"feedback/0": 5})
    with pytest.raises(StateUnavailable, match="lost its data"):
        store.apply([click("u", 2)], {"feedback/0": 7}, {"feedback/0": 6})
    assert store.positions() == {"feedback/0": 5} and len(store.get("u").history) == 1
    store.apply([click("u", 2)], {"feedback/0": 7}, {"feedback/0": 5})
    assert store.positions() == {"feedback/0": 7} and len(store.get("u").history) == 2


def test_positions_name_the_log_they_are_in(open_new: Open) -> None:
    store = open_new()
    store.apply([], {"feedback/0": 7})
    assert store.logs() == {}
    store.move({"feedback/0": 0, "impression/0": 3}, {"feedback/0": "log-2", "impression/0": "log-1"})
    store.apply([click("u", 1)], {"feedback/0": 1})
    assert store.positions() == {"feedback/0": 1, "impression/0": 3}
    assert store.logs() == {"feedback/0": "log-2", "impression/0": "log-1"}


def test_a_password_is_in_no_message() -> None:
    store = RedisState(f"redis://:s3cr@t@127.0.0.1:{free_port()}/0", "p", HISTORY_LEN, SEEN_LEN)
    with pytest.raises(StateUnavailable) as found:
        store.get("u")
    assert "cr@t" not in str(found.value) and "***@127.0.0.1" in str(found.value)
    with pytest.raises(ConfigError) as wrong:
        RedisState("http://u:s3cret@host?password=s3cret", "p", HISTORY_LEN, SEEN_LEN)
    assert "s3cret" not in str(wrong.value)


def test_an_observer_never_sees_updates_without_their_position(open_new: Open) -> None:
    store = open_new()
    writer = threading.Thread(target=lambda: [store.apply([click("u", i)], {"feedback/0": i}) for i in range(1, 301)])
    writer.start()
    position = 0
    while position < 300:
        before = max((e.time_ms for e in store.get("u").history), default=0)
        position = store.positions().get("feedback/0", 0)
        after = max((e.time_ms for e in store.get("u").history), default=0)
        assert before <= position <= after
    writer.join()


HOSTILE = [
    "u:1",
    "{u}",
    "u\x00v",
    "u\r\nDEL x",
    "*",
    "positions",
    "🦊" * 60,
    " ",
    "u",
    "h:u",
    "s:u",
    "' OR 1=1 --",
    "%s",
    "\x7f\x1b[",
]


def test_hostile_ids_stay_apart(open_new: Open) -> None:
    store = open_new()
    store.apply(
        [
            UserUpdate(user_id=name, events=(event(i, name, name, name),), seen=(name,))
            for i, name in enumerate(HOSTILE)
        ],
        {"a/0": 1},
    )
    for i, name in enumerate(HOSTILE):
        state = store.get(name)
        assert [(e.time_ms, e.event_id, e.item_id, e.type) for e in state.history] == [(i, name, name, name)]
        assert state.seen == (name,)
    assert store.positions() == {"a/0": 1}


_events = st.builds(event, st.integers(0, 12), st.sampled_from("abc"), st.sampled_from(["click", "like"]))
# An event id belongs to one event: its type follows from its identity.
_updates = st.lists(
    st.tuples(st.sampled_from(["u", "v"]), st.integers(0, 12), st.sampled_from("abc")).map(
        lambda x: UserUpdate(user_id=x[0], events=(event(x[1], x[2], "click" if x[1] % 3 else "like"),))
    ),
    max_size=40,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(updates=_updates, data=st.data())
def test_any_order_with_duplicates_gives_the_history_of_the_sorted_stream(
    open_new: Open, updates: list[UserUpdate], data: st.DataObject
) -> None:
    straight, shuffled = MemoryState(HISTORY_LEN, SEEN_LEN), open_new()
    once = {(u.user_id, u.events[0]): u for u in updates}
    straight.apply(sorted(once.values(), key=lambda u: u.events[0].place), {})
    order = data.draw(st.permutations(updates + updates[: len(updates) // 2]))
    half = len(order) // 2
    shuffled.apply(order[:half], {})
    shuffled.apply(order[half:], {})
    for user in ("u", "v"):
        expected = sorted({u.events[0] for u in updates if u.user_id == user}, key=place)
        newest = [e for kind in ("click", "like") for e in [x for x in expected if x.type == kind][-HISTORY_LEN:]]
        assert list(shuffled.get(user).history) == sorted(newest, key=place)
        assert shuffled.get(user) == straight.get(user)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    updates=st.lists(
        st.builds(
            UserUpdate,
            user_id=st.sampled_from(["u", "v"]),
            events=st.lists(_events, max_size=3).map(tuple),
            seen=st.lists(st.sampled_from("abcdefgh"), max_size=6).map(tuple),
            seen_ms=st.integers(0, 300_000),
            forget=st.booleans(),
        ),
        max_size=30,
    )
)
def test_every_store_agrees_with_the_one_in_memory(open_new: Open, updates: list[UserUpdate]) -> None:
    oracle, store = MemoryState(HISTORY_LEN, SEEN_LEN), open_new()
    oracle.apply(updates, {})
    for start in range(0, len(updates), 7):
        store.apply(updates[start : start + 7], {"feedback/0": start})
    assert [store.get(user) for user in ("u", "v")] == [oracle.get(user) for user in ("u", "v")]


def test_sqlite_state_is_there_after_reopening_and_for_other_connections(tmp_path: Path) -> None:
    writer, reader = (SqliteState(tmp_path / "state.db", HISTORY_LEN, SEEN_LEN) for _ in range(2))
    writer.apply([click("u", 1)], {"feedback/0": 9})
    assert len(reader.get("u").history) == 1
    assert reader.positions() == {"feedback/0": 9}
    writer.close()
    reader.close()
    again = SqliteState(tmp_path / "state.db", HISTORY_LEN, SEEN_LEN)
    assert again.positions() == {"feedback/0": 9}
    again.close()


def test_sqlite_positions_and_updates_fail_together(tmp_path: Path) -> None:
    store = SqliteState(tmp_path / "state.db", HISTORY_LEN, SEEN_LEN)
    breaker = sqlite3.connect(tmp_path / "state.db")
    breaker.execute("CREATE TRIGGER no BEFORE INSERT ON positions BEGIN SELECT RAISE(ABORT, 'disk says no'); END")
    breaker.commit()
    with pytest.raises(StateUnavailable, match="disk says no"):
        store.apply([click("u", 1)], {"feedback/0": 1})
    assert store.get("u") == UserState()
    breaker.execute("DROP TRIGGER no")
    breaker.commit()
    store.apply([click("u", 1)], {"feedback/0": 1})
    assert len(store.get("u").history) == 1
    breaker.close()
    store.close()


def test_damaged_sqlite_state_names_the_file_and_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "state.db").write_bytes(b"not a database" * 100)
    with pytest.raises(StateUnavailable, match=r"state\.db.*delete it"):
        SqliteState(tmp_path / "state.db", HISTORY_LEN, SEEN_LEN)


def test_a_damaged_value_costs_that_users_history_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = SqliteState(tmp_path / "state.db", HISTORY_LEN, SEEN_LEN)
    store.apply([click("u", 1), click("other", 1)], {"feedback/0": 2})
    with contextlib.closing(sqlite3.connect(tmp_path / "state.db")) as file, file:
        (value,) = file.execute("SELECT value FROM history WHERE user_id = 'u'").fetchone()
        for at in range(len(value)):
            damaged = value[:at] + bytes([value[at] ^ 1]) + value[at + 1 :]
            file.execute("UPDATE history SET value = ? WHERE user_id = 'u'", (damaged,))
            file.commit()
            assert store.get("u").history == ()
    assert "damaged" in caplog.text and len(store.get("other").history) == 1
    store.apply([click("u", 2)], {"feedback/0": 3})
    assert len(store.get("u").history) == 1
    store.close()


def test_unreachable_redis_is_unavailable_at_once_and_open_does_not_need_it(tmp_path: Path) -> None:
    config = Config(data_dir=tmp_path, state=StateConfig(kind="redis", url=f"redis://127.0.0.1:{free_port()}/0"))
    store = open_state(config)
    for call in (lambda: store.get("u"), store.positions, lambda: store.apply([click("u", 1)], {})):
        with pytest.raises(StateUnavailable, match=r"redis://127\.0\.0\.1"):
            call()
    with pytest.raises(ConfigError, match=r"state\.url"):
        RedisState("http://x", "p", 1, 1)


@pytest.mark.system
def test_redis_that_restarts_is_used_again_and_its_loss_shows_in_the_positions(tmp_path: Path) -> None:
    with redis_server(tmp_path) as server:
        store = RedisState(f"redis://127.0.0.1:{server.port}/0", "p", HISTORY_LEN, SEEN_LEN)
        store.apply([click("u", 1)], {"feedback/0": 1})
        server.stop()
        with pytest.raises(StateUnavailable):
            store.get("u")
        server.start()
        assert store.positions() == {}
        store.apply([click("u", 1)], {"feedback/0": 1})
        assert len(store.get("u").history) == 1
        store.close()
