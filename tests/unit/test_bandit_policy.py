"""Policies: one contract for all, exact probabilities, full LinUCB as the oracle of Diag-LinUCB, sums that commute."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.bandit.base import Choices, Events, Requests
from recsys.bandit.draw import even, floored, inverse_gap, mostly_best, only_best
from recsys.bandit.linucb import LinUcb
from recsys.bandit.neural import LastLayer
from recsys.bandit.policy import NAMES, EdgeValues, PolicyOptions, Ranked, Shape, make_policy
from recsys.bandit.sums import EdgeSums
from recsys.errors import BadInput
from recsys.testing.bandit_world import BanditWorld, BanditWorldOptions

SMALL = BanditWorldOptions(clusters=12, active=4, edges=8, living=30, arrival_s=20.0, duration_s=200, rate=6, dim=4)
SHAPE = Shape(num_edges=12 * 40, num_items=40, num_clusters=12, hidden=SMALL.hidden)


def asked(world: BanditWorld) -> tuple[Requests, Any]:
    """One second of a world, with scores too."""
    requests, truth = world.step()
    return replace(requests, scores=truth.astype(np.float32)), truth


def check(requests: Requests, choices: Choices, size: int, floor: float) -> None:
    for request, (start, end) in enumerate(zip(requests.starts[:-1], requests.starts[1:], strict=True)):
        pool = choices.pool[request][choices.pool[request] >= 0]
        chances = choices.probabilities[request, : len(pool)]
        assert len(set(pool.tolist())) == len(pool) == (min(size, end - start) if size else end - start)
        assert ((start <= pool) & (pool < end)).all()
        assert not choices.probabilities[request, len(pool) :].any()
        if len(pool) == 0:
            assert choices.drawn[request] == -1 and choices.propensity[request] == 0
            continue
        assert abs(chances.sum() - 1) < 1e-5 and chances.min() >= min(floor, 1 / len(pool)) - 1e-6
        at = pool.tolist().index(choices.drawn[request])
        assert choices.propensity[request] == chances[at] > 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("size", "floor"), [(0, 0.0), (5, 0.02), (1, 0.0)])
def test_every_policy_draws_from_its_pool_by_its_probabilities_while_it_learns(
    name: str, size: int, floor: float
) -> None:
    world = BanditWorld(1, SMALL)
    options = PolicyOptions(policy=name, pool=size, floor=floor, half_life_s=30.0)
    policy, again = (make_policy(options, SHAPE, np.random.default_rng(7)) for _ in range(2))
    coins = np.random.default_rng(2)
    for _ in range(40):
        requests, truth = asked(world)
        choices = policy.choose(requests)
        check(requests, choices, size, floor)
        np.testing.assert_array_equal(choices.drawn, again.choose(requests).drawn)
        events = world.events(requests, choices.drawn, coins.random(SMALL.rate) < truth[choices.drawn])
        policy.update(events)
        again.update(events)


@pytest.mark.parametrize("name", NAMES)
def test_every_policy_answers_requests_without_candidates(name: str) -> None:
    requests, _ = asked(BanditWorld(1, SMALL))
    none, floats = np.zeros(0, np.int64), np.zeros(0, np.float32)
    empty = replace(
        requests,
        starts=np.zeros(SMALL.rate + 1, np.int64),
        items=none,
        candidate=none.astype(np.int32),
        column=none.astype(np.int32),
        edge=none.astype(np.int32),
        scores=floats,
        hidden=np.zeros((0, SMALL.hidden), np.float32),
    )
    choices = make_policy(PolicyOptions(policy=name), SHAPE, np.random.default_rng(0)).choose(empty)
    assert choices.pool.shape == (SMALL.rate, 0) and (choices.drawn == -1).all()


@pytest.mark.parametrize("published", [False, True])
def test_one_active_cluster_makes_diag_linucb_full_linucb(published: bool) -> None:
    one = replace(SMALL, active=1)
    world = BanditWorld(3, one)
    full = LinUcb(40, 12, alpha=0.7)
    options = PolicyOptions(alpha=0.7, prior=1.0, published=published)
    diag = EdgeValues(EdgeSums(world.num_edges), options)
    rng = np.random.default_rng(0)
    for _ in range(60):
        requests, truth = asked(world)
        exact, _ = full.of(requests, rng)
        values, _ = diag.of(requests, rng)
        np.testing.assert_allclose(values, exact, rtol=2e-5, atol=1e-7)
        drawn = requests.starts[:-1] + rng.integers(np.diff(requests.starts))
        events = world.events(requests, drawn, rng.random(one.rate) < truth[drawn])
        full.learn(events)
        diag.learn(events)


def test_linucb_is_the_ridge_regression_of_a_float64_oracle() -> None:
    world, rng = BanditWorld(4, SMALL), np.random.default_rng(0)
    full = LinUcb(40, 12, alpha=1.0, half_life_s=60.0, prior=0.5)
    squares, sums = np.tile(0.5 * np.eye(12), (40, 1, 1)), np.zeros((40, 12))
    for second in range(150):
        requests, _ = asked(world)
        drawn = requests.starts[:-1] + rng.integers(np.diff(requests.starts))
        late = second % 2 == 1
        events = world.events(requests, drawn, np.zeros(SMALL.rate) if late else rng.random(SMALL.rate))
        several = [events, replace(events, impressions=0 * events.rewards, rewards=events.rewards + 1)]
        for one in several[: 1 + late]:
            full.learn(one)
            for n, item in enumerate(one.items):
                w = np.zeros(12)
                w[one.clusters[n]] = one.weights[n]
                weight = 2.0 ** ((one.times_ms[n] - 1000) / 60_000)
                squares[item] += weight * one.impressions[n] * np.outer(w, w)
                sums[item] += weight * one.rewards[n] * w
    requests, _ = asked(world)
    mean, width = full.means_and_widths(requests)
    scale = 2.0 ** -((requests.now_ms - 1000) / 60_000)
    for request, (start, end) in enumerate(zip(requests.starts[:-1], requests.starts[1:], strict=True)):
        w = np.zeros(12)
        w[requests.clusters[request]] = requests.weights[request]
        for at in range(start, end):
            inverse = np.linalg.inv(squares[requests.items[at]])
            assert mean[at] == pytest.approx(w @ inverse @ sums[requests.items[at]], rel=2e-3, abs=1e-4)
            assert width[at] == pytest.approx(math.sqrt(w @ inverse @ w / scale), rel=1e-3)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**32), workers=st.integers(1, 5), half_life_s=st.sampled_from([None, 10.0, 1000.0]))
def test_sums_do_not_depend_on_order_batches_or_workers(seed: int, workers: int, half_life_s: float | None) -> None:
    rng = np.random.default_rng(seed)
    num, edges = 60, 20
    columns = (
        rng.integers(-1, edges, (num, 3)),
        rng.dirichlet(np.ones(3), num).astype(np.float32),
        rng.integers(0, 2, num).astype(np.float32),
        rng.random(num, np.float32),
        rng.integers(0, 2000_000, num),
    )
    now_ms = 2000_000

    def as_of_now(several: list[EdgeSums]) -> Any:
        """The sums of all workers, decayed to one instant."""
        return np.sum([s.scale(now_ms) * s.sums for s in several], 0)

    straight = EdgeSums(edges, half_life_s)
    order = np.argsort(columns[4], kind="stable")
    straight.add(*(column[order] for column in columns))
    shares = [EdgeSums(edges, half_life_s) for _ in range(workers)]
    for event in rng.permutation(num):
        shares[rng.integers(workers)].add(*(column[event : event + 1] for column in columns))
    np.testing.assert_allclose(as_of_now(shares), as_of_now([straight]), rtol=1e-9, atol=1e-12)


def test_what_was_seen_long_ago_is_fresh_again() -> None:
    world = BanditWorld(5, SMALL)
    requests, _ = asked(world)
    policy = make_policy(PolicyOptions(half_life_s=1.0), SHAPE, np.random.default_rng(0))
    assert isinstance(policy, Ranked)
    policy.update(world.events(requests, requests.starts[:-1], np.ones(SMALL.rate)))
    for seconds, seen in ((10, True), (2000, False)):
        later = replace(requests, now_ms=requests.now_ms + 1000 * seconds)
        mean, fresh = policy.values.of(later, np.random.default_rng(0))
        assert np.isfinite(mean).all() and fresh is not None
        assert fresh[requests.starts[0]] != seen


def test_impression_and_late_reward_are_one_event_in_two_parts() -> None:
    world = BanditWorld(5, SMALL)
    requests, _ = asked(world)
    drawn = requests.starts[:-1]
    whole = world.events(requests, drawn, np.ones(SMALL.rate))
    for name in ("diag_linucb", "linucb"):
        options = PolicyOptions(policy=name, pool=0, half_life_s=60.0, alpha=0.3)
        one, two = (make_policy(options, SHAPE, np.random.default_rng(0)) for _ in range(2))
        one.update(whole)
        two.update(replace(whole, rewards=0 * whole.rewards))
        two.update(replace(whole, impressions=0 * whole.impressions))
        assert isinstance(one, Ranked) and isinstance(two, Ranked)
        later = replace(requests, now_ms=requests.now_ms + 40_000)
        ours, theirs = (p.values.of(later, np.random.default_rng(0))[0] for p in (one, two))
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=50), st.floats(1, 1e5))
def test_inverse_gap_weighting_is_its_closed_form(values: list[float], gamma: float) -> None:
    ordered = np.sort(np.array(values))[::-1]
    chances = inverse_gap(ordered[None], np.array([len(values)]), gamma)[0]
    others = [1 / (len(values) + gamma * (ordered[0] - value)) for value in ordered[1:]]
    np.testing.assert_allclose(chances[1:], others)
    assert chances[0] == pytest.approx(1 - sum(others))
    assert chances[0] >= 1 / len(values) - 1e-9


def test_inverse_gap_of_three_by_hand() -> None:
    two_pools = np.array([[0.5, 0.4, 0.1], [0.5, 0.4, 0.0]])
    chances = inverse_gap(two_pools, np.array([3, 2]), 10.0)
    np.testing.assert_allclose(chances, [[1 - 1 / 4 - 1 / 7, 1 / 4, 1 / 7], [1 - 1 / 3, 1 / 3, 0]])


@given(st.integers(1, 50), st.floats(0, 1))
def test_floor_is_kept_and_probabilities_sum_to_one(size: int, floor: float) -> None:
    values, sizes = np.tile(np.linspace(1, 0, size + 3), (2, 1)), np.array([size, size + 3])
    for rule in (even, only_best, partial(mostly_best, epsilon=0.1), partial(inverse_gap, gamma=100.0)):
        short, full = floored(rule(values, sizes), sizes, floor)
        assert not short[size:].any() and full.sum() == pytest.approx(1)
        chances = short[:size]
        assert chances.sum() == pytest.approx(1) and chances.min() >= min(floor, 1 / size) - 1e-12


def test_drawn_frequencies_match_the_propensities() -> None:
    """Chi-square over 8,000 draws at 4 degrees of freedom: above 23.5 happens once in 10,000 runs; the seed is fixed."""
    requests, truth = asked(BanditWorld(6, replace(SMALL, rate=1)))
    policy = make_policy(PolicyOptions(policy="square_cb", gamma=30.0, pool=5), SHAPE, np.random.default_rng(0))
    first = policy.choose(requests)
    counts = dict.fromkeys(first.pool[0].tolist(), 0)
    for _ in range(8000):
        counts[int(policy.choose(requests).drawn[0])] += 1
    expected = 8000 * first.probabilities[0]
    assert ((np.array(list(counts.values())) - expected) ** 2 / expected).sum() < 23.5
    assert first.pool[0].tolist() == np.argsort(-truth, kind="stable")[:5].tolist()


def test_thompson_takes_the_better_of_two_as_often_as_its_normals_say() -> None:
    """Means .3 and .2, widths .1: better with chance Φ(.1/√.02) = .760; 4,000 draws, 5 standard deviations (once in 1.7 million)."""
    requests, _ = asked(BanditWorld(7, replace(SMALL, rate=1, active=1)))
    requests = replace(
        requests,
        weights=np.ones((1, 1), np.float32),
        starts=np.array([0, 2]),
        items=np.array([1, 2]),
        candidate=np.array([0, 1], np.int32),
        column=np.zeros(2, np.int32),
        edge=np.array([0, 1], np.int32),
    )
    policy = make_policy(PolicyOptions(policy="thompson", alpha=1.0, pool=1), SHAPE, np.random.default_rng(0))
    for n, mean in enumerate((0.3, 0.2)):
        shown = np.ones(100, np.float32)
        edges, times = np.full((100, 1), n), np.zeros(100, np.int64)
        policy.update(
            Events(
                clusters=edges,
                weights=shown[:, None],
                items=edges[:, 0],
                edges=edges,
                impressions=shown,
                rewards=mean * shown,
                times_ms=times,
            )
        )
    wins = sum(int(policy.choose(requests).drawn[0]) == 0 for _ in range(4000))
    assert abs(wins - 4000 * 0.7602) < 5 * math.sqrt(4000 * 0.7602 * 0.2398)


def test_last_layer_learns_a_logistic_regression() -> None:
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(4000, 3)).astype(np.float32)
    true = np.array([1.0, -1.0, 0.5])
    chance = 1 / (1 + np.exp(-(hidden @ true - 1)))
    world = BanditWorld(8, SMALL)
    requests, _ = asked(world)
    layer = LastLayer(np.zeros(4, np.float32), rate=0.5, perturbation=0.0)
    shape = (len(hidden), 1)
    layer.learn(
        Events(
            clusters=np.zeros(shape, np.int64),
            weights=np.ones(shape, np.float32),
            items=np.zeros(len(hidden), np.int64),
            edges=np.zeros(shape, np.int64),
            impressions=np.ones(len(hidden), np.float32),
            rewards=(rng.random(len(hidden)) < chance).astype(np.float32),
            times_ms=np.zeros(len(hidden), np.int64),
            hidden=hidden,
        )
    )
    predicted, _ = layer.of(replace(requests, hidden=hidden), rng)
    assert np.abs(predicted - chance).mean() < 0.03


def test_unknown_policy_names_the_nearest() -> None:
    with pytest.raises(BadInput, match="'thomson' is not known: did you mean 'thompson'"):
        PolicyOptions(policy="thomson")
    with pytest.raises(BadInput, match="did you mean 'alpha'"):
        PolicyOptions.parse({"policy": "diag_linucb", "alhpa": 1.0})


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"alpha": -1.0}, "alpha = -1.0 must be from 0"),
        ({"epsilon": math.nan}, "epsilon = nan"),
        ({"half_life_s": 0.0}, "half_life_s = 0.0 must be positive"),
        ({"pool": 10, "floor": 0.2}, "lower one"),
        ({"pool": 0, "floor": 0.1}, "pool of all"),
    ],
)
def test_wrong_number_is_named(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(BadInput, match=named):
        PolicyOptions.parse(wrong)


def test_what_a_policy_lacks_and_what_is_not_finite_is_said() -> None:
    world = BanditWorld(9, SMALL)
    requests, _ = world.step()
    rng = np.random.default_rng(0)
    with pytest.raises(BadInput, match="'square_cb' needs predicted rewards"):
        make_policy(PolicyOptions(policy="square_cb"), SHAPE, rng).choose(requests)
    broken = replace(requests, hidden=np.full((len(requests.items), SMALL.hidden), np.nan, np.float32))
    with pytest.raises(BadInput, match="last hidden layer for policy 'neural' are not finite"):
        make_policy(PolicyOptions(policy="neural"), SHAPE, rng).choose(broken)
    events = world.events(requests, requests.starts[:-1], np.full(SMALL.rate, np.nan))
    with pytest.raises(BadInput, match="drop these events"):
        make_policy(PolicyOptions(), SHAPE, rng).update(events)
