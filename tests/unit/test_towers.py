"""Learning retrieval: what makes a positive, what it is told from, and that a restart goes on where it was."""

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import orjson
import pytest
import torch

from recsys.config import parse
from recsys.features.catalogue import Catalogue
from recsys.features.schema import Schema
from recsys.model.layers import seeded
from recsys.model.layouts import layouts
from recsys.model.two_tower import Passed, TwoTower, TwoTowerSpec
from recsys.table.tables import Tables
from recsys.training.towers import BATCH, TowerLearner
from recsys.types import Feedback, Impression, Item, ShownItem

ITEMS = 12
NUMBERS = itertools.count()


def learner(**model: Any) -> TowerLearner:
    features = {"context": ["place"], "history_types": ["click", "like"]}
    retrieval = {"count_types": ["click", "purchase"]}
    config = parse({"model": {"dim": 4, "tower_dim": 4, **model}, "features": features, "retrieval": retrieval})
    schema = Schema.of(config)
    catalogue = Catalogue(schema)
    for number in range(ITEMS):
        catalogue.apply(Item(item_id=f"i{number}", attributes={"category": f"c{number % 3}"}))
    return TowerLearner(config, schema, Tables(layouts(config, schema)), catalogue)


def click(user: str, item: int, request_id: str | None = None, context: dict[str, str] | None = None) -> Feedback:
    return event(user, item, "click", request_id=request_id, context=context)


def event(user: str, item: int, kind: str, **more: Any) -> Feedback:
    return Feedback(event_id=f"e{next(NUMBERS)}", user_id=user, item_id=f"i{item}", type=kind, time_ms=0, **more)


def shown(user: str, *items: int, request_id: str = "r", place: str = "home") -> Impression:
    rows = tuple(ShownItem(item_id=f"i{n}", position=p + 1) for p, n in enumerate(items))
    return Impression(request_id=request_id, user_id=user, time_ms=0, items=rows, context={"place": place})


def test_a_user_without_past_is_a_positive_only_with_context() -> None:
    model = learner()
    model.feedback(click("new", 1), 0)
    assert model._positives == []
    model.feedback(click("elsewhere", 1, context={"place": "home"}), 0)
    model.feedback(click("new", 2), 0)
    assert [p.row for p in model._positives] == [1, 2]
    assert model._positives[0].user.shared_mask.tolist() == [True, True]


def test_a_context_value_of_0_is_learned_from_as_it_is_served() -> None:
    model = learner()
    model.impression(replace(shown("u", 1), context={"place": 0}))
    model.feedback(click("u", 1, request_id="r"), 0)
    assert (model._positives[0].user.shared_keys[1], model._positives[0].user.shared_mask[1]) == (0, True)


def test_what_is_history_is_learned_from_as_history_and_what_counts_as_the_next_item() -> None:
    """As serving sees it: a like is history alone, a purchase is a positive alone."""
    model = learner()
    for number, kind in enumerate(("like", "purchase", "click", "view")):
        model.feedback(event("u", number, kind), 0)
    assert [p.row for p in model._positives] == [1, 2]
    assert [len(p.user.history_keys) for p in model._positives] == [1, 1]
    assert model._users["u"].events == [("i0", "like"), ("i2", "click")]


def test_the_same_event_twice_is_learned_once_even_after_a_restart() -> None:
    first, again = learner(), click("u", 1, context={"place": "home"})
    first.feedback(again, 0)
    second = learner()
    second.restore(first.state())
    second.restore_arrays(first.arrays())
    for model in (first, second):
        model.feedback(again, 0)
        assert len(model._positives) == len(model._users["u"].events) == 1


def test_a_gradient_that_is_not_finite_changes_nothing_and_is_told() -> None:
    model = learner()
    with torch.no_grad():
        next(model.model.parameters()).fill_(torch.nan)
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    took = [model.feedback(click(f"u{n}", n % ITEMS, context={"place": "home"}), 0) for n in range(BATCH)]
    assert took == [True] * (BATCH - 1) + [False]
    after = model.model.state_dict()
    for name in before.keys() - {"steps"}:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=0, equal_nan=True)


def test_context_of_the_request_belongs_to_its_feedback() -> None:
    model = learner()
    model.impression(shown("u", 1, 2))
    model.feedback(click("u", 1, "r"), 0)
    model.feedback(click("u", 2, "another"), 0)
    assert [p.user.shared_mask[1] for p in model._positives] == [True, False]


def test_hard_negatives_are_what_was_shown_last_and_passed_over() -> None:
    model = learner(hard_negatives=2)
    model.impression(shown("u", 1, 2, 3, 4, 5))
    model.feedback(click("u", 4, "r"), 0)
    model.feedback(click("u", 5, "r"), 0)
    assert [p.passed for p in model._positives] == [[3, 5], [2, 3]]
    assert learner(hard_negatives=0)._hard == 0


def test_loss_tells_the_item_from_the_batch_and_from_what_was_passed_over() -> None:
    generator = seeded(1)
    user, item = (torch.randn(3, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    hard = torch.randn(3, 2, 5, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[True, True], [True, False], [False, False]])
    log_q = torch.log(torch.tensor([0.5, 0.2, 0.1], dtype=torch.float64))
    spec = TwoTowerSpec(num_shared=1, num_item=1, num_history=1, dim=4, tower_dim=5, temperature=0.5)
    total = 0.0
    for i in range(3):
        corrected = [(user[i] @ item[j] / 0.5 - log_q[j]).exp() for j in range(3)]
        passed = [(user[i] @ hard[i, n] / 0.5).exp() for n in range(2) if mask[i, n]]
        total -= float((corrected[i] / (sum(corrected) + sum(passed))).log()) / 3
    found = TwoTower(spec, seed=0).loss(user, item, torch.arange(3), log_q, torch.ones(3), Passed(hard, mask))
    assert found.item() == pytest.approx(total)


@pytest.mark.parametrize("hard", [0, 3])
def test_a_restored_learner_goes_on_bit_equal(hard: int) -> None:
    straight, first = learner(hard_negatives=hard), learner(hard_negatives=hard)
    second, rng = learner(hard_negatives=hard), np.random.default_rng(0)
    for number in range(8 * BATCH):
        user, items = f"u{rng.integers(5)}", rng.integers(0, ITEMS, 4).tolist()
        for model in (straight, first if number < 5 * BATCH - 7 else second):
            model.impression(shown(user, *items, request_id=f"r{number}"))
            model.feedback(click(user, items[1], f"r{number}"), number)
        if number == 5 * BATCH - 8:
            second.restore(orjson.loads(orjson.dumps(first.state())))
            second.model.load_state_dict(first.model.state_dict())
            second.optimizer.restore(first.optimizer.state())
            second.restore_arrays(first.arrays())
            touched = first._table.touched("copy")
            second._table.restore(first._table.export(touched.slots, touched.keys))
            second._table.restore_defaults(first._table.defaults())
    assert straight.steps == second.steps > first.steps > 2
    for name, value in straight.model.state_dict().items():
        torch.testing.assert_close(second.model.state_dict()[name], value, atol=0, rtol=0)


def test_forgetting_a_user_drops_history_and_waiting_positives() -> None:
    model = learner()
    for user in ("u", "v"):
        model.feedback(click(user, 1), 0)
        model.feedback(click(user, 2), 0)
    model.forget("u")
    assert list(model._users) == ["v"] and len(model._positives) == 1
