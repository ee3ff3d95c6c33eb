"""Saved counts under another configuration: each counter keeps what it counted, by name; what is new starts at 0."""

from typing import Any

import numpy as np
import pytest

from recsys.candidates.count_units import converted, units
from recsys.config import parse
from recsys.errors import SchemaMismatch
from recsys.features.counters import Counters, columns_of
from recsys.features.schema import Schema

NOW_MS = 1_700_000_000_000
KEYS = {"user": 11, "device": 12, "hour": 13, "item": 21, "brand": 22, "category": 23, "tags": 24}


def schema_of(counters: list[Any], **more: Any) -> Schema:
    features = {"history_attributes": [], "crosses": [], "counters": counters, "context": ["device"], **more}
    return Schema.of(parse({"features": features}))


def columns(schema: Schema) -> Any:
    """One request and one item, whose keys are the same in every schema."""
    shared = np.array([KEYS["user"], *(KEYS[name] for name in schema.context)], np.int64)
    item = np.array([[KEYS[name] + n for name, width in schema.item_fields for n in range(width)]], np.int64)
    return columns_of(shared, np.ones(shared.shape, np.bool_), item, np.ones(item.shape, np.bool_))


def counted(schema: Schema) -> dict[str, dict[str, Any]]:
    counters = Counters(schema)
    for times in range(3):
        counters.add(columns(schema), ["shown", *(["positive click"] if times else [])], NOW_MS)
    empty = np.zeros(0, np.int64)
    shared = len(schema.shared_slots)
    contexts = {
        "ids": empty,
        "times": empty,
        "keys": np.ones((1, shared), np.int64),
        "masks": np.ones((1, shared), np.bool_),
    }
    return {"counters": counters.state(), "contexts": contexts}


def shown_of(schema: Schema, state: dict[str, dict[str, Any]], column: str = "shown") -> dict[str, list[float]]:
    """Counts by counter, one for each half-life."""
    counters = Counters(schema)
    counters.restore(state["counters"])
    counts = counters.counts(columns(schema), NOW_MS)[0]
    at = schema.counters.columns.index(column)
    return {"*".join(slots): counts[c, :, at].round(5).tolist() for c, slots in enumerate(schema.counters.slots)}


USER, ITEM, CATEGORY = {"of": ["user"]}, {"of": ["item"]}, {"of": ["category"]}


def test_a_counter_in_front_of_others_starts_at_0_and_they_stay() -> None:
    old, new = schema_of([USER, ITEM]), schema_of([CATEGORY, ITEM, USER], context=["hour", "device"])
    state = converted(counted(old), units(old), new)
    assert shown_of(new, state) == {"": [3.0], "category": [0.0], "item": [3.0], "user": [3.0]}
    assert shown_of(new, state, "positive click") == {"": [2.0], "category": [0.0], "item": [2.0], "user": [2.0]}
    assert state["contexts"]["keys"].tolist() == [[1, 0, 1]] and not state["contexts"]["masks"][0, 1]


def test_a_counter_of_several_slots_is_counted_anew_only_where_its_number_is_another() -> None:
    both = {"of": ["user", "category"]}
    old = schema_of([USER, both])
    appended = schema_of([USER, both, ITEM])
    assert shown_of(appended, converted(counted(old), units(old), appended)) == {
        "": [3.0],
        "user": [3.0],
        "user*category": [3.0],
        "item": [0.0],
    }
    moved = schema_of([ITEM, USER, both])
    assert shown_of(moved, converted(counted(old), units(old), moved))["user*category"] == [0.0]


@pytest.mark.parametrize(
    ("half_lives", "expected"), [([60.0], [3.0]), ([60.0, 86_400.0], [0.0, 3.0]), ([86_400.0, 1e6], [3.0, 0.0])]
)
def test_half_lives_keep_what_was_counted_with_them(half_lives: list[float], expected: list[float]) -> None:
    old, new = schema_of([USER]), schema_of([{**USER, "half_lives_s": half_lives}])
    assert shown_of(new, converted(counted(old), units(old), new))["user"] == expected


def test_a_task_more_has_a_column_more() -> None:
    old = schema_of([USER])
    config = {"tasks": [{"name": "buy", "types": ["buy"]}, {"name": "click", "types": ["click"]}]}
    features = {"history_attributes": [], "crosses": [], "counters": [USER], "context": ["device"]}
    new = Schema.of(parse({**config, "features": features}))
    state = converted(counted(old), units(old), new)
    assert shown_of(new, state, "positive click")["user"] == [2.0]
    assert shown_of(new, state, "positive buy")["user"] == [0.0]


def test_counts_by_other_buckets_are_counted_anew() -> None:
    counters = [USER, {"of": ["device"]}]
    old, new = (schema_of(counters, buckets={"device": edges}) for edges in ([1.0], [1.0, 2.0]))
    state = converted(counted(old), units(old), new)
    assert shown_of(new, state) == {"": [3.0], "user": [3.0], "device": [0.0]}
    assert not state["contexts"]["masks"][0, 1]


def test_what_follows_what_by_another_context_is_refused() -> None:
    old, new = (schema_of([USER], transitions=True, transition_context=names) for names in ([], ["device"]))
    with pytest.raises(SchemaMismatch, match="another context"):
        converted(counted(old), units(old), new)
