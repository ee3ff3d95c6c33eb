"""Declared numbers: as features beside whether they are missing, as buckets, and no match for one odd value."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recsys.config import Config, parse
from recsys.evaluation.replay import Replay
from recsys.evaluation.replayed_loop import Event, Options
from recsys.features.build import Signals, UserFeatures, decode, item_features, user_features
from recsys.features.catalogue import Catalogue
from recsys.features.numeric import between, bucket_of, squashed, time_ms_of
from recsys.features.schema import Schema
from recsys.keys import cross, key_of
from recsys.model import networks
from recsys.model.ranker import Ranker, RankerInputs, losses
from recsys.ranking.filter_rules import parse_filters
from recsys.types import Feedback, HistoryEvent, Impression, Item, ShownItem

PRICES: list[Any] = [0.5, 1.0, 19, 1e12, -3, None, "9.99", True, [4.0]]
EDGES = [1.0, 5.0, 20.0]


def declared(**features: Any) -> tuple[Schema, Catalogue]:
    """A catalogue of `PRICES`."""
    schema = Schema.of(
        parse(
            {
                "catalogue": {"attributes": ["category", "price"], "multivalued": []},
                "features": {"context": ["basket"], "history_attributes": ["category"], "crosses": [], **features},
            }
        )
    )
    catalogue = Catalogue(schema, capacity=1)
    for number, price in enumerate(PRICES):
        attributes = {"category": f"c{number % 2}", "weight": number} | ({} if price is None else {"price": price})
        catalogue.apply(Item(item_id=f"i{number}", attributes=attributes))
    return schema, catalogue


def numbers_of(schema: Schema, catalogue: Catalogue, user: UserFeatures, now_ms: int = 0) -> dict[str, list[float]]:
    """Each declared number of every item."""
    rows = np.arange(len(catalogue), dtype=np.int32)
    counted = np.zeros((len(rows), len(schema.counters.numbers)), np.float32)
    nothing = np.zeros(len(rows), np.float32)
    signals = Signals(
        counters=counted, popularity=nothing, covisit=nothing, follows=np.ones((len(rows), 0), np.float32)
    )
    found = item_features(schema, catalogue, user, rows, signals, 0.8).numbers
    return {name: found[:, n].tolist() for n, name in enumerate(schema.numbers) if n >= schema.first_declared}


def test_a_number_is_squashed_beside_whether_it_is_missing() -> None:
    schema, catalogue = declared(numbers=["price", "weight", "basket", "nowhere"])
    found = numbers_of(schema, catalogue, user_features(schema, catalogue, "u", [], {"basket": -6.5}))
    prices = [p if type(p) in (int, float) else None for p in PRICES]
    expected = [0.0 if p is None else math.copysign(math.log1p(abs(p)), p) for p in prices]
    assert found["number.price"] == pytest.approx(expected)
    assert found["number.price.missing"] == [float(p is None) for p in prices]
    assert found["number.weight"] == pytest.approx(np.log1p(np.arange(len(PRICES))))
    assert found["context.basket"] == pytest.approx([-math.log1p(6.5)] * len(PRICES))
    assert found["number.nowhere.missing"] == [1.0] * len(PRICES)
    assert "price" in catalogue.numbers and "weight" not in [name for name, _ in schema.item_fields]
    absent = numbers_of(schema, catalogue, user_features(schema, catalogue, "u", [], {"basket": "6.5"}))
    assert (absent["context.basket"][0], absent["context.basket.missing"][0]) == (0.0, 1.0)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1.7e308, -1.7e308, 0.0])
def test_whatever_the_number_the_feature_is_finite(value: float) -> None:
    number, missing = squashed(np.array([value])).tolist()[0]
    assert abs(number) < 711 and missing == float(not math.isfinite(value))


def test_a_bucket_is_the_key_of_its_slot_in_crosses_and_history() -> None:
    schema, catalogue = declared(
        buckets={"price": EDGES, "basket": [10]},
        crosses=[["basket", "price"], ["user", "price"]],
        history_attributes=["price"],
    )
    where = catalogue.columns("price")
    keys = catalogue.keys[: len(PRICES), where][:, 0].tolist()
    expected = [0, 1, 2, 3, 0]
    assert keys[:5] == [key_of(str(bucket)) for bucket in expected]
    assert catalogue.mask[: len(PRICES), where][:, 0].tolist() == [True] * 5 + [False] * 4
    past = [HistoryEvent(time_ms=1, event_id="1", item_id="i2", type="click")]
    user = user_features(schema, catalogue, "u", past, {"basket": 25})
    assert user.shared_keys[1] == key_of("1")
    assert user.history_keys[0, where].tolist() == [key_of("2")]
    assert not user_features(schema, catalogue, "u", [], {"basket": "25"}).shared_mask[1]
    rows, signals = np.array([3], np.int32), np.zeros((1, len(schema.counters.numbers)), np.float32)
    nothing = np.zeros(1, np.float32)
    features = item_features(
        schema,
        catalogue,
        user,
        rows,
        Signals(counters=signals, popularity=nothing, covisit=nothing, follows=np.zeros((1, 0), np.float32)),
        0.8,
    )
    assert features.cross_keys[0, 0] == cross(np.array([key_of("1")]), np.array([key_of("3")]))[0]


def test_edges_belong_to_the_bucket_above_and_buckets_have_words() -> None:
    assert [bucket_of(v, EDGES) for v in (0.99, 1, 5.0, 20, math.inf, math.nan, "3", False)] == [
        *("0", "1", "2", "3", "3"),
        *(None, None, None),
    ]
    assert [between(EDGES, bucket) for bucket in "0123"] == ["below 1", "from 1 to 5", "from 5 to 20", "of 20 or more"]


@pytest.mark.parametrize("wanted", [19, ["0.5", "x"], {"none": [1.0]}, {"min": 1, "max": 20}, {"all": ["2"]}])
def test_filters_mean_values_where_keys_mean_buckets(wanted: Any) -> None:
    (_, plain), (_, bucketed) = declared(), declared(buckets={"price": EDGES})
    filters = parse_filters({"price": wanted}, ["price"])
    masks = [c.matching(filters)[: len(PRICES)].tolist() for c in (plain, bucketed)]
    assert masks[0][:6] == masks[1][:6]


def test_a_configuration_without_declared_numbers_keeps_its_schema() -> None:
    # The hash that checkpoints and impressions of before carry.
    assert Schema.of(Config()).hash == "086e88145c281f97"
    base = Schema.of(parse({"catalogue": {"attributes": ["price"], "multivalued": []}, "features": BARE})).hash
    for more in (
        {"numbers": ["price"]},
        {"buckets": {"price": [1]}},
        {"buckets": {"price": [2]}},
        {"time_since": ["price"]},
    ):
        other = Schema.of(
            parse({"catalogue": {"attributes": ["price"], "multivalued": []}, "features": {**BARE, **more}})
        ).hash
        assert other != base


BARE: dict[str, Any] = {"history_attributes": [], "crosses": []}


def stream(odd: Any) -> tuple[Ranker, torch.Tensor, torch.Tensor]:
    """A ranker after 10,000 examples whose label leans on one number, of which the 5,000th is `odd`; its scores of the others."""
    config = parse({"features": {"numbers": ["price"], "counters": [], **BARE}, "model": {"dim": 4}})
    schema = Schema.of(config)
    model = networks.ranker(config, schema)
    assert model.spec.odd_numbers == (schema.first_declared,)
    rng = np.random.default_rng(3)
    price = rng.lognormal(2.0, 1.0, 10_000)
    label = rng.random(len(price)) < 1 / (1 + (price / 7.4) ** -1.5)
    if odd is not None:
        price[5000] = odd
    numbers = np.zeros((len(price), len(schema.numbers)), np.float32)
    numbers[:, schema.first_declared : schema.first_declared + 2] = squashed(price)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.model.dense_learning_rate)

    def batch(where: slice) -> RankerInputs:
        size, dim = len(price[where]), config.model.dim
        return RankerInputs(
            shared=torch.zeros(1, 1, dim),
            history=torch.zeros(1, 1, 1, dim),
            history_masks=torch.zeros(1, 1, 1, dtype=torch.bool),
            history_gaps=torch.zeros(1, 1, dtype=torch.int64),
            item=torch.zeros(size, len(schema.item_fields), dim),
            numbers=torch.from_numpy(numbers[where]),
            wide=torch.zeros(size, len(schema.tasks)),
            request=torch.zeros(size, dtype=torch.int64),
        )

    for start in range(0, len(price), 100):
        part = slice(start, start + 100)
        optimizer.zero_grad()
        labels = torch.from_numpy(label[part]).float().unsqueeze(1).repeat(1, len(schema.tasks))
        losses(
            model(batch(part)), labels, torch.ones_like(labels, dtype=torch.bool), torch.ones_like(labels)
        ).sum().backward()
        optimizer.step()
    with torch.inference_mode():
        scores = torch.sigmoid(model.eval()(batch(slice(None)))[:, 0])
    return model, scores, torch.from_numpy(label)


def test_one_odd_value_among_ten_thousand_moves_no_other_score_by_two_hundredths() -> None:
    _, expected, label = stream(None)
    model, scores, _ = stream(1e12)
    others = torch.arange(len(scores)) != 5000
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    assert expected[label].mean() > expected[~label].mean() + 0.2
    assert (scores - expected)[others].abs().max() < 0.02


def test_seconds_since_are_those_of_the_moment_of_serving(tmp_path: Path) -> None:
    """What an example says is what was known when it was shown, whatever comes before it is learned."""
    config = parse({"features": {"time_since": ["last_event", "published", "born"], "transitions": True}})
    replay = Replay(config, Options(click_log=False), tmp_path)
    trainer = replay.loop.trainer
    assert trainer is not None
    opened: list[Impression] = []
    open_one = trainer.traffic.impression
    trainer.traffic.impression = lambda *given: (opened.append(given[0]), open_one(*given))[1]  # type: ignore[method-assign]
    items = [
        Item(item_id="iso", attributes={"published": "1970-01-01T00:00:10Z"}),
        Item(item_id="ms", attributes={"published": 25_000, "born": "long ago"}),
        Item(item_id="later", attributes={"published": 3_600_000}),
        Item(item_id="none"),
    ]

    def shown(time_ms: int) -> Event:
        rows = tuple(ShownItem(item_id=item.item_id, position=p + 1) for p, item in enumerate(items))
        return time_ms, "impression", Impression(request_id=str(time_ms), user_id="u", time_ms=time_ms, items=rows)

    def clicked(time_ms: int) -> Event:
        about: dict[str, Any] = {"user_id": "u", "item_id": "iso", "type": "click"}
        return time_ms, "feedback", Feedback(event_id=str(time_ms), time_ms=time_ms, **about)

    replay.run([*((0, "item", item) for item in items), shown(5_000), clicked(12_000), shown(42_000), clicked(50_000)])
    first, second = (decode(replay.loop.schema, impression.features).numbers for impression in opened)
    found = {n: second[:, replay.loop.schema.numbers.index(n)].tolist() for n in replay.loop.schema.numbers}
    assert found["event.last_event"] == pytest.approx([math.log(31)] * 4)
    assert first[0, replay.loop.schema.numbers.index("event.last_event.missing")] == 1.0
    assert found["time.published"] == pytest.approx([math.log(33), math.log(18), 0.0, 0.0])
    assert found["time.published.missing"] == [0.0, 0.0, 0.0, 1.0]
    assert found["time.born.missing"] == [1.0] * 4


def test_times_are_iso_or_milliseconds() -> None:
    assert (
        time_ms_of("1970-01-01T00:00:01.5Z") == time_ms_of("1970-01-01T01:00:01.500+01:00") == time_ms_of(1500) == 1500
    )
    assert time_ms_of("1970-01-02") == 86_400_000
    assert all(math.isnan(time_ms_of(value)) for value in ("yesterday", None, True, ["1970-01-01"]))
