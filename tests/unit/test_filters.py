"""Filters: what they mean, what is refused, and that remembered masks keep up with the catalogue."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from recsys.config import parse
from recsys.errors import BadInput
from recsys.features import filters as module
from recsys.features.catalogue import Catalogue
from recsys.features.filters import Filters
from recsys.features.schema import Schema
from recsys.ranking.filter_rules import parse_filters
from recsys.ranking.request import Request
from recsys.types import Item
from services.ranking.parse import recommend
from tests.unit.test_scorer import world

CONFIG = parse(
    {
        "catalogue": {"attributes": ["category", "tags", "price"], "multivalued": ["tags"], "max_values": 2},
        "features": {"history_attributes": ["category"], "crosses": []},
    }
)
ATTRIBUTES = CONFIG.catalogue.attributes
CATEGORIES, TAGS = ("news", "sport", "7"), ("red", "new", "7", "sold out")

values = st.lists(st.sampled_from((*CATEGORIES, *TAGS, "nowhere", 7)), min_size=1, max_size=20)
conditions = st.one_of(
    st.sampled_from((*CATEGORIES, "nowhere", 7)),
    values,
    st.dictionaries(st.sampled_from(("any", "all", "none")), values, min_size=1),
)
prices = st.fixed_dictionaries({}, optional={"min": st.integers(0, 5), "max": st.floats(5, 9)}).filter(bool)
asked = st.fixed_dictionaries({}, optional={"category": conditions, "tags": conditions, "price": prices})
attributes = st.fixed_dictionaries(
    {},
    optional={
        # More values than columns: features see the first, filters all.
        "category": st.one_of(st.sampled_from((*CATEGORIES, 7)), st.lists(st.sampled_from(CATEGORIES), max_size=3)),
        "tags": st.lists(st.sampled_from(TAGS), max_size=4),
        "price": st.one_of(st.integers(0, 9), st.floats(0, 9), st.just("free"), st.booleans()),
    },
)
items = st.builds(
    lambda n, attributes, deleted: Item(item_id=f"i{n}", attributes=attributes, deleted=deleted),
    st.integers(0, 30),
    attributes,
    st.booleans(),
)


def holds(kind: str, want: Any, value: Any) -> bool:
    """The meaning of one condition, spelled out."""
    if kind in ("min", "max"):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and (value >= want if kind == "min" else value <= want)
    has = {str(v) for v in (value if isinstance(value, list) else [] if value is None else [value])}
    wanted = {str(v) for v in (want if isinstance(want, list) else [want])}
    return {"any": bool(has & wanted), "all": wanted <= has, "none": not has & wanted}[kind]


def naive(item: Item, wanted: dict[str, Any]) -> bool:
    conditions = [
        (name, kind, want)
        for name, condition in wanted.items()
        for kind, want in (condition if isinstance(condition, dict) else {"any": condition}).items()
    ]
    return not item.deleted and all(holds(kind, want, item.attributes.get(name)) for name, kind, want in conditions)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(items, asked, st.just("restart")), max_size=60))
@example(
    [Item(item_id="i0", attributes={"tags": ["red", "new", "old"]}), Item(item_id="i0"), "restart", {"tags": "red"}]
)
def test_masks_say_what_filters_mean_whatever_has_changed(story: list[Any]) -> None:
    """Items, filters and restarts in any order, so that masks are made, remembered, grown past and caught up with."""
    catalogue, known, used = Catalogue(Schema.of(CONFIG), capacity=1), {}, []
    for step in story:
        if step == "restart":
            saved, catalogue = catalogue, Catalogue(Schema.of(CONFIG), capacity=1)
            catalogue.restore(saved.state())
            continue
        if isinstance(step, Item):
            if catalogue.apply(step) >= 0:
                known[step.item_id] = step if not step.deleted else Item(item_id=step.item_id, deleted=True)
            continue
        used.append(step)
        for wanted in used:
            mask = catalogue.matching(parse_filters(wanted, ATTRIBUTES))
            passing = {catalogue.ids[row] for row in np.flatnonzero(mask)}
            assert passing == {item.item_id for item in known.values() if naive(item, wanted)}


def test_more_changes_than_are_kept_and_more_filters_than_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHANGES", 4)
    monkeypatch.setattr(module, "MAX_MASKS", 2)
    catalogue = Catalogue(Schema.of(CONFIG))
    for round_ in range(1, 4):
        for number in range(round_ * 3):
            kind = CATEGORIES[(number + round_) % 3]
            catalogue.apply(Item(item_id=str(number), attributes={"category": kind}))
        for category in CATEGORIES:
            mask = catalogue.matching(parse_filters({"category": category}, ATTRIBUTES))
            assert mask.sum() == round_
        assert len(catalogue._masks._known) == 2


def test_a_mask_made_before_the_catalogue_was_restored_is_made_anew() -> None:
    saved, catalogue = Catalogue(Schema.of(CONFIG)), Catalogue(Schema.of(CONFIG))
    saved.apply(Item(item_id="a", attributes={"category": "news", "price": 3}))
    wanted = parse_filters({"category": "news", "price": {"min": 2}}, ATTRIBUTES)
    assert not catalogue.matching(wanted).any()
    catalogue.restore(saved.state())
    assert np.flatnonzero(catalogue.matching(wanted)).tolist() == [0]


def test_equal_filters_are_equal_values() -> None:
    first = parse_filters({"tags": ["new", "red", "red"], "category": "news"}, ATTRIBUTES)
    second = parse_filters({"category": {"any": "news"}, "tags": {"any": ["red", "new"]}}, ATTRIBUTES)
    assert first == second
    assert hash(first) == hash(second)


@pytest.mark.parametrize(
    ("wrong", "field", "says"),
    [
        ([], "filters", "must be an object"),
        ({"categry": "news"}, "filters.categry", "did you mean 'category'?"),
        ({"category": []}, "filters.category", "1 to 1000"),
        ({"category": ["x"] * 1001}, "filters.category", "1 to 1000"),
        ({"category": None}, "filters.category", "a string, a number or a boolean"),
        ({"category": [["x"]]}, "filters.category", "a string, a number or a boolean"),
        ({"category": {}}, "filters.category", "any, all, none, min, max"),
        ({"category": {"not": "x"}}, "filters.category", "did you mean 'none'?"),
        ({"price": {"min": "5"}}, "filters.price.min", "finite number"),
        ({"price": {"min": 5, "max": 4}}, "filters.price.min", "above max = 4"),
    ],
)
def test_a_wrong_filter_names_field_value_and_remedy(wrong: Any, field: str, says: str) -> None:
    with pytest.raises(BadInput) as refused:
        recommend(json.dumps({"user_id": "u", "filters": wrong}).encode(), "r", CONFIG)
    assert refused.value.field == field
    assert says in str(refused.value)


def filtered(wanted: dict[str, Any]) -> Filters:
    return parse_filters(wanted, ("category", "tags"))


@pytest.mark.parametrize("candidates", [False, True])
def test_an_answer_holds_only_items_that_pass(*, candidates: bool) -> None:
    _, pipeline, _, ids = world()
    catalogue = pipeline._catalogue
    kind = catalogue.item(5).attributes["category"]
    request = Request(
        request_id="r",
        user_id="u",
        n=30,
        filters=filtered({"category": kind}),
        candidates=ids if candidates else None,
    )
    answer = pipeline.recommend(request, 1000)
    expected = {i for i in ids if catalogue.item(int(catalogue.rows([i])[0])).attributes["category"] == kind}
    assert {item.item_id for item in answer.items} == expected
    assert "filters" in answer.note


def test_filters_that_match_nothing_and_an_empty_catalogue_are_an_empty_list_and_a_reason() -> None:
    _, pipeline, _, ids = world()
    request = Request(request_id="r", user_id="u", filters=filtered({"category": "nowhere", "tags": {"none": "x"}}))
    answer = pipeline.recommend(request, 1000)
    assert answer.items == ()
    assert answer.note == "no item passes the filters (category any of nowhere; tags none of x)"
    assert pipeline.recommend(Request(request_id="r", user_id="u", n=5), 1000).note == ""
    for item_id in ids:
        pipeline._sources.item(Item(item_id=item_id, deleted=True))
    assert "empty" in pipeline.recommend(Request(request_id="r", user_id="u"), 1000).note
