"""The slate: best first, exact probabilities, and rules that no draw breaks."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.config import SlateConfig
from recsys.ranking.slate import Choice, Rules, draw_probabilities, fill
from recsys.ranking.variety import Cap, Coverage, Dpp, Likeness, Mmr, Values

NONE = SlateConfig(draw_positions=())
THIRD = SlateConfig(draw_positions=(3,), draw_pool=5, draw_floor=0.01)
KINDS = ("softmax", "epsilon", "squarecb")

scores = st.lists(st.floats(-5, 5), min_size=0, max_size=30)
draws = st.builds(
    SlateConfig,
    draw_kind=st.sampled_from(KINDS),
    draw_positions=st.one_of(st.just("all"), st.lists(st.integers(1, 12), max_size=4).map(tuple)),
    draw_pool=st.integers(2, 50),
    draw_floor=st.sampled_from((1e-6, 0.005, 0.0199)),
    draw_temperature=st.sampled_from((0.1, 0.5, 3.0)),
    draw_epsilon=st.floats(0, 1),
    draw_gamma=st.sampled_from((0.0, 10.0, 1000.0)),
)


def test_without_a_draw_the_best_come_first_and_ties_by_index() -> None:
    choices = fill(np.array([1.0, 3.0, 3.0, 2.0]), 3, "r", NONE)
    assert [c.candidate for c in choices] == [1, 2, 3]
    assert {c.propensity for c in choices} == {1.0}


def check_pools(choices: list[Choice], config: SlateConfig) -> None:
    """Drawn where it was asked for; each pool sums to 1, is no less than its floor and holds what is not above."""
    assert len({c.candidate for c in choices}) == len(choices)
    for position, choice in enumerate(choices, start=1):
        if choice.pool is None:
            assert choice.propensity == 1.0
            continue
        assert config.draw_positions == "all" or position in config.draw_positions
        pool = dict(choice.pool)
        assert len(pool) <= config.draw_pool
        assert pool[choice.candidate] == choice.propensity
        assert abs(sum(pool.values()) - 1.0) < 1e-9
        assert min(pool.values()) >= config.draw_floor - 1e-12
        assert not set(pool) & {c.candidate for c in choices[: position - 1]}


@settings(deadline=None)
@given(scores, st.integers(1, 12), st.text(max_size=8), draws)
def test_a_slate_has_distinct_items_and_consistent_pools(
    scores: list[float], n: int, request_id: str, config: SlateConfig
) -> None:
    choices = fill(np.array(scores), n, request_id, config)
    assert len(choices) == min(n, len(scores))
    assert choices == fill(np.array(scores), n, request_id, config)
    check_pools(choices, config)
    if config.draw_positions == "all":
        assert all(choice.pool for choice in choices)


@pytest.mark.parametrize("kind", KINDS)
def test_simulated_frequencies_match_the_logged_probabilities(kind: Any) -> None:
    """Chi-square over 4,000 draws at 4 degrees of freedom: above 23.5 happens once in 10,000 runs; the seeds are fixed."""
    config = THIRD.model_copy(update={"draw_kind": kind, "draw_epsilon": 0.4, "draw_gamma": 3.0})
    scores = np.array([0.9, 0.8, 0.5, 0.4, 0.1, 0.0, -0.4, -2.0])
    counts = np.zeros(len(scores))
    for number in range(4000):
        counts[fill(scores, 3, f"request-{number}", config)[2].candidate] += 1
    expected = 4000 * draw_probabilities(scores[2:7], config)
    assert counts[[0, 1, 7]].sum() == 0
    assert ((counts[2:7] - expected) ** 2 / expected).sum() < 23.5


def test_whole_drawn_slates_come_as_often_as_their_propensities_say() -> None:
    """All 24 orders of four items; chi-square at 23 degrees of freedom: above 58.6 happens once in 17,000 runs; the seeds are fixed."""
    config = SlateConfig(draw_positions="all", draw_pool=4, draw_temperature=1.0, draw_floor=0.01)
    worth, runs = np.array([0.7, 0.4, 0.0, -0.3]), 6000
    counts: Counter[tuple[int, ...]] = Counter()
    chances: dict[tuple[int, ...], float] = {}
    for number in range(runs):
        choices = fill(worth, 4, f"request-{number}", config)
        order = tuple(c.candidate for c in choices)
        counts[order] += 1
        chances[order] = float(np.prod([c.propensity for c in choices]))
    assert sum(chances.values()) == pytest.approx(1.0)
    assert sum((counts[order] - runs * p) ** 2 / (runs * p) for order, p in chances.items()) < 58.6


def test_squarecb_is_the_inverse_gap_weighting() -> None:
    config = SlateConfig(draw_kind="squarecb", draw_gamma=50.0, draw_floor=1e-6)
    p = draw_probabilities(np.log([0.3, 0.2, 0.1]), config)
    np.testing.assert_allclose(p[1:], [1 / (3 + 50 * 0.1), 1 / (3 + 50 * 0.2)], atol=2e-6)
    assert p.sum() == pytest.approx(1.0)


def values(rows: list[list[int]], num: int = 6) -> Values:
    """Distinct values of each item, padded as the catalogue's columns are."""
    codes = np.full((len(rows), 3), num, np.int32)
    for row, own in enumerate(rows):
        codes[row, : len(set(own))] = sorted(set(own))
    return Values(codes, num)


