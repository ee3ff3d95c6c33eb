"""Streaming counters against exact sums, and what is counted when."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.candidates.base import Parts
from recsys.candidates.counter_feed import CounterFeed
from recsys.candidates.limits import Limits
from recsys.candidates.sources import Sources
from recsys.config import Config, parse
from recsys.errors import ConfigError
from recsys.evaluation.delays import Delayed, Timeline
from recsys.events.seen_ids import SeenIds
from recsys.features.build import shared_columns, user_features
from recsys.features.catalogue import Catalogue
from recsys.features.counters import Counters, columns_of
from recsys.features.feature_kernels import Columns
from recsys.features.schema import Schema
from recsys.types import Feedback, HistoryEvent, Impression, Item, ShownItem

HALF_LIVES = (10.0, 300.0)


def config(**features: Any) -> Config:
    counters = [
        {"of": of, "half_lives_s": HALF_LIVES}
        for of in (["user"], ["item"], ["tags"], ["user", "tags"], ["item", "hour"], ["user", "tags", "hour"])
    ]
    return parse({"features": {"context": ["hour"], "counters": counters, **features}})


def world(config: Config) -> tuple[Schema, Catalogue]:
    schema = Schema.of(config)
    catalogue = Catalogue(schema)
    for number in range(4):
        tags = ["all", f"t{number % 2}"][: 1 + number % 3]
        catalogue.apply(Item(item_id=f"i{number}", attributes={"tags": tags} if number else {}))
    return schema, catalogue


def columns(schema: Schema, catalogue: Catalogue, user: str, hour: str, rows: list[int]) -> Columns:
    shared = shared_columns(schema, user, {"hour": hour} if hour else {})
    return columns_of(*shared, catalogue.keys[rows], catalogue.mask[rows])


def values_of(catalogue: Catalogue, name: str, user: str, hour: str, row: int) -> list[str]:
    item = catalogue.item(row)
    return {"user": [user], "hour": [hour] if hour else [], "item": [item.item_id]}.get(
        name, list(item.attributes.get(name, []))
    )


EVENTS = st.lists(
    st.tuples(
        st.integers(0, 200_000),
        st.sampled_from("ab"),
        st.sampled_from(["", "1", "2"]),
        st.integers(0, 3),
        st.booleans(),
    ),
    max_size=25,
)


@settings(deadline=None)
@given(EVENTS, st.sampled_from("ab"), st.integers(0, 3))
def test_counts_are_the_exact_decayed_sums_in_any_order(
    events: list[tuple[int, str, str, int, bool]], user: str, row: int
) -> None:
    """Against float64 sums over all events whose slots have one of the values asked for."""
    schema, catalogue = world(config())
    counters = Counters(schema)
    for now_ms, who, hour, item, liked in events:
        counters.add(columns(schema, catalogue, who, hour, [item]), ["positive like"] if liked else ["shown"], now_ms)
    counts = counters.counts(columns(schema, catalogue, user, "1", [row]), 250_000)
    for c, slots in enumerate(schema.counters.slots):
        for h, half_life in enumerate(HALF_LIVES):
            for value, column in (("shown", 0), ("positive like", schema.counters.columns.index("positive like"))):
                expected = 0.0
                for now_ms, who, hour, item, liked in events:
                    if liked != (value != "shown"):
                        continue
                    common = [
                        len(
                            set(values_of(catalogue, name, user, "1", row))
                            & set(values_of(catalogue, name, who, hour, item))
                        )
                        for name in slots
                    ]
                    expected += np.prod(common) * 2.0 ** ((now_ms - 250_000) / 1000 / half_life)
                assert counts[0, c, h, column] == pytest.approx(expected, rel=1e-4, abs=1e-6), (slots, half_life)


@settings(deadline=None)
@given(st.lists(st.floats(0, 50), min_size=14, max_size=14))
def test_numbers_are_log_counts_and_rates_that_lean_on_their_parents(sums: list[float]) -> None:
    schema, _ = world(config())
    counters, layout = Counters(schema), schema.counters
    counts = np.zeros((1, len(layout.slots), len(HALF_LIVES), len(layout.columns)), np.float32)
    for c in range(len(layout.slots)):
        counts[0, c, 1, 0], counts[0, c, 1, 1] = sums[2 * c] + 50, sums[2 * c + 1]
    numbers = dict(zip(layout.names, counters.numbers(counts)[0].tolist(), strict=True))

    def rate(c: int) -> float:
        whole, part = float(counts[0, c, 1, 0]), float(counts[0, c, 1, 1])
        parent = rate(int(layout.parents[c])) if c else 0.05
        return max((part + 10 * parent) / (whole + 10), 1e-6)

    def logit(p: float) -> float:
        return float(np.log(p / (1 - p)))

    for c, slots in enumerate(layout.slots[1:], start=1):
        name = f"{'*'.join(slots)}.300"
        assert numbers[f"count.{name}.shown"] == pytest.approx(np.log1p(counts[0, c, 1, 0]), rel=1e-5)
        expected = logit(rate(c)) - logit(rate(int(layout.parents[c])))
        assert numbers[f"rate.{name}.positive click"] == pytest.approx(expected, abs=1e-4)
    assert [layout.slots[p] for p in layout.parents] == [(), (), (), (), ("user",), ("item",), ("user", "tags")]


def test_a_full_table_drops_the_half_with_the_least_left() -> None:
    schema, catalogue = world(config())
    counters = Counters(schema, capacity=4096)
    often = columns(schema, catalogue, "often", "", [1])
    for now_ms in range(50):
        counters.add(often, ["shown"], now_ms)
    for n in range(3000):
        counters.add(columns(schema, catalogue, f"u{n}", "", [1]), ["shown"], 100)
    assert len(counters) <= 4096
    user = schema.counters.slots.index(("user",))
    assert counters.counts(often, 100)[0, user, 1, 0] == pytest.approx(50, rel=1e-3)


def test_forgetting_a_user_keeps_what_others_counted_and_the_items() -> None:
    schema, catalogue = world(config())
    counters = Counters(schema)
    for user in ("a", "b"):
        counters.add(columns(schema, catalogue, user, "1", [1]), ["shown"], 0)
    asked = [columns(schema, catalogue, user, "1", [1]) for user in ("a", "b")]
    before = [counters.counts(one, 0)[0, :, 1, 0] for one in asked]
    counters.forget(int(asked[0].shared_keys[0]))
    gone, kept = (counters.counts(one, 0)[0, :, 1, 0] for one in asked)
    mine = schema.counters.of_users
    assert (gone[mine] == 0).all()
    np.testing.assert_array_equal(gone[~mine], before[0][~mine])
    np.testing.assert_array_equal(kept, before[1])


def test_a_snapshot_says_the_same_and_goes_on_the_same() -> None:
    schema, catalogue = world(config())
    first, second = Counters(schema), Counters(schema)
    first.add(columns(schema, catalogue, "a", "1", [1, 2]), ["shown"], 5_000)
    second.restore({name: array.copy() for name, array in first.state().items()})
    for counters in (first, second):
        counters.add(columns(schema, catalogue, "a", "2", [2, 3]), ["positive click"], 900_000_000)
    asked = columns(schema, catalogue, "a", "1", [0, 1, 2, 3])
    np.testing.assert_array_equal(first.counts(asked, 900_000_500), second.counts(asked, 900_000_500))


def shown(request: str, user: str, item: str, hour: str) -> Impression:
    items = (ShownItem(item_id=item, position=1),)
    return Impression(request_id=request, user_id=user, time_ms=0, items=items, context={"hour": hour})


def feedback(kind: str, item: str, request: str | None = None, user: str = "a") -> Feedback:
    return Feedback(
        event_id=f"{kind}{item}{request}", user_id=user, item_id=item, type=kind, time_ms=0, request_id=request
    )


def count(sources: Sources, schema: Schema, catalogue: Catalogue, of: tuple[str, ...], column: str) -> float:
    counts = sources.events.counting.counters.counts(columns(schema, catalogue, "a", "1", [1]), 0)
    return float(counts[0, schema.counters.slots.index(of), -1, schema.counters.columns.index(column)])


OLDER = HistoryEvent(time_ms=-1, event_id="older", item_id="another", type="click", session_id="other")
"""Of a user who is no newcomer."""


def happen(sources: Sources, *actions: Feedback, session: bool = False) -> None:
    history = [OLDER]
    for number, action in enumerate(actions):
        event = HistoryEvent(
            time_ms=number, event_id=str(number), item_id=action.item_id, type=action.type, session_id="s"
        )
        sources.events.feedback(dataclasses.replace(action, event_id=f"{number} {action.event_id}"), history, event, 0)
        history += [event] if session else []


def test_a_positive_is_counted_once_and_in_the_context_of_its_impression() -> None:
    settings = config()
    schema, catalogue = world(settings)
    sources = Sources(settings, schema, catalogue)
    assert sources.events.impression(shown("r", "a", "i1", "1"), 0)
    assert not sources.events.impression(shown("r", "a", "i1", "1"), 0)
    happen(sources, *[feedback("click", "i1", "r")] * 2, feedback("click", "i1"))  # without a request: of no impression
    for of in (("item", "hour"), ("user",)):
        assert count(sources, schema, catalogue, of, "shown") == 1.0
        assert count(sources, schema, catalogue, of, "positive click") == 1.0
    again = Sources(settings, schema, catalogue)
    again.restore(sources.state(), np.arange(4, dtype=np.int32), 0)
    again.events._acted = Limits(1000)
    happen(again, *[feedback(kind, "i1", "r", "a") for kind in ("like", "purchase", "like")])
    assert count(again, schema, catalogue, ("item", "hour"), "positive click") == 1.0
    assert count(again, schema, catalogue, ("item", "hour"), "positive like") == 1.0


def test_elsewhere_counts_each_type_and_how_often_one_follows_the_first_on_its_item() -> None:
    counters = [{"of": ["user"], "values": ["elsewhere"]}]
    settings = config(counters=counters, elsewhere_types=["watch", "like"])
    schema, catalogue = world(settings)
    sources = Sources(settings, schema, catalogue)
    pairs = (("like", "i3"), ("watch", "i1"), ("like", "i1"), ("watch", "i2"), ("like", "i3"))
    happen(sources, *(feedback(kind, item) for kind, item in pairs))
    found = {column: count(sources, schema, catalogue, ("user",), column) for column in schema.counters.columns[-3:]}
    assert found == {"elsewhere watch": 2.0, "elsewhere like": 3.0, "followed like": 1.0}
    assert schema.counters.names == (
        "count.user.86400.elsewhere watch",
        "count.user.86400.elsewhere like",
        "rate.user.86400.followed like",
    )


def test_a_click_logs_events_are_counted_by_whether_they_are_a_sessions_first() -> None:
    settings = config(counters=[{"of": ["user"], "values": ["events"]}])
    schema, catalogue = world(settings)
    sources = Sources(settings, schema, catalogue)
    happen(sources, *(feedback("click", item) for item in ("i1", "i2", "i3")), session=True)
    assert count(sources, schema, catalogue, ("user",), "events") == 3.0
    assert count(sources, schema, catalogue, ("user",), "later") == 2.0


def test_users_own_counts_are_live_while_others_are_as_of_an_earlier_time() -> None:
    settings = config(counters=[{"of": ["user"]}, {"of": ["item"]}])
    schema, catalogue = world(settings)
    parts, timeline = Parts(settings, schema, catalogue), Timeline(delay_s=1, sync_interval_s=0)
    counting, seen = CounterFeed(*parts, SeenIds()), Delayed(parts, timeline, live=True)
    timeline.move(0)
    seen.shown(shown("r", "a", "i1", "1"), 0)
    user = user_features(schema, catalogue, "a", [], {})
    numbers = counting.numbers(user, np.array([1], np.int32), seen, 0)[0]
    named = dict(zip(schema.counters.names, numbers.tolist(), strict=True))
    assert named["count.user.86400.shown"] == pytest.approx(np.log(2))
    assert named["count.item.86400.shown"] == 0.0


@pytest.mark.parametrize(
    ("counter", "problem"),
    [
        ({"of": ["nothing"]}, "'nothing'"),
        ({"of": ["user", "user"]}, "different"),
        ({"of": ["user"], "half_lives_s": [0]}, "above 0"),
        ({"of": ["user"], "values": ["elsewhere"]}, "elsewhere_types"),
    ],
)
def test_a_counter_that_cannot_be_is_refused(counter: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        parse({"features": {"counters": [counter]}})


def test_the_schema_names_what_is_counted() -> None:
    schema = Schema.of(config())
    assert dataclasses.replace(schema, counters=Schema.of(Config()).counters).hash != schema.hash
