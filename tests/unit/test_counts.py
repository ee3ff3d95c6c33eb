"""What counts when: in any order of the topics, once it was viewed, and only so much of one user; and how full what is bounded is."""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.candidates.limits import NEWCOMER, WINDOW_MS, Limits
from recsys.candidates.sources import Sources
from recsys.candidates.waiting_counts import Held
from recsys.config import Config, parse
from recsys.features.catalogue import Catalogue
from recsys.features.schema import Schema
from recsys.types import Feedback, HistoryEvent, Impression, Item, ShownItem

T0 = 1_700_000_000_000
CONFIG = parse({"features": {"context": ["hour"], "counters": [{"of": ["item"]}, {"of": ["item", "hour"]}]}})
SCHEMA = Schema.of(CONFIG)


class World:
    """Sources, and the histories that the state store would have."""

    def __init__(self, config: Config = CONFIG, items: int = 0) -> None:
        self.config, self.schema = config, Schema.of(config)
        self.sources = Sources(config, self.schema, Catalogue(self.schema))
        self.histories: dict[str, list[HistoryEvent]] = {}
        self._number = itertools.count()
        for n in range(items):
            self.item(f"i{n}")

    def item(self, item_id: str) -> None:
        self.sources.item(Item(item_id=item_id))

    def feedback(
        self, user: str, item: str, kind: str = "click", request: str | None = None, after_ms: int = 0
    ) -> None:
        number = next(self._number)
        feedback = Feedback(
            event_id=f"e{number}", user_id=user, item_id=item, type=kind, time_ms=T0 + number, request_id=request
        )
        event = HistoryEvent(time_ms=T0 + number, event_id=f"e{number}", item_id=item, type=kind, arrival=number)
        history = self.histories.setdefault(user, [])
        self.sources.events.feedback(feedback, history, event, T0 + after_ms)
        if kind != "view":
            history.append(event)

    def impression(self, request: str, user: str, items: Sequence[str], **fields: Any) -> None:
        shown = tuple(ShownItem(item_id=i, position=n, sources=("trending",)) for n, i in enumerate(items, start=1))
        self.sources.events.impression(
            Impression(request_id=request, user_id=user, time_ms=T0, items=shown, context={"hour": "1"}, **fields), T0
        )

    def counts(self, item: str) -> dict[str, float]:
        """Everything counted of one item: its own counters, trending, and what follows it."""
        catalogue, layout = self.sources.catalogue, self.schema.counters
        rows = catalogue.rows([item])
        shared = Schema.of(self.config)
        columns = self.sources.events.counting.columns(
            (np.zeros(len(shared.shared_slots), np.int64), np.zeros(len(shared.shared_slots), np.bool_)), rows
        )
        sums = self.sources.events.counting.counters.counts(columns, T0)[0, layout.slots.index(("item",)), -1]
        found, scores = self.sources.covisits.candidates([int(rows[0])], 50, T0)
        after = {f"then {catalogue.ids[row]}": float(score) for row, score in zip(found.tolist(), scores, strict=True)}
        named = zip(layout.columns, sums.tolist(), strict=True)
        return {
            "trending": round(float(self.sources.trending.score(rows, T0)[0]), 4),
            **after,
            **{name: round(value, 4) for name, value in named if value},
        }


@settings(deadline=None, max_examples=30)
@given(st.permutations(range(5)), st.integers(0, 12))
def test_counts_do_not_depend_on_which_topic_was_read_first(order: list[int], known: int) -> None:
    """Items may come before, between or after what happens to them, and across a restart."""

    def run(world: World, steps: Sequence[int], at: int) -> World:
        for step in range(12):
            if step == at:
                for n in steps:
                    world.item(f"i{n}")
            user = f"u{step // 6}"
            if step % 6 == 0:
                world.impression(f"r{user}", user, [f"i{n}" for n in range(5)])
            world.feedback(user, f"i{step % 5}", request=f"r{user}" if step % 2 else None)
            if step == 7:
                again = World()
                again.histories, again._number = world.histories, world._number
                rows = np.arange(len(world.sources.catalogue), dtype=np.int32)
                for item_id in [world.sources.catalogue.ids[row] for row in rows]:
                    again.item(item_id)
                again.sources.restore(world.sources.state(), rows, T0)
                world = again
        if at == 12:
            for n in steps:
                world.item(f"i{n}")
        return world

    first, other = run(World(), range(5), 0), run(World(), order, known)
    assert len(other.sources.events.items.held) == 0
    for n in range(5):
        # Co-visits halve with the visits of their item, too: a little depends on their order.
        assert other.counts(f"i{n}") == pytest.approx(first.counts(f"i{n}"), rel=0.02), n
    assert first.counts("i1")["then i2"] > 1 and first.counts("i1")["shown"] == 2


def test_too_much_that_waits_gives_up_what_waited_first() -> None:
    world = World()
    world.sources.events.items.held = Held(10)
    for n in range(12):
        world.feedback(f"u{n}", f"x{n}")
    assert world.sources.events.items.held.full_ratio == 1.0
    world.item("x0")
    world.item("x11")
    assert world.counts("x0")["trending"] == 0.0 and world.counts("x11")["trending"] == NEWCOMER


def test_a_forgotten_users_waiting_counts_are_gone() -> None:
    world = World()
    world.feedback("u", "x")
    world.feedback("v", "x")
    world.sources.events.forget("u")
    world.item("x")
    assert world.counts("x")["trending"] == NEWCOMER


