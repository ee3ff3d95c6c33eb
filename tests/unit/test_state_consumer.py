"""The state consumer: user state and counters from the log, whatever arrives twice, late or after a loss."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recsys.candidates import snapshot
from recsys.candidates.limits import NEWCOMER
from recsys.candidates.sources import Sources
from recsys.candidates.state_consumer import MARK_MS, SETTLED_MS, StateConsumer
from recsys.clock import ManualClock
from recsys.config import Config, parse
from recsys.errors import StateUnavailable
from recsys.events import messages
from recsys.features.build import shared_columns, user_features
from recsys.features.catalogue import Catalogue
from recsys.features.counters import columns_of
from recsys.features.schema import Schema
from recsys.state.base import StateStore
from recsys.state.memory_state import MemoryState
from recsys.streams.memory_log import MemoryLog
from recsys.types import Feedback, Impression, Item, Record, ShownItem

HOUR_MS = 3_600_000


class Ranking:
    """Log, store, sources and consumer of one ranking process."""

    def __init__(
        self, log: MemoryLog, clock: ManualClock, store: StateStore | None = None, config: Config | None = None
    ) -> None:
        config = config or Config()
        self.schema, self.clock, self.log = Schema.of(config), clock, log
        self.sources = Sources(config, self.schema, Catalogue(self.schema))
        for n in range(4):
            self.sources.item(Item(item_id=f"i{n}", attributes={"category": "c"}))
        self.store = store or MemoryState(50, 1000)
        self.bad: list[tuple[Record, str]] = []
        self.consumer = StateConsumer(
            config, log, clock, self.store, self.sources, lambda r, why: self.bad.append((r, why))
        )

    def catch_up(self) -> None:
        while self.consumer.turn():
            pass

    def popularity(self) -> list[float]:
        """In what a newcomer's click counts."""
        scores = self.sources.trending.score(np.arange(4, dtype=np.int32), self.clock.now_ms())
        return [round(score / NEWCOMER, 5) for score in scores.tolist()]


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(100 * HOUR_MS)


@pytest.fixture
def ranking(clock: ManualClock) -> Ranking:
    return Ranking(MemoryLog(clock), clock)


def click(ranking: Ranking, user: str, item: str, event_id: str = "", **fields: object) -> None:
    fields.setdefault("time_ms", ranking.clock.now_ms())
    feedback = Feedback(event_id=event_id or f"{user}{item}", user_id=user, item_id=item, type="click", **fields)  # type: ignore[arg-type]
    ranking.log.append("feedback", [(user, messages.dump_feedback(feedback))])


def test_a_duplicate_counts_once_within_the_horizon(ranking: Ranking) -> None:
    for _ in range(3):
        click(ranking, "u", "i1", "same")
    ranking.catch_up()
    assert ranking.popularity() == [0.0, 1.0, 0.0, 0.0]
    assert [e.event_id for e in ranking.store.get("u").history] == ["same"]


def test_as_of_moves_to_the_turns_beginning_once_all_is_read(ranking: Ranking) -> None:
    click(ranking, "u", "i1")
    accepted_ms = ranking.clock.now_ms()
    ranking.clock.advance(5)
    ranking.catch_up()
    assert ranking.consumer.user_state.time_ms >= accepted_ms
    assert ranking.consumer.user_state.positions["feedback/0"] == 1


def test_clients_times_order_history_as_they_are_but_for_the_future(ranking: Ranking) -> None:
    now_ms = ranking.clock.now_ms()
    click(ranking, "u", "i1", time_ms=4 * 10**12)
    click(ranking, "u", "i2", time_ms=0)
    click(ranking, "u", "i3", time_ms=now_ms - 90 * HOUR_MS)
    ranking.catch_up()
    history = ranking.store.get("u").history
    assert [(e.item_id, e.time_ms) for e in history] == [("i2", 0), ("i3", now_ms - 90 * HOUR_MS), ("i1", now_ms)]


def test_clicks_of_one_time_lie_in_the_order_of_the_log(ranking: Ranking) -> None:
    for number, item in enumerate(("i3", "i0", "i2", "i1")):
        click(ranking, "u", item, f"{9 - number}")
    ranking.catch_up()
    assert [e.item_id for e in ranking.store.get("u").history] == ["i3", "i0", "i2", "i1"]


