"""Learning retrieval: what makes a positive, what it is told from, and that a restart goes on where it was."""

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import orjson
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recsys.config import parse
from recsys.events import messages
from recsys.features.build import newest
from recsys.features.catalogue import Catalogue
from recsys.features.schema import Schema
from recsys.keys import key_of
from recsys.model.layers import seeded
from recsys.model.layouts import layouts
from recsys.model.specs import TwoTowerSpec
from recsys.model.two_tower import Passed, TwoTower
from recsys.table.tables import Tables
from recsys.training.old_towers import first_upserts
from recsys.training.tower_learner import BATCH, TowerLearner
from recsys.training.tower_users import TowerUsers
from recsys.types import Feedback, HistoryEvent, Impression, Item, Record, ShownItem

ITEMS = 12
NUMBERS = itertools.count()
KINDS = ("click", "like", "share")


def learner(features: Mapping[str, Any] = {}, **model: Any) -> TowerLearner:
    features = {"context": ["place"], "history_types": ["click", "like"], **features}
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


def items(model: TowerLearner) -> list[list[str]]:
    """Each waiting positive's item and what was passed over."""
    name = {key_of(f"i{n}"): f"i{n}" for n in range(ITEMS)}
    return [[name[key] for key in p.keys[:, 0].tolist()] for p in model._positives]


def history(model: TowerLearner, user: str) -> list[tuple[int, str]]:
    known = model._users.of(key_of(user))
    return [(item, model._users.types[number]) for item, number in zip(known.items, known.types, strict=True)]


def test_a_user_without_past_is_a_positive_only_with_context() -> None:
    model = learner()
    model.feedback(click("new", 1), 0)
    assert model._positives == []
    model.feedback(click("elsewhere", 1, context={"place": "home"}), 0)
    model.feedback(click("new", 2), 0)
    assert items(model) == [["i1"], ["i2"]]
    assert model._positives[0].shared_mask.tolist() == [True, True]


def test_without_a_history_positives_have_context_alone() -> None:
    model = learner(features={"history_types": []})
    model.feedback(click("u", 1, context={"place": "home"}), 0)
    model.feedback(click("u", 2, context={"place": "home"}), 0)
    assert [len(positive.history_keys) for positive in model._positives] == [0, 0]


def test_a_context_value_of_0_is_learned_from_as_it_is_served() -> None:
    model = learner()
    model.impression(replace(shown("u", 1), context={"place": 0}))
    model.feedback(click("u", 1, request_id="r"), 0)
    assert (model._positives[0].shared_keys[1], model._positives[0].shared_mask[1]) == (0, True)


def test_what_is_history_is_learned_from_as_history_and_what_counts_as_the_next_item() -> None:
    """As serving sees it: a like is history alone, a purchase is a positive alone."""
    model = learner()
    for number, kind in enumerate(("like", "purchase", "click", "view")):
        model.feedback(event("u", number, kind), 0)
    assert items(model) == [["i1"], ["i2"]]
    assert [len(p.history_keys) for p in model._positives] == [1, 1]
    assert history(model, "u") == [(key_of("i0"), "like"), (key_of("i2"), "click")]


def test_the_same_event_twice_is_learned_once_even_after_a_restart() -> None:
    first, again = learner(), click("u", 1, context={"place": "home"})
    first.feedback(again, 0)
    second = learner()
    second.restore(first.state())
    second.restore_arrays(first.arrays())
    for model in (first, second):
        model.feedback(again, 0)
        assert len(model._positives) == len(history(model, "u")) == 1


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
    assert [p.shared_mask[1] for p in model._positives] == [True, False]


def test_hard_negatives_are_what_was_shown_last_and_passed_over() -> None:
    model = learner(hard_negatives=2)
    model.impression(shown("u", 1, 2, 3, 4, 5))
    model.feedback(click("u", 4, "r"), 0)
    model.feedback(click("u", 5, "r"), 0)
    assert items(model) == [["i4", "i3", "i5"], ["i5", "i2", "i3"]]
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
    assert len(model._users) == 1 and history(model, "v") and len(model._positives) == 1


