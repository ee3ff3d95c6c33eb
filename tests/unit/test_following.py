"""What follows what: transitions against exact sums, the factor model against its formula, and both in a ranking process."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.candidates.following import Following
from recsys.config import parse
from recsys.errors import ConfigError
from recsys.features.build import shared_columns
from recsys.features.catalogue import Catalogue
from recsys.features.schema import Schema
from recsys.keys import mix
from recsys.model.ranker import choices
from recsys.retrieval.factors import NEGATIVES, Factors
from recsys.retrieval.transitions import RANK_HALF_LIVES, Transitions
from recsys.types import Item

STEPS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5), st.integers(0, 2), st.integers(0, 2)), max_size=30)


@settings(deadline=None)
@given(STEPS, st.integers(0, 2))
def test_transitions_weigh_by_recency_of_rank_and_by_shared_context(
    steps: list[tuple[int, int, int, int]], source: int
) -> None:
    """Against sums over the last 6 of the source's transitions among the last 20 of all."""
    transitions = Transitions(2, length=6, capacity=20)
    for origin, target, first, second in steps:
        transitions.add(origin, target, np.array([first, second]))
    context = np.array([1, 0])
    found = transitions.score(source, context, np.arange(6, dtype=np.int32))
    last = [step[1:] for step in reversed(steps[-20:]) if step[0] == source][:6]
    expected = np.zeros((6, 5))
    for rank, (target, first, _) in enumerate(last):
        soon, usual = (2.0 ** (-rank / half) for half in RANK_HALF_LIVES)
        expected[target, :2] += soon, usual
        expected[target, 2] += usual * (2.0 if first == 1 else 1.0)
        expected[target, 3] += usual * (first == 1)
    np.testing.assert_allclose(found, np.log(expected + 0.05), atol=1e-5)
    rows, scores = transitions.candidates(source, context, 6)
    order = sorted((t for t in range(6) if expected[t, 2]), key=lambda t: (-round(expected[t, 2], 6), t))
    np.testing.assert_allclose(scores, expected[order, 2], rtol=1e-5)
    assert set(rows.tolist()) == set(order)


def test_a_snapshot_of_transitions_follows_items_to_their_new_rows() -> None:
    first, second = Transitions(1), Transitions(1)
    for target in (1, 2, 1):
        first.add(0, target, np.array([7]))
    second.restore(first.state(), np.array([2, 0, -1], np.int32))  # 0 → 2, 1 → 0, 2 is gone
    found = np.exp(second.score(2, np.array([7]), np.array([0, 1], np.int32))) - 0.05
    assert found[0, 0] == pytest.approx(1 + 2 ** (-1 / RANK_HALF_LIVES[0]), rel=1e-5)
    assert found[1] == pytest.approx(np.zeros(4), abs=1e-6)


def test_the_factor_model_learns_what_follows_what_and_popularity_cancels_out() -> None:
    """After item i comes i + 1 in the context 1 and i + 2 in the context 2; the item 9 is clicked everywhere."""
    rng, factors = np.random.default_rng(0), Factors()
    for _ in range(20_000):
        last, context = int(rng.integers(1, 6)), int(rng.integers(1, 3))
        factors.learn([last, context], 9 if rng.random() < 0.3 else last + context)
    rows = np.arange(10, dtype=np.int32)
    for last in range(1, 6):
        for context in (1, 2):
            assert int(np.argmax(factors.score([last, context], rows))) == last + context
    again = Factors()
    again.restore(factors.state(), rows)
    np.testing.assert_array_equal(again.score([3, 1], rows), factors.score([3, 1], rows))


def test_a_step_of_the_factor_model_is_the_gradient_of_sampled_softmax() -> None:
    factors = Factors()
    for n in range(NEGATIVES):
        factors.learn([1], n)
    factors.learn([1], 5)  # gives the query its row
    before = factors.state()
    recent = np.concatenate([np.arange(NEGATIVES), [5]])
    draws = recent[_draws(NEGATIVES + 1)]
    items = [7, *(int(n) for n in draws if n != 7)]
    query = torch.tensor(before["vectors"][0], dtype=torch.float64, requires_grad=True)
    outs = torch.tensor(before["outs"][items], dtype=torch.float64, requires_grad=True)
    torch.nn.functional.cross_entropy((outs @ query)[None], torch.tensor([0])).backward()
    factors.learn([1], 7)
    after = factors.state()
    squares = before["squares"][0] + (query.grad**2).mean()
    expected = query.detach() - 0.1 / squares.sqrt() * query.grad
    np.testing.assert_allclose(after["vectors"][0], expected.numpy(), rtol=1e-4, atol=1e-6)
    mine = outs.grad[0]
    squares = before["out_squares"][7] + (mine**2).mean()
    np.testing.assert_allclose(after["outs"][7], (outs.detach()[0] - 0.1 / squares.sqrt() * mine).numpy(), rtol=1e-4)


def _draws(known: int) -> np.ndarray:
    return (mix(np.arange(NEGATIVES) + known * NEGATIVES) % np.uint64(known)).astype(np.int64)


def test_the_session_and_its_context_decide_what_follows() -> None:
    features = {"context": ["region"], "transitions": True, "transition_context": ["region"], "crosses": []}
    config = parse({"features": features | {"history_attributes": []}})
    schema = Schema.of(config)
    catalogue = Catalogue(schema)
    for n in range(5):
        catalogue.apply(Item(item_id=f"i{n}"))
    following = Following(config, schema, catalogue)
    north, south = (shared_columns(schema, "u", {"region": r}) for r in ("north", "south"))
    for _ in range(3):
        following.add(1, [0], north)
        following.add(2, [0, 3], south)
    names = schema.numbers[-following.numbers([0], north, np.array([1], np.int32)).shape[1] - 1 :]
    assert names[0] == "follows.soon"
    assert names[-1] == "follows.mixed"
    rows = np.array([1, 2], np.int32)
    assert following.candidates([0], north, 1)[0].tolist() == [1]
    assert following.candidates([0, 3], south, 1)[0].tolist() == [2]
    numbers = dict(zip(names, following.numbers([0, 3], south, rows).T, strict=False))
    assert numbers["follows.region"][1] > numbers["follows.region"][0]
    assert numbers["follows.before"][0] == pytest.approx(np.log(0.05))
    assert (following.numbers([], south, rows)[:, -1] == 0).all()


def test_context_that_is_no_feature_is_refused() -> None:
    with pytest.raises(ConfigError, match="transition_context"):
        parse({"features": {"transition_context": ["region"]}})


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.integers(0, 1000))
def test_choices_are_the_softmax_of_each_request(owners: list[int], seed: int) -> None:
    request = torch.tensor(sorted(owners))
    logits = torch.randn(len(owners), 2, generator=torch.Generator().manual_seed(seed)) * 20
    found = choices(logits, request)
    for owner in set(owners):
        mine = request == owner
        torch.testing.assert_close(found[mine], torch.log_softmax(logits[mine], 0), rtol=1e-4, atol=1e-5)


def test_factors_keep_to_their_capacity_and_score_what_came_too_late_as_unknown() -> None:
    factors = Factors(capacity=3)
    for number in range(100):
        factors.learn([number + 1], number % 5)
    assert len(factors.state()["keys"]) == 3
    rows = np.arange(5, dtype=np.int32)
    np.testing.assert_array_equal(factors.score([99], rows), factors.score([0], rows))
