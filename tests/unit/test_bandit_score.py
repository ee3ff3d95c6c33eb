"""Scores over edges: a float64 oracle, the identities of the formulas, the fresh tier, bad input."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.bandit.score import Edges, Grouped, Rule, Scores, best, choose, cluster_weights, score, score_grouped
from recsys.errors import BadInput


def some_edges(seed: int, active: int = 5, num_items: int = 30, unseen: float = 0.2) -> tuple[Any, Edges]:
    """Weights and edges of items with one to `active` edges each, in random order; a share of them unseen."""
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(np.ones(active)).astype(np.float32)
    present = rng.random((active, num_items)) < 0.5
    present[rng.integers(active, size=num_items), np.arange(num_items)] = True
    cluster, item = np.nonzero(present)
    order = rng.permutation(len(cluster))
    n = rng.uniform(0.1, 50, len(cluster)) * (rng.random(len(cluster)) >= unseen)
    d, b = n * rng.uniform(0.05, 1, len(n)), n * rng.random(len(n))
    sums = (column.astype(np.float32)[order] for column in (d, n, b))
    return weights, Edges(cluster[order], (item[order] * 7919 - 2**40).astype(np.int64), *sums)


def oracle(weights: Any, edges: Edges, published: bool) -> dict[int, tuple[float, float, bool]]:
    """Mean, width and fresh of each item, edge by edge in Python's floats."""
    found = {}
    for item in set(edges.item.tolist()):
        mine = [e for e in np.flatnonzero(edges.item == item) if weights[edges.cluster[e]] > 0]
        seen = [(float(weights[edges.cluster[e]]), e) for e in mine if edges.d[e] > 0]
        parts = [w * float(edges.b[e]) / float((edges.d if published else edges.n)[e]) for w, e in seen]
        share = sum(w for w, _ in seen)
        mean = sum(parts) if published else sum(parts) / share if share else 0.0
        width = math.sqrt(sum(w * w / (float(edges.d[e]) * edges.scale) for w, e in seen))
        if mine:
            found[item] = mean, width, len(seen) < len(mine)
    return found


@pytest.mark.parametrize("published", [False, True])
@settings(deadline=None)
@given(seed=st.integers(0, 2**32), active=st.integers(1, 12), scale=st.floats(1e-9, 1.0))
def test_scores_are_those_of_a_float64_oracle(published: bool, seed: int, active: int, scale: float) -> None:
    weights, edges = some_edges(seed, active)
    weights[0] = 0 if active > 1 else 1
    edges = edges._replace(scale=scale)
    found, wanted = score(weights, edges, Rule(published)), oracle(weights, edges, published)
    assert len(found.items) == len(wanted) and set(found.items.tolist()) == set(wanted)
    for row, item in enumerate(found.items.tolist()):
        mean, width, fresh = wanted[item]
        assert found.mean[row] == pytest.approx(mean, rel=1e-6, abs=1e-30)
        assert found.width[row] == pytest.approx(width, rel=1e-6)
        assert found.fresh[row] == fresh


@settings(deadline=None)
@given(seed=st.integers(0, 2**32), prior=st.sampled_from([0.0, 0.5]), published=st.booleans())
def test_edges_grouped_already_score_as_they_do_flat(seed: int, prior: float, published: bool) -> None:
    weights, edges = some_edges(seed)
    rule, edges = Rule(published, 0.5, prior), edges._replace(scale=0.25)
    flat = score(weights, edges, rule)
    numbers = {item: n for n, item in enumerate(flat.items.tolist())}
    candidate = np.array([numbers[item] for item in edges.item.tolist()], np.int32)
    grouped = Grouped(candidate, edges.cluster.astype(np.int32), np.arange(len(candidate), dtype=np.int32))
    sums = np.stack(edges[2:5], 1).astype(np.float64)
    again = score_grouped(weights, grouped, sums, 0.25, rule, len(numbers) + 1)
    for name in ("mean", "width", "fresh"):
        np.testing.assert_array_equal(getattr(again, name)[:-1], getattr(flat, name))
    assert again.mean[-1] == again.width[-1] == 0 and not again.fresh[-1]