def test_what_is_too_late_enters_the_history_once_and_is_counted_nowhere(ranking: Ranking, clock: ManualClock) -> None:
    first_ms = clock.now_ms()
    click(ranking, "u", "i1", "first", time_ms=first_ms)
    ranking.catch_up()
    before = ranking.popularity()
    for minutes in (70, 200):  # a copy that nobody remembers, and what happened long ago
        clock.set(first_ms + 60_000 * minutes)
        click(ranking, "u", "i1", "first", time_ms=first_ms)
        click(ranking, "v", "i2", "old", time_ms=first_ms - 1)
        ranking.catch_up()
    assert [e.event_id for e in ranking.store.get("u").history] == ["first"]
    assert [e.event_id for e in ranking.store.get("v").history] == ["old"]
    assert before[1] == 1.0 and ranking.popularity()[1] < 1.0 and ranking.popularity()[2] == 0.0


def test_a_copy_with_another_time_is_a_copy_in_the_history_too(ranking: Ranking, clock: ManualClock) -> None:
    for user in ("u", "v"):
        for _ in range(3):
            clock.advance(60_000)  # each process of several stamps it with a time of its own
            click(ranking, user, "i1", f"same-{user}")
        if user == "u":
            ranking.catch_up()
    ranking.catch_up()
    assert [len(ranking.store.get(user).history) for user in ("u", "v")] == [1, 1]


def test_a_store_that_fails_loses_no_event(ranking: Ranking) -> None:
    click(ranking, "u", "i1")
    apply, failures = ranking.store.apply, [StateUnavailable("away")]

    def fails(*arguments: Any) -> None:
        if failures:
            raise failures.pop()
        apply(*arguments)

    ranking.store.apply = fails  # type: ignore[assignment,method-assign]
    with pytest.raises(StateUnavailable):
        ranking.consumer.turn()
    ranking.catch_up()
    assert len(ranking.store.get("u").history) == 1
    assert ranking.popularity()[1] == 1.0


def test_co_visits_pair_events_of_one_session_even_within_one_batch(ranking: Ranking) -> None:
    click(ranking, "u", "i0", session_id="a")
    click(ranking, "u", "i1", session_id="a")
    click(ranking, "u", "i2", session_id="b")
    ranking.catch_up()
    rows, _ = ranking.sources.covisits.candidates([0], 10, ranking.clock.now_ms())
    assert rows.tolist() == [1]


def test_a_poison_message_is_passed_over_and_named(ranking: Ranking) -> None:
    ranking.log.append("feedback", [("u", b"{"), ("u", b'{"version":1}')])
    ranking.clock.set(1_800_000_000_000)
    click(ranking, "u", "i2", time_ms=1_800_000_000)
    click(ranking, "u", "i1")
    ranking.catch_up()
    assert len(ranking.bad) == 3
    assert "milliseconds" in ranking.bad[2][1]
    assert len(ranking.store.get("u").history) == 1


def test_forgetting_holds_in_log_order(ranking: Ranking) -> None:
    click(ranking, "u", "i1")
    ranking.log.append("feedback", [("u", messages.dump_forget("u", event_id="f", time_ms=0))])
    click(ranking, "u", "i2")
    ranking.catch_up()
    assert [e.item_id for e in ranking.store.get("u").history] == ["i2"]


def rates(ranking: Ranking, of: str) -> list[float]:
    """The first task's rate of the user u, or of the items i0 and i1, relative to everything's."""
    schema = Schema.of(Config())
    user = user_features(schema, ranking.sources.catalogue, "u", [], {})
    signals = ranking.sources.signals(user, [], np.array([0, 1], np.int32), ranking.clock.now_ms())
    return signals.counters[:, schema.counters.names.index(f"rate.{of}.86400.positive click")].tolist()


def test_a_forgotten_users_rates_are_gone(ranking: Ranking) -> None:
    shown = Impression(request_id="r", user_id="u", time_ms=100 * HOUR_MS, items=(ShownItem(item_id="i1", position=1),))
    ranking.log.append("impression", [("u", messages.dump_impression(shown))])
    ranking.catch_up()
    assert rates(ranking, "user")[0] < 0
    ranking.log.append("feedback", [("u", messages.dump_forget("u", event_id="f", time_ms=0))])
    ranking.catch_up()
    assert rates(ranking, "user")[0] == pytest.approx(0.0, abs=1e-6)


def test_impressions_make_items_seen_and_count_as_shown(ranking: Ranking) -> None:
    shown = Impression(
        request_id="r",
        user_id="u",
        time_ms=100 * HOUR_MS,
        items=(ShownItem(item_id="i1", position=1), ShownItem(item_id="i9", position=2)),
    )
    for _ in range(2):
        ranking.log.append("impression", [("u", messages.dump_impression(shown))])
    ranking.catch_up()
    assert ranking.store.get("u").seen == ("i1", "i9")
    assert rates(ranking, "item")[0] > rates(ranking, "item")[1]
    before = rates(ranking, "item")
    ranking.clock.advance(2 * HOUR_MS)
    ranking.log.append("impression", [("u", messages.dump_impression(shown))])  # a copy that nobody remembers
    ranking.catch_up()
    assert ranking.store.get("u").shown == ((100 * HOUR_MS, 1),) * 2
    assert rates(ranking, "item")[1] == pytest.approx(before[1], rel=0.2)