def numbered(model: TowerLearner) -> dict[str, Any]:
    """The state of a user who clicked i3, then i5, as releases wrote it that named items by row; rows begin at 100 here."""
    shared, past = len(model._schema.shared_slots), len(model._schema.history_slots)
    row = model._catalogue.row("i3")
    columns = [model._catalogue.keys[row, :past].tolist()], [model._catalogue.mask[row, :past].tolist()]
    positive = [
        105,
        [104, 103],
        [key_of("u"), *[0] * (shared - 1)],
        [True, *[False] * (shared - 1)],
        *columns,
        [1],
        [0],
    ]
    user = ["u", [["i3", "click"], ["i5", "click"]], [107, 104], "r", {"place": "home"}]
    return {"users": [user], "positives": [positive], "steps": 0}


def test_state_that_names_rows_is_carried_over_where_the_log_still_tells_them(caplog: pytest.LogCaptureFixture) -> None:
    model = learner()
    ids = [f"gone{n}" for n in range(100)] + [f"i{n}" for n in range(ITEMS)]
    model.restore(orjson.loads(orjson.dumps(numbered(model))))
    model.number(ids)
    assert items(model) == [["i5", "i4", "i3"]] and not caplog.records
    assert history(model, "u") == [(key_of("i3"), "click"), (key_of("i5"), "click")]
    model.feedback(click("u", 2, "r"), 0)
    assert items(model)[1] == ["i2", "i7", "i4"] and model._positives[1].shared_mask.tolist() == [True, True]


def test_state_that_names_rows_nobody_knows_any_more_drops_them_aloud(caplog: pytest.LogCaptureFixture) -> None:
    model = learner()
    model.restore(numbered(model))
    model.number(None)
    assert items(model) == [] and "1 waiting positives" in caplog.text
    assert history(model, "u") == [(key_of("i3"), "click"), (key_of("i5"), "click")]
    model.feedback(click("u", 2, "r"), 0)
    assert items(model) == [["i2"]]


def test_rows_are_told_from_a_log_that_holds_every_record_alone() -> None:
    def record(offset: int, item: Item) -> Record:
        value = messages.dump_item(item)
        return Record(topic="item", partition=0, offset=offset, key=item.item_id, value=value, time_ms=0)

    records = [record(n, Item(item_id=i, deleted=i == "b")) for n, i in enumerate(("a", "b", "c", "a", "d"))]
    assert first_upserts(records) == ["a", "c", "d"]
    assert first_upserts(records[1:]) is None and first_upserts(records[:1] + records[2:]) is None


def test_an_item_deleted_while_the_batch_fills_is_learned_as_it_was() -> None:
    model = learner()
    model.feedback(click("u", 1, context={"place": "home"}), 0)
    before = model._positives[0].keys.copy()
    model._catalogue.apply(Item(item_id="i1", deleted=True))
    model._catalogue.apply(Item(item_id="i1", attributes={"category": "other"}))
    for number in range(1, BATCH):
        model.feedback(click(f"u{number}", 1 + number % (ITEMS - 1), context={"place": "home"}), 0)
    assert model.steps == 1 and before.any()


def test_frequencies_of_items_that_are_gone_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recsys.training.tower_learner._GONE", 10)
    model = learner()
    catalogue = model._catalogue
    for first in range(0, 40 * BATCH, BATCH):
        for number in range(first, first + BATCH):
            catalogue.apply(Item(item_id=f"i{number}", attributes={"category": "c"}))
            model.feedback(click(f"u{number}", number, context={"place": "home"}), number)
        for number in range(first, first + BATCH):
            if number % 32:
                catalogue.apply(Item(item_id=f"i{number}", deleted=True))
        assert len(model.frequency) <= 2 * (catalogue.num_alive + BATCH) + 10 + BATCH
    assert model.steps == 40
    known, alive = set(model.frequency.keys().tolist()), {key_of(f"i{n}") for n in range(0, 39 * BATCH, 32)}
    assert alive <= known, "an item that is there keeps its own"


@given(
    st.lists(st.sampled_from(KINDS), max_size=30),
    st.sampled_from([(), ("click",), ("like", "click")]),
)
def test_towers_learn_from_the_events_that_are_served(kinds: list[str], second: tuple[str, ...]) -> None:
    sequences = {"all": [*KINDS], "some": list(second)} if second else {}
    schema = Schema.of(parse({"features": {"history_len": 4, "history_types": [*KINDS], "sequences": sequences}}))
    users = TowerUsers(schema, KINDS, 10)
    user = users.of(1)
    events = [HistoryEvent(time_ms=n, event_id="", item_id=str(n), type=kind) for n, kind in enumerate(kinds)][-4:]
    for number, kind in enumerate(kinds):
        users.happened(user, number, kind)
    assert users.recent(user).tolist() == [int(event.item_id) for event in newest(schema, events)[0]]
