"""Rules of configuration and request, through the whole ranking of a request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recsys.config import parse
from recsys.errors import BadInput, ConfigError
from recsys.ranking.filter_rules import parse_filters
from recsys.ranking.pipeline import Pipeline
from recsys.ranking.request import Boost, Request
from recsys.ranking.shown import Shown
from recsys.types import HistoryEvent, Item, UserUpdate
from services.cli.main import main
from services.ranking.parse import recommend
from tests.unit.test_scorer import world

NO_DRAW = {"draw_positions": []}


def ask(pipeline: Pipeline, now_ms: int = 1000, **fields: Any) -> Shown:
    return pipeline.recommend(Request(request_id="r", user_id="u", **{"n": 30, **fields}), now_ms)


def order(answer: Shown) -> list[str]:
    return [item.item_id for item in answer.items]


def ranked(**slate: Any) -> tuple[Pipeline, list[str], tuple[str, ...]]:
    """A pipeline, its sixty items, and the order in which it shows those without rules."""
    _, pipeline, _, ids = world(NO_DRAW | slate)
    _, plain, _, _ = world(NO_DRAW)
    return pipeline, order(ask(plain, n=60, candidates=ids)), ids


def category(pipeline: Pipeline, item_id: str) -> str:
    row = pipeline._catalogue.row(item_id)
    assert row is not None
    return str(pipeline._catalogue.item(row).attributes["category"])


def test_the_configurations_filters_hold_beside_the_requests() -> None:
    kinds = [f"kind-{n}" for n in range(10)]
    pipeline, _, _ = ranked(filters={"category": kinds})
    answer = ask(pipeline, filters=parse_filters({"category": {"none": kinds[:5]}}, ("category",)))
    assert answer.items
    assert {category(pipeline, i) for i in order(answer)} <= set(kinds[5:])


def test_the_last_seen_and_those_of_late_are_not_shown_again() -> None:
    pipeline, plain, ids = ranked(seen_last=2, seen_s=60)
    updates = [UserUpdate(user_id="u", seen=(plain[n],), seen_ms=n * 20_000) for n in range(5)]
    pipeline._store.apply(updates, {})
    assert order(ask(pipeline, 100_000, n=5, candidates=ids)) == [*plain[:3], *plain[5:7]]
    assert order(ask(pipeline, 500_000, n=5, candidates=ids)) == [*plain[:3], *plain[5:7]]
    pipeline._store.apply([UserUpdate(user_id="u", seen=(plain[0],), seen_ms=480_000)], {})
    assert order(ask(pipeline, 500_000, n=5, candidates=ids)) == [*plain[1:4], *plain[5:7]]


def test_a_boost_changes_the_order_but_not_the_score_that_is_told() -> None:
    kind, factor = "kind-3", 1e6
    for slate, boosts in (
        ({"boosts": [{"filters": {"category": kind}, "times": factor}]}, ()),
        ({}, (Boost(filters=parse_filters({"category": kind}, ("category",)), times=factor),)),
    ):
        pipeline, plain, ids = ranked(**slate)
        answer = ask(pipeline, n=60, candidates=ids, boosts=boosts)
        liked = [i for i in plain if category(pipeline, i) == kind]
        assert 0 < len(liked) < 20
        assert order(answer) == [*liked, *(i for i in plain if i not in liked)]
        assert max(item.score or 0 for item in answer.items) < 2


def test_a_boost_by_source_moves_only_what_the_source_brought() -> None:
    pipeline, plain, ids = ranked(boosts=[{"sources": ["trending"], "plus": 5.0}])
    assert order(ask(pipeline, candidates=ids)) == plain[:30]
    boost = Boost(sources=("caller",), times=0.0, plus=1.0)
    assert order(ask(pipeline, candidates=ids, boosts=(boost,))) == list(ids[:30])


def test_a_pin_is_shown_at_its_place_unless_a_rule_forbids_it() -> None:
    pipeline, _, ids = ranked(pins=[{"position": 2, "item_id": "item-7"}, {"position": 4, "item_id": "nowhere"}])
    answer = ask(pipeline, n=5)
    assert answer.items[1].item_id == "item-7"
    assert "pinned" in answer.items[1].sources
    assert order(ask(pipeline, n=5, pins={2: "item-8", 1: "item-7"}))[:2] == ["item-7", "item-8"]
    assert "item-7" not in order(ask(pipeline, n=60, exclude=("item-7",)))
    other = next(kind for i in ids if (kind := category(pipeline, i)) != category(pipeline, "item-7"))
    assert "item-7" not in order(ask(pipeline, filters=parse_filters({"category": other}, ("category",))))
    pipeline._sources.item(Item(item_id="item-7", deleted=True))
    assert "item-7" not in order(ask(pipeline, n=60))


def test_a_pin_is_scored_although_the_light_stage_would_drop_it() -> None:
    _, pipeline, _, ids = world(NO_DRAW | {"draw_pool": 2}, full_candidates=1)
    last = order(ask(pipeline, n=60, candidates=ids))[-1]
    answer = ask(pipeline, n=3, candidates=ids, pins={1: last})
    assert answer.items[0].item_id == last
    assert answer.items[0].predictions


def test_the_callers_candidates_are_not_added_to() -> None:
    pipeline, _, ids = ranked(pins=[{"position": 1, "item_id": "item-59"}])
    assert "item-59" not in order(ask(pipeline, candidates=ids[:10]))


def test_fatigue_tallies_what_was_shown_without_action() -> None:
    """Six showings cost six times the weight, half of it a half-life later; what was acted upon costs nothing."""
    pipeline, plain, ids = ranked(fatigue=0.5, fatigue_half_life_s=1000.0)
    for n in range(6):
        pipeline._store.apply([UserUpdate(user_id="u", seen=tuple(plain[:2]), seen_ms=n * 100_000)], {})
    event = HistoryEvent(time_ms=1, event_id="e", item_id=plain[1], type="click", session_id=None)
    pipeline._store.apply([UserUpdate(user_id="u", events=(event,))], {})
    state = pipeline._store.get("u")
    rows = pipeline._catalogue.rows(plain[:3])
    ones = np.ones(3)
    np.testing.assert_allclose(pipeline.rules.worth(ones, rows, state, 500_000), [-3.0, 0, 0])
    np.testing.assert_allclose(pipeline.rules.worth(ones, rows, state, 1_500_000), [-1.5, 0, 0])
    assert order(ask(pipeline, 500_000, n=60, candidates=ids))[0] != plain[0]


@pytest.mark.parametrize("diversity", ["mmr", "dpp"])
def test_caps_diversity_and_coverage_spread_an_answer(diversity: str) -> None:
    def kinds(n: int = 12, **slate: Any) -> list[str]:
        pipeline, _, ids = ranked(**slate)
        return [category(pipeline, i) for i in order(ask(pipeline, n=n, candidates=ids))]

    assert len(set(kinds())) < 12
    assert len(set(kinds(caps=[{"attribute": "category", "most": 1}]))) == 12
    assert len(set(kinds(diversity=diversity, diversity_weight=100.0, diversity_by=["category"]))) == 12
    assert len(set(kinds(coverage={"category": 100.0}))) == 12
    window = kinds(caps=[{"attribute": "category", "most": 1, "window": 4}])
    assert all(len(set(window[at : at + 4])) == 4 for at in range(9))


def test_a_cap_counts_values_beyond_the_columns() -> None:
    pipeline, _, ids = ranked(caps=[{"attribute": "tags", "most": 2}])
    for number, item_id in enumerate(ids):
        tags = [f"own-{number}-{n}" for n in range(6)] + (["promoted"] if number % 2 else ["plain", "promoted"])
        pipeline._catalogue.apply(Item(item_id=item_id, attributes={"tags": tags}))
    assert len(order(ask(pipeline, n=60, candidates=ids))) == 2


@pytest.mark.parametrize("kind", ["softmax", "epsilon", "squarecb"])
def test_the_largest_boosts_and_scores_of_0_leave_probabilities_finite(kind: str) -> None:
    pipeline, _, ids = ranked(draw_positions="all", draw_kind=kind)
    boosts = tuple(
        Boost(
            filters=parse_filters({"category": f"kind-{n % 3}"}, ("category",)), times=1e6 if n % 2 else 0.0, plus=1e6
        )
        for n in range(20)
    )
    answer = ask(pipeline, candidates=ids, boosts=(Boost(sources=("caller",), times=0.0), *boosts))
    assert len(answer.items) == 30
    for item in answer.items:
        assert item.pool is not None
        chances = [p for _, p in item.pool]
        assert min(chances) > 0
        assert sum(chances) == pytest.approx(1.0)


def test_a_cap_that_leaves_nothing_ends_the_answer_with_a_reason() -> None:
    pipeline, _, ids = ranked(caps=[{"attribute": "category", "most": 1}])
    answer = ask(pipeline, n=60, candidates=ids)
    assert len(answer.items) == len({category(pipeline, i) for i in ids})
    assert "rules" in answer.note


def test_the_policys_name_tells_configurations_apart() -> None:
    names = {
        world(slate)[1].policy
        for slate in ({}, NO_DRAW, {"draw_positions": "all"}, {"fatigue": 0.5}, {"draw_kind": "squarecb"})
    }
    assert len(names) == 5
    assert {"model", "model-draw5", "model-drawall"} < names


@pytest.mark.parametrize(
    ("slate", "says"),
    [
        ({"caps": [{"attribute": "colour", "most": 1}]}, "slate.caps: 'colour' is not one of catalogue.attributes"),
        ({"caps": [{"atribute": "tags", "most": 1}]}, "slate.caps.0.attribute"),
        ({"boosts": [{"times": 2}]}, "name filters or sources"),
        ({"boosts": [{"sources": ["nowhere"]}]}, "'nowhere' is not one of the sources"),
        ({"pins": [{"position": 1, "item_id": "a"}, {"position": 1, "item_id": "b"}]}, "each position"),
        ({"draw_positions": [0]}, "count from 1"),
        ({"coverage": {"category": float("nan")}}, "slate.coverage.category"),
        ({"coverage": {"category": -1.0}}, "slate.coverage.category"),
        ({"fatigue": float("inf")}, "slate.fatigue"),
        ({"boosts": [{"sources": ["trending"], "plus": float("nan")}]}, "slate.boosts.0.plus"),
        ({"boosts": [{"sources": ["trending"], "times": 1e7}]}, "slate.boosts.0.times"),
        ({"seen_last": 1001}, "at most state.seen_len"),
        ({"filters": {"category": {"not": "x"}}}, "did you mean 'none'?"),
        ({"boosts": [{"filters": {"category": []}}]}, "slate.boosts[0].filters.category"),
    ],
)
def test_a_wrong_rule_is_refused_by_name(slate: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        world(slate)
    assert says in str(refused.value)


def test_config_check_reads_the_rules(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rules.toml"
    for condition, code in (('["a"]', 0), ("[]", 2)):
        file.write_text(f"[[slate.boosts]]\nfilters = {{ category = {condition} }}\n")
        assert main(["config", "check", "--config", str(file)]) == code
    assert "slate.boosts[0].filters.category" in capsys.readouterr().err


def test_config_check_says_what_scores_requests(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "any.toml"
    file.write_text("")
    asked = ["config", "check", "--config", str(file), "--json"]
    assert main(asked) == 0 and json.loads(capsys.readouterr().out)["scored_by"] == "compiled kernels"
    monkeypatch.setattr("recsys.model.packed.ACTIVATIONS", ())
    assert main(asked) == 0 and json.loads(capsys.readouterr().out)["scored_by"] == "torch"


@pytest.mark.parametrize(
    ("fields", "field", "says"),
    [
        ({"boosts": {}}, "boosts", "list of at most 20 objects"),
        ({"boosts": [{"time": 2}]}, "boosts[0]", "did you mean 'times'?"),
        ({"boosts": [{}]}, "boosts[0]", "name filters or sources"),
        ({"boosts": [{"sources": ["nowhere"]}]}, "boosts[0].sources", "trending"),
        ({"boosts": [{"sources": ["trending"], "times": -1}]}, "boosts[0].times", "from 0"),
        ({"boosts": [{"sources": ["trending"], "plus": 1e7}]}, "boosts[0].plus", "to 1e+06"),
        ({"boosts": [{"filters": {"categry": 1}}]}, "boosts[0].filters.categry", "did you mean 'category'?"),
        ({"pins": [{"position": 0, "item_id": "a"}]}, "pins[0].position", "from 1"),
        ({"pins": [{"position": 1}]}, "pins[0].item_id", "required"),
        ({"pins": [{"position": 1, "item_id": "a"}, {"position": 2, "item_id": "a"}]}, "pins[1]", "once"),
    ],
)
def test_a_wrong_rule_of_a_request_names_field_and_remedy(fields: Any, field: str, says: str) -> None:
    with pytest.raises(BadInput) as refused:
        recommend(json.dumps({"user_id": "u", **fields}).encode(), "r", parse({}))
    assert refused.value.field == field
    assert says in str(refused.value)


def test_a_requests_rules_are_read() -> None:
    body = {
        "user_id": "u",
        "boosts": [{"filters": {"category": "a"}, "sources": ["trending"], "times": 2, "plus": 1}],
        "pins": [{"position": 3, "item_id": 7}],
    }
    asked = recommend(json.dumps(body).encode(), "r", parse({}))
    assert asked.pins == {3: "7"}
    assert asked.boosts == (
        Boost(filters=parse_filters({"category": "a"}, ("category",)), sources=("trending",), times=2.0, plus=1.0),
    )