def test_a_store_that_lost_its_data_is_rebuilt_and_nothing_is_counted_twice(
    ranking: Ranking, clock: ManualClock
) -> None:
    click(ranking, "u", "i1")
    ranking.clock.advance(1000)
    click(ranking, "u", "i1")
    ranking.catch_up()
    for _ in range(2):
        ranking.consumer._store = ranking.store = MemoryState(50, 1000)
        ranking.catch_up()
        assert [e.item_id for e in ranking.store.get("u").history] == ["i1"]
    assert ranking.popularity()[1] == pytest.approx(1.0, abs=1e-3)


def test_a_store_that_loses_its_data_amid_a_turn_is_rebuilt(ranking: Ranking) -> None:
    """After its positions were asked for, before it is written to: a position of now would hide what is gone."""
    click(ranking, "u", "i1")
    ranking.catch_up()
    click(ranking, "u", "i0", "later")
    store = ranking.store
    asked = store.positions

    def loses() -> dict[str, int]:
        found = asked()
        store._users.clear()
        store._positions.clear()
        store.positions = asked  # type: ignore[method-assign]
        return found

    store.positions = loses  # type: ignore[method-assign]
    with pytest.raises(StateUnavailable, match="lost its data"):
        ranking.consumer.turn()
    ranking.catch_up()
    assert sorted(e.item_id for e in store.get("u").history) == ["i0", "i1"]
    assert ranking.popularity() == [1.0, 1.0, 0.0, 0.0]


def test_counters_restored_from_a_snapshot_go_on_where_they_were(
    ranking: Ranking, clock: ManualClock, tmp_path: Path
) -> None:
    click(ranking, "u", "i0", session_id="a")
    click(ranking, "u", "i1", session_id="a")
    ranking.catch_up()
    snapshot.save(tmp_path, ranking.sources, ranking.consumer, ranking.schema)
    click(ranking, "u", "i1", "later", session_id="a")
    again = Ranking(ranking.log, clock, ranking.store)
    assert snapshot.load(tmp_path, again.sources, again.consumer, again.schema, clock.now_ms())
    for side in (ranking, again):
        side.catch_up()
    assert again.popularity() == ranking.popularity() == [1.0, 2 / NEWCOMER, 0.0, 0.0]
    assert again.consumer.counter_positions == ranking.consumer.counter_positions
    assert again.sources.covisits.candidates([0], 10, clock.now_ms())[0].tolist() == [1]


def test_as_of_passes_the_answer_to_who_sent_an_event_soon_after_it(ranking: Ranking, clock: ManualClock) -> None:
    """The mark of the turn that read it is older than the answer: others follow until it is not."""
    ranking.catch_up()
    clock.advance(MARK_MS)
    click(ranking, "u", "i0")
    ranking.consumer.turn()
    told_ms = clock.now_ms() + 10
    while ranking.consumer.counters.time_ms < told_ms:
        rest_s = ranking.consumer.rest_s(10.0)
        assert rest_s <= MARK_MS / 1000
        clock.advance(max(1, int(rest_s * 1000)))
        ranking.consumer.turn()
    clock.advance(SETTLED_MS)
    ranking.consumer.turn()
    assert ranking.consumer.rest_s(10.0) == 10.0


