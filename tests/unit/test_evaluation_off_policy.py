"""Off-policy estimates against closed forms and a simulated world whose truth is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from recsys.errors import BadInput
from recsys.evaluation.off_policy import Draws, draws_of, ips, snips
from recsys.types import Impression, ShownItem

ITEMS = ("a", "b", "c", "d")
LOGGED = np.array([0.4, 0.3, 0.2, 0.1])
OTHER = np.array([0.1, 0.1, 0.2, 0.6])
CLICK_RATE = np.array([0.1, 0.2, 0.5, 0.3])


def logged(num: int, seed: int) -> tuple[list[Impression], dict[tuple[str, str], float]]:
    """A log: the top is fixed, position 2 is drawn; a click on it pays 1."""
    generator = np.random.default_rng(seed)
    chosen = generator.choice(4, num, p=LOGGED)
    clicked = generator.random(num) < CLICK_RATE[chosen]
    impressions, rewards = [], {}
    for i, (k, click) in enumerate(zip(chosen.tolist(), clicked.tolist(), strict=True)):
        drawn = ShownItem(
            item_id=ITEMS[k], position=2, propensity=LOGGED[k], pool=tuple(zip(ITEMS, LOGGED.tolist(), strict=True))
        )
        top = ShownItem(item_id="top", position=1, propensity=1.0)
        impressions.append(Impression(request_id=f"r{i}", user_id="u", time_ms=i, items=(top, drawn)))
        rewards[f"r{i}", "top"] = 7.0
        if click:
            rewards[f"r{i}", ITEMS[k]] = 1.0
    return impressions, rewards


def other(impression: Impression, item: ShownItem) -> list[float]:
    return OTHER.tolist()


def same(impression: Impression, item: ShownItem) -> list[float]:
    return LOGGED.tolist()


def test_the_logging_policy_itself_earns_the_logged_mean() -> None:
    impressions, rewards = logged(500, seed=1)
    draws = draws_of(impressions, rewards, same, position=2)
    for estimate in (ips(draws, np.random.default_rng(0)), snips(draws, np.random.default_rng(0))):
        assert estimate.value == pytest.approx(draws.rewards.mean())
        assert estimate.effective_sample_size == pytest.approx(500)
        assert estimate.max_weight == pytest.approx(1)


def test_a_simulated_policy_earns_its_true_value_within_the_interval_at_the_stated_rate() -> None:
    truth = float(OTHER @ CLICK_RATE)
    inside = {"ips": 0, "snips": 0}
    values: dict[str, list[float]] = {"ips": [], "snips": []}
    for seed in range(40):
        draws = draws_of(*logged(1000, seed), other, position=2)
        for estimator in (ips, snips):
            estimate = estimator(draws, np.random.default_rng(seed), resamples=200)
            inside[estimate.estimator] += estimate.low <= truth <= estimate.high
            values[estimate.estimator].append(estimate.value)
    for name in inside:
        error = np.std(values[name]) / np.sqrt(40)
        assert abs(np.mean(values[name]) - truth) < 4 * error
        assert inside[name] >= 33  # 38 expected of 40; 33 or fewer has probability .03%


def test_values_effective_sample_size_and_clipping_are_the_closed_forms() -> None:
    draws = Draws(weights=np.array([0.5, 1.0, 6.0]), rewards=np.array([0.0, 1.0, 1.0]))
    plain, normalised = ips(draws, np.random.default_rng(0)), snips(draws, np.random.default_rng(0))
    assert plain.value == pytest.approx(7 / 3)
    assert normalised.value == pytest.approx(7 / 7.5)
    assert plain.effective_sample_size == pytest.approx(7.5**2 / 37.25)
    clipped = ips(draws, np.random.default_rng(0), clip=2.0)
    assert clipped.value == pytest.approx(1.0)
    assert (clipped.max_weight, clipped.draws) == (6.0, 3)


def test_an_estimate_is_the_same_for_the_same_seed() -> None:
    draws = draws_of(*logged(100, seed=3), other, position=2)
    assert ips(draws, np.random.default_rng(9)) == ips(draws, np.random.default_rng(9))


def test_a_position_that_was_not_drawn_is_refused_and_told_what_would_be_valid() -> None:
    impressions, rewards = logged(3, seed=1)
    with pytest.raises(BadInput, match=r"request 'r0', position 1 was not drawn .*DM.*A/B.*interleaving"):
        draws_of(impressions, rewards, other, position=1)


def test_a_position_that_no_answer_has_is_refused() -> None:
    with pytest.raises(BadInput, match="no impression shows position 3"):
        draws_of(*logged(3, seed=1), other, position=3)


def test_a_pool_that_is_not_whole_or_contradicts_the_propensity_is_refused() -> None:
    [impression], rewards = logged(1, seed=1)
    top, drawn = impression.items
    half = replace(drawn, pool=tuple((i, p / 2) for i, p in drawn.pool or ()), propensity=None)
    with pytest.raises(BadInput, match=r"sum to 0\.5"):
        draws_of([replace(impression, items=(top, half))], rewards, other, position=2)
    with pytest.raises(BadInput, match="one draw"):
        draws_of([replace(impression, items=(top, replace(drawn, propensity=0.9)))], rewards, other, position=2)


def test_a_policy_without_overlap_has_no_snips_and_a_wrong_policy_is_refused() -> None:
    draws = Draws(weights=np.zeros(3), rewards=np.ones(3))
    with pytest.raises(BadInput, match="never chooses what was shown"):
        snips(draws, np.random.default_rng(0))
    assert ips(draws, np.random.default_rng(0)).value == 0
    with pytest.raises(ValueError, match="must give 4 probabilities that sum to 1"):
        draws_of(*logged(3, seed=1), lambda impression, item: [0.5, 0.1, 0.1, 0.1], position=2)