@given(share=st.floats(0.01, 0.99))
def test_item_is_fresh_above_the_share_of_its_weight_that_is_unseen(share: float) -> None:
    weights = np.array([1 - share, share], np.float32)
    seen = np.array([1, 0], np.float32)
    edges = Edges(np.array([0, 1]), np.array([7, 7]), seen, seen, seen)
    unseen = float(weights[1]) / float(weights.sum(dtype=np.float64))
    for above in (0.0, 0.3, 0.5, 0.9, 1.0):
        if abs(above - unseen) > 1e-6:
            assert score(weights, edges, Rule(fresh_above=above)).fresh.tolist() == [unseen > above]
    assert not score(weights, edges, Rule(prior=0.1)).fresh.any()


def test_prior_is_impressions_without_reward_in_every_edge() -> None:
    edges = Edges(np.array([0, 1]), np.array([7, 7]), *np.array([[2, 0], [4, 0], [1, 0]], np.float32), 0.5)
    weights = np.array([0.75, 0.25], np.float32)
    found = score(weights, edges, Rule(prior=1.0))
    assert found.mean[0] == pytest.approx(0.75 * 0.5 / 3)
    assert found.width[0] == pytest.approx(math.sqrt(0.75**2 / 2 + 0.25**2 / 1))


@settings(deadline=None)
@given(seed=st.integers(0, 2**32), mu=st.floats(0.001, 1.0), active=st.integers(1, 10))
def test_constant_reward_is_its_normalised_mean_for_any_weights_and_edges(seed: int, mu: float, active: int) -> None:
    weights, edges = some_edges(seed, active, unseen=0.0)
    edges = edges._replace(b=np.float32(mu) * edges.n)
    assert score(weights, edges).mean == pytest.approx(mu, rel=1e-6)


def test_published_mean_grows_with_the_number_of_edges_and_the_normalised_does_not() -> None:
    weights = np.array([0.5, 0.3, 0.2], np.float32)
    cluster, item = np.array([0, 0, 1, 0, 1, 2]), np.array([1, 2, 2, 3, 3, 3])
    shown, mu = 1000, 0.1
    w = weights[cluster]
    edges = Edges(cluster, item, shown * w**2, shown * w, shown * w * np.float32(mu))
    assert score(weights, edges, Rule(published=True)).mean == pytest.approx([mu, 2 * mu, 3 * mu], rel=1e-5)
    assert score(weights, edges).mean == pytest.approx([mu, mu, mu], rel=1e-5)


def test_common_factor_of_the_sums_changes_nothing_but_the_width() -> None:
    weights, edges = some_edges(3)
    factor = np.float32(2.0**40)
    stored = Edges(edges.cluster, edges.item, *(column * factor for column in edges[2:5]), 2.0**-40)
    as_of_now, decayed = score(weights, edges), score(weights, stored)
    for name in Scores._fields:
        np.testing.assert_array_equal(getattr(as_of_now, name), getattr(decayed, name))
    half = score(weights, edges._replace(scale=0.5))
    np.testing.assert_array_equal(half.mean, as_of_now.mean)
    np.testing.assert_allclose(half.width, as_of_now.width * np.sqrt(2), rtol=1e-6)