attributes = st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=14)


@st.composite
def worlds(draw: Any) -> dict[str, Any]:
    rows = draw(attributes)
    pinned = draw(st.permutations(range(len(rows))))[: draw(st.integers(0, 3))]
    places = draw(st.permutations(range(1, 9)))
    return {
        "rows": rows,
        "worth": np.array([draw(st.floats(-3, 3)) for _ in rows]),
        "pins": dict(zip(places, pinned, strict=False)),
        "most": draw(st.integers(1, 3)),
        "window": draw(st.integers(0, 5)),
        "mmr": draw(st.booleans()),
    }


@settings(max_examples=300, deadline=None)
@given(worlds(), st.integers(1, 10), draws, st.text(max_size=4))
def test_no_rule_is_broken_by_exploring(world: dict[str, Any], n: int, config: SlateConfig, request_id: str) -> None:
    rows, pins, most, window = world["rows"], world["pins"], world["most"], world["window"]
    tags = values(rows)

    def slate() -> list[Choice]:
        likeness = Likeness([tags])
        term = Mmr(likeness, 1.0) if world["mmr"] else Dpp(likeness, 1.0)
        rules = Rules(pins=pins, limits=[Cap(tags, most, window, pins)], terms=[term, Coverage(tags, 0.5)])
        return fill(world["worth"], n, request_id, config, rules)

    choices = slate()
    assert choices == slate()
    check_pools(choices, config)
    shown = [c.candidate for c in choices]
    for start in range(len(shown)):
        part = shown[start : start + window] if window else shown
        counts = Counter(value for candidate in part for value in set(rows[candidate]))
        assert max(counts.values(), default=0) <= most
    pin_counts = Counter(value for candidate in pins.values() for value in set(rows[candidate]))
    for position, candidate in pins.items():
        if position <= len(shown) and max(pin_counts.values(), default=0) <= most:
            assert shown[position - 1] == candidate, "a pin that no cap forbids is at its place"
            assert choices[position - 1].propensity == 1.0
    for position, choice in enumerate(choices, start=1):
        reserved = {c for at, c in pins.items() if at > position}
        assert not {c for c, _ in choice.pool or ()} & reserved


def cosine(rows: list[list[int]], num: int = 6) -> np.ndarray[Any, np.dtype[np.float64]]:
    sets = np.array([[value in own for value in range(num)] for own in rows], np.float64)
    norms = np.maximum(np.linalg.norm(sets, axis=1), 1e-300)
    likeness: np.ndarray[Any, np.dtype[np.float64]] = sets @ sets.T / norms[:, None] / norms
    return likeness


