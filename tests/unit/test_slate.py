"""The slate: best first, one drawn position with exact probabilities."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from recsys.ranking.slate import Draw, draw_probabilities, fill

NONE = Draw(position=0, pool=5, temperature=0.5, floor=0.01)
THIRD = Draw(position=3, pool=5, temperature=0.5, floor=0.01)


def test_without_a_draw_the_best_come_first_and_ties_by_index() -> None:
    choices = fill(np.array([1.0, 3.0, 3.0, 2.0]), 3, "r", NONE)
    assert [c.candidate for c in choices] == [1, 2, 3]
    assert {c.propensity for c in choices} == {1.0}


@given(st.lists(st.floats(-5, 5), min_size=0, max_size=30), st.integers(1, 12), st.text(max_size=8))
def test_a_slate_has_distinct_items_and_a_consistent_pool(scores: list[float], n: int, request_id: str) -> None:
    choices = fill(np.array(scores), n, request_id, THIRD)
    assert len({c.candidate for c in choices}) == len(choices) == min(n, len(scores))
    assert choices == fill(np.array(scores), n, request_id, THIRD)
    for position, choice in enumerate(choices, start=1):
        if choice.pool is None:
            assert choice.propensity == 1.0
            continue
        assert position == 3
        pool = dict(choice.pool)
        assert pool[choice.candidate] == choice.propensity
        assert abs(sum(pool.values()) - 1.0) < 1e-9
        assert min(pool.values()) >= THIRD.floor - 1e-12
        assert not set(pool) & {c.candidate for c in choices[:2]}


def test_simulated_frequencies_match_the_logged_probabilities() -> None:
    """Chi-square over 4,000 draws at 4 degrees of freedom: above 23.5 happens once in 10,000 runs; the seeds are fixed."""
    scores = np.array([0.9, 0.8, 0.5, 0.4, 0.1, 0.0, -0.4, -2.0])
    counts = np.zeros(len(scores))
    for number in range(4000):
        counts[fill(scores, 3, f"request-{number}", THIRD)[2].candidate] += 1
    expected = 4000 * draw_probabilities(scores[2:7], THIRD)
    assert counts[[0, 1, 7]].sum() == 0
    assert ((counts[2:7] - expected) ** 2 / expected).sum() < 23.5