def test_deferred_items_count_as_shown_once_viewed_and_their_positives_with_them() -> None:
    config = parse({**CONFIG.model_dump(mode="json"), "retrieval": {"learn_quotas": True}})
    world = World(config, 3)
    world.impression("r", "u", ["i0", "i1", "i2"], activation="deferred")
    world.feedback("u", "i1", request="r")
    assert "shown" not in world.counts("i0") and "positive click" not in world.counts("i1")
    assert sum(world.sources.events.quotas._shown.values()) == 0
    again = World(config, 3)
    again.histories, again._number = world.histories, world._number
    again.sources.restore(world.sources.state(), np.arange(3, dtype=np.int32), T0)
    for item in ("i0", "i1", "i0", "elsewhere"):
        again.feedback("u", item, "view", "r")
    again.feedback("u", "i0", request="r")
    assert again.counts("i0")["shown"] == again.counts("i1")["shown"] == 1.0 and "shown" not in again.counts("i2")
    assert again.counts("i1")["positive click"] == NEWCOMER and again.counts("i0")["positive click"] == 1.0
    for item in ("i0", "i1", "i1"):
        world.feedback("u", item, "view", "r")
    assert world.sources.events.quotas._shown["trending"] == 2.0


def test_quotas_learn_from_the_first_action_on_what_was_shown() -> None:
    world = World(parse({**CONFIG.model_dump(mode="json"), "retrieval": {"learn_quotas": True}}), 3)
    world.feedback("u", "i2")  # no newcomer
    world.impression("r", "u", ["i0", "i1"])
    for item, request in (("i0", "r"), ("i0", "r"), ("i2", "r"), ("i1", "unknown"), ("i1", None)):
        world.feedback("u", item, request=request)
    quotas = world.sources.events.quotas
    assert (quotas._shown["trending"], quotas._acted["trending"]) == (2.0, 1.0)


def test_one_user_counts_three_times_an_hour_and_a_newcomer_once_and_less() -> None:
    world = World(items=3)
    for _ in range(100):
        world.feedback("new", "i0", request="r")
    assert world.counts("i0")["trending"] == NEWCOMER
    world.feedback("known", "i1")
    for number in range(100):
        world.feedback("known", "i0", request=f"k{number}")
        world.impression(f"k{number}", "known", ["i0"])
    counts = world.counts("i0")
    assert counts["trending"] == pytest.approx(3 + NEWCOMER) and counts["shown"] == 3
    assert counts["positive click"] == pytest.approx(3 + NEWCOMER, abs=1e-3)
    assert world.counts("i1")["then i0"] == pytest.approx(3.0, rel=0.01)
    world.feedback("known", "i0", after_ms=WINDOW_MS)
    assert world.counts("i0")["trending"] == pytest.approx(4 + NEWCOMER, rel=1)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, WINDOW_MS)), max_size=200), st.integers(1, 4))
def test_in_no_hour_from_its_first_time_a_pair_counts_more_often(events: list[tuple[int, int]], most: int) -> None:
    limits, now_ms, admitted = Limits(10**6), T0, []
    for count, (pair, ahead_ms) in enumerate(events):
        now_ms += ahead_ms // 20
        if count == len(events) // 2:
            state, limits = limits.state(), Limits(10**6)
            limits.restore(state, 10**15)
        if limits.admit(pair, most, now_ms):
            admitted.append((pair, now_ms))
    for pair, first in admitted:
        within = [t for p, t in admitted if p == pair and first <= t < first + WINDOW_MS]
        assert len(within) < 2 * most


def test_limits_are_bounded_and_forget_the_oldest() -> None:
    limits = Limits(10)
    for pair in range(15):
        assert limits.admit(pair, 1, T0)
    assert limits.full_ratio == 1.0
    assert not limits.admit(14, 1, T0) and limits.admit(0, 1, T0)


def test_contexts_are_bounded_in_bytes() -> None:
    world = World(items=1)
    contexts = world.sources.events.contexts
    contexts._open.limit_bytes = 20_000
    for number in range(100):
        activation = "deferred" if number % 2 else "shown"
        world.impression(f"r{number}", "u", ["i0", *(f"x{n}" for n in range(10))], activation=activation)
    assert 0.5 < contexts.full_ratio <= 1.0
    assert "r99" in contexts._open and "r0" not in contexts._open


def _much(world: World) -> None:
    for number in range(40):
        user, items = f"u{number % 7}", [f"i{(number + n) % 12}" for n in range(4)]
        world.impression(f"r{number}{len(world.histories)}", user, items)
        for item in items[: number % 4]:
            world.feedback(user, item, request=f"r{number}{len(world.histories)}" if number % 2 else None)
        world.feedback(user, f"later {number}")


def test_what_was_saved_does_not_change_with_what_is_counted_later() -> None:
    """The state is written after the lock is given back: a count in it that its ids do not know would be counted again."""
    world = World(parse({"features": {"context": ["hour"], "counters": [{"of": ["item"]}], "transitions": True}}), 12)
    _much(world)
    saved = world.sources.state()
    before = copy.deepcopy(saved)
    _much(world)
    assert not np.array_equal(before["counters"]["sums"], world.sources.state()["counters"]["sums"])
    for part, arrays in before.items():
        for name, array in arrays.items():
            np.testing.assert_array_equal(saved[part][name], array, f"{part}.{name}")


def test_requests_go_on_while_a_snapshot_is_taken_and_counts_wait() -> None:
    world = World(items=3)
    asked, counted = threading.Event(), threading.Event()
    threads = [
        threading.Thread(target=lambda: (world.sources.quotas_at(T0), asked.set())),
        threading.Thread(target=lambda: (world.item("new"), counted.set())),
    ]
    with world.sources.writing:
        for thread in threads:
            thread.start()
        assert asked.wait(60.0)
        assert not counted.wait(0.05)
    assert counted.wait(60.0)
    for thread in threads:
        thread.join()