def test_fresh_items_come_first_in_uniformly_random_order() -> None:
    """Chi-square over the six orders of three fresh items: 20.5 is passed by chance once in 1,000 seeds."""
    scores = Scores(
        np.arange(5),
        np.array([0, 9, 0, 0, 8], np.float32),
        np.ones(5, np.float32),
        np.array([True, False, True, True, False]),
    )
    rng, counts = np.random.default_rng(0), dict[tuple[int, ...], int]()
    rounds = 6000
    for _ in range(rounds):
        order = choose(scores, 5, 1.0, rng).tolist()
        assert order[3:] == [1, 4]
        counts[tuple(order[:3])] = counts.get(tuple(order[:3]), 0) + 1
    assert len(counts) == 6
    assert sum((count - rounds / 6) ** 2 / (rounds / 6) for count in counts.values()) < 20.5
    assert set(choose(scores, 2, 1.0, rng).tolist()) < {0, 2, 3}


def test_alpha_trades_mean_for_width() -> None:
    scores = Scores(np.arange(2), np.array([0.5, 0.4], np.float32), np.array([0.1, 0.4], np.float32), np.zeros(2, bool))
    rng = np.random.default_rng(0)
    assert choose(scores, 1, 0.0, rng).tolist() == [0]
    assert choose(scores, 1, 1.0, rng).tolist() == [1]


@given(seed=st.integers(0, 2**32), k=st.integers(0, 40), distinct=st.integers(1, 30))
def test_best_is_the_top_of_a_full_sort(seed: int, k: int, distinct: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.integers(distinct, size=30).astype(np.float32)
    first = rng.random(30) < 0.2
    rows = best(values, k, rng, first)
    key = np.where(first, np.inf, values)
    assert len(set(rows.tolist())) == len(rows) == min(k, 30)
    np.testing.assert_array_equal(key[rows], np.sort(key)[::-1][:k])


def test_ties_are_broken_at_random() -> None:
    """Each of 10 equal items is first 100 times of 1,000 ± 5 standard deviations (once in 170,000 seeds)."""
    rng = np.random.default_rng(0)
    firsts = np.bincount([int(best(np.zeros(10, np.float32), 1, rng)[0]) for _ in range(1000)], minlength=10)
    assert np.abs(firsts - 100).max() < 5 * math.sqrt(90)


def test_weights_are_a_softmax_over_the_nearest() -> None:
    centroids = np.array([[1, 0], [0, 1], [0.6, 0.8], [-1, 0]], np.float32)
    nearest, weights = cluster_weights(np.array([1, 0.1], np.float32), centroids, 3, 0.5)
    assert nearest.tolist() == [0, 2, 1]
    powers = np.exp(np.array([1.0, 0.68, 0.1]) / 0.5)
    np.testing.assert_allclose(weights, powers / powers.sum(), rtol=1e-6)


def test_cluster_whose_weight_would_vanish_is_not_active() -> None:
    nearest, weights = cluster_weights(np.array([1, 0], np.float32), np.eye(2, dtype=np.float32), 2, 0.01)
    assert nearest.tolist() == [0] and weights.tolist() == [1.0]


def test_pool_and_clusters_smaller_than_asked_for_give_what_there_is() -> None:
    one = np.ones((1, 2), np.float32)
    assert cluster_weights(one[0], one, 10, 0.1)[1].tolist() == [1.0]
    assert len(cluster_weights(one[0], np.zeros((0, 2), np.float32), 10, 0.1)[0]) == 0
    nothing = np.zeros(0, np.float32)
    empty = score(nothing, Edges(np.zeros(0, np.int32), np.zeros(0, np.int64), nothing, nothing, nothing))
    assert len(empty.items) == 0 and len(choose(empty, 10, 1.0, np.random.default_rng(0))) == 0
    weights, edges = some_edges(1)
    assert len(choose(score(weights, edges), 10**6, 1.0, np.random.default_rng(0))) == 30


@pytest.mark.parametrize("vector", [[0.0, 0.0], [np.nan, 1.0], [np.inf, 0.0]])
def test_vector_without_direction_is_refused(vector: list[float]) -> None:
    with pytest.raises(BadInput, match="leave the bandit out"):
        cluster_weights(np.array(vector, np.float32), np.eye(2, dtype=np.float32), 2, 0.1)