def test_a_torn_snapshot_is_not_used(ranking: Ranking, clock: ManualClock, tmp_path: Path) -> None:
    click(ranking, "u", "i1")
    ranking.catch_up()
    snapshot.save(tmp_path, ranking.sources, ranking.consumer, ranking.schema)
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-3])
    again = Ranking(ranking.log, clock, ranking.store)
    assert not snapshot.load(tmp_path, again.sources, again.consumer, again.schema, clock.now_ms())
    again.catch_up()
    assert again.popularity() == [0.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("part", "field", "forged"),
    [
        ("covisits", "sizes", lambda sizes: -sizes),
        ("covisits", "sizes", lambda sizes: sizes.astype(np.float64)),
        ("covisits", "sizes", lambda sizes: np.ones(1, np.int64)),
        ("covisits", "lost", lambda lost: lost[:0]),
        ("covisits", "targets", lambda targets: targets[:0]),
        ("seen", "digest", lambda digests: digests[:0]),
    ],
)
def test_a_forged_snapshot_is_not_used(
    part: str, field: str, forged: Callable[[Any], Any], ranking: Ranking, clock: ManualClock, tmp_path: Path
) -> None:
    class Forger(Sources):
        def state(self) -> dict[str, Any]:
            state = super().state()
            return state | {part: {**state[part], field: forged(state[part][field])}}

    for item in ("i1", "i2", "i3"):
        click(ranking, "u", item, session_id="s")
    ranking.catch_up()
    forger = Forger(Config(), ranking.schema, ranking.sources.catalogue)
    forger.restore(ranking.sources.state(), np.arange(4, dtype=np.int32), clock.now_ms())
    snapshot.save(tmp_path, forger, ranking.consumer, ranking.schema)
    again = Ranking(ranking.log, clock)
    assert not snapshot.load(tmp_path, again.sources, again.consumer, again.schema, clock.now_ms())
    again.catch_up()
    assert again.popularity() == ranking.popularity()


class Letting:
    """A lock, and what was to be seen each time that it was let go."""

    def __init__(self, look: Callable[[], Any]) -> None:
        self._lock, self._look = threading.RLock(), look
        self.seen: list[Any] = []

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self.seen.append(self._look())
        self._lock.release()


def test_whenever_nobody_counts_what_is_counted_is_what_the_positions_say(ranking: Ranking) -> None:
    def look() -> tuple[list[float], int]:
        return ranking.popularity(), ranking.consumer.counter_positions["feedback/0"]

    letting = Letting(look)
    ranking.sources.writing = letting  # type: ignore[assignment]
    for number in (1, 2):
        click(ranking, f"u{number}", "i1")
        ranking.catch_up()
        assert letting.seen[-1] == look() == ([0.0, float(number), 0.0, 0.0], number)


class Racing(MemoryLog):
    """Between the reads of two topics somebody is answered and views the first item."""

    answer: Callable[[], None] | None = None

    def read(self, topic: str, partition: int, offset: int, limit: int) -> Sequence[Record]:
        records = super().read(topic, partition, offset, limit)
        if self.answer is not None:
            answer, self.answer = self.answer, None
            answer()
        return records


def test_a_view_is_never_read_before_its_impression(clock: ManualClock) -> None:
    log = Racing(clock)
    ranking = Ranking(log, clock)
    items = tuple(ShownItem(item_id=f"i{n}", position=n + 1) for n in range(2))
    deferred = Impression(request_id="r", user_id="u", time_ms=100 * HOUR_MS, items=items, activation="deferred")
    view = Feedback(event_id="v", user_id="u", item_id="i0", type="view", time_ms=0, request_id="r")

    def answer() -> None:
        log.append("impression", [("u", messages.dump_impression(deferred))])
        log.append("feedback", [("u", messages.dump_feedback(replace(view, time_ms=clock.now_ms())))])

    log.answer = answer
    ranking.catch_up()
    ranking.catch_up()
    shown, not_shown = rates(ranking, "item")
    assert shown < not_shown == pytest.approx(0.0, abs=1e-6)


def test_a_log_read_anew_counts_what_was_counted_live(clock: ManualClock) -> None:
    """One topic is much longer than the other: neither runs ahead by more than an impression is remembered."""
    config = parse({"features": {"context": ["hour"], "counters": [{"of": ["item", "hour"]}]}})
    log = MemoryLog(clock)
    live = Ranking(log, clock, config=config)
    for n in range(60):
        clock.advance(HOUR_MS // 5)
        items = (ShownItem(item_id="i0", position=1),)
        shown = Impression(
            request_id=f"r{n}", user_id=f"u{n}", time_ms=clock.now_ms(), items=items, context={"hour": "7"}
        )
        log.append("impression", [("u", messages.dump_impression(shown))])
        click(live, f"u{n}", "i0", f"c{n}", request_id=f"r{n}")
        for other in range(5 if n < 30 else 0):
            click(live, f"u{n}", "i1", f"o{n}.{other}")
        live.catch_up()
    again = Ranking(log, clock, config=config)
    again.consumer._most = 10
    again.catch_up()
    user = shared_columns(live.schema, "u", {"hour": "7"})
    columns = columns_of(*user, live.sources.catalogue.keys[[0]], live.sources.catalogue.mask[[0]])
    counts = [r.sources.events.counting.counters.counts(columns, clock.now_ms()) for r in (live, again)]
    np.testing.assert_allclose(counts[1], counts[0], rtol=1e-5)
    assert counts[0][0, 1, 0, 1] > 0