def greedy(worth: Any, objective: Any, n: int) -> list[int]:
    """The naive oracle: at each position the candidate with the largest objective, nearly equal ones by index."""
    chosen: list[int] = []
    while len(chosen) < min(n, len(worth)):
        rest = [i for i in range(len(worth)) if i not in chosen]
        gains = [objective([*chosen, i]) for i in rest]
        chosen.append(next(i for i, gain in zip(rest, gains, strict=True) if gain >= max(gains) - 1e-9))
    return chosen


distinct = st.lists(st.integers(-300, 300), min_size=14, max_size=14, unique=True).map(lambda w: np.array(w) / 100)


@settings(deadline=None)
@given(attributes, distinct, st.sampled_from((0.3, 1.0, 2.5)))
def test_mmr_is_the_naive_greedy_one(rows: list[list[int]], worth: Any, weight: float) -> None:
    worth, like = worth[: len(rows)], cosine(rows)

    def marginal(slate: list[int]) -> float:
        *above, last = slate
        return float(worth[last] - weight * max((like[last, i] for i in above), default=0.0))

    found = fill(worth, 6, "r", NONE, Rules(terms=[Mmr(Likeness([values(rows)]), weight)]))
    assert [marginal([c.candidate for c in found[:k]]) for k in range(1, len(found) + 1)] == pytest.approx(
        [marginal(greedy(worth, marginal, 6)[:k]) for k in range(1, len(found) + 1)]
    )


@settings(deadline=None)
@given(attributes, distinct, st.sampled_from((0.3, 1.0, 2.5)))
def test_dpp_is_the_naive_greedy_one(rows: list[list[int]], worth: Any, weight: float) -> None:
    """By whole log determinants in float64, where what an item adds to the volume is at least a millionth."""
    worth, like = worth[: len(rows)], cosine(rows)
    np.fill_diagonal(like, 1.0)
    quality = np.exp(worth / weight / 2)
    kernel = quality[:, None] * like * quality

    def log_volume(slate: list[int]) -> float:
        sign, log = np.linalg.slogdet(kernel[np.ix_(slate, slate)])
        return float(log) if sign > 0 else -np.inf

    def gain(slate: list[int]) -> float:
        least = worth[slate[-1]] / weight + np.log(1e-6)
        return max(log_volume(slate) - log_volume(slate[:-1]), float(least))

    found = [c.candidate for c in fill(worth, 5, "r", NONE, Rules(terms=[Dpp(Likeness([values(rows)]), weight)]))]
    for k in range(len(found)):
        above = found[:k]
        if np.linalg.det(like[np.ix_(above, above)]) < 1e-5:
            break  # an item above was spanned by those above it: what is left is rounding
        gains = {i: gain([*above, i]) for i in range(len(rows)) if i not in above}
        assert gains[found[k]] == pytest.approx(max(gains.values()), abs=1e-6)


@settings(deadline=None)
@given(attributes, distinct, st.permutations(range(14)))
def test_coverage_adds_what_the_naive_function_gains_and_its_gains_diminish(
    rows: list[list[int]], worth: Any, order: list[int]
) -> None:
    def naive(slate: list[int]) -> float:
        shares = Counter[int]()
        for i in slate:
            for value in set(rows[i]):
                shares[value] += 1 / len(set(rows[i]))  # type: ignore[assignment]
        return 0.7 * sum(np.log1p(share) for share in shares.values())

    coverage, slate = Coverage(values(rows), 0.7), list[int]()
    for candidate in [i for i in order if i < len(rows)]:
        before = coverage.values.copy()
        gains = [naive([*slate, i]) - naive(slate) for i in range(len(rows))]
        np.testing.assert_allclose(coverage.values, gains, atol=1e-12)
        coverage.add(candidate)
        slate.append(candidate)
        assert (coverage.values <= before + 1e-12).all()
