"""Quotas of the sources: as configured, or learned within bounds."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.candidates.quotas import Quotas

NOW_MS, DAY_MS = 1_700_000_000_000, 86_400_000
CONFIGURED = {"covisited": 100, "nearest": 100, "trending": 150, "off": 0}


def watched(rates: dict[str, float], requests: int = 300, learn: bool = True) -> Quotas:
    """Each request shows ten items of each source; they are acted upon at these rates."""
    quotas, generator = Quotas(CONFIGURED, learn=learn), np.random.default_rng(0)
    for _ in range(requests):
        for name in [name for name in rates for _ in range(10)]:
            quotas.shown((name,), NOW_MS)
            if generator.random() < rates[name]:
                quotas.acted((name,), NOW_MS)
    return quotas


def test_quotas_follow_the_rates_within_bounds_and_keep_their_sum() -> None:
    current = watched({"covisited": 0.2, "nearest": 0.01, "trending": 0.1}).current(NOW_MS)
    assert sum(current.values()) in range(348, 353)
    assert current["covisited"] > 150 and current["nearest"] < 75
    assert (
        current["nearest"] / current["trending"] >= 0.5 * 100 / 150 / 2.0
    )  # never less than its bound against another's


def test_equal_rates_nothing_known_or_switched_off_leave_them_as_configured() -> None:
    wanted = {"covisited": 100, "nearest": 100, "trending": 150}
    assert Quotas(CONFIGURED, learn=True).current(NOW_MS) == wanted
    assert watched({"covisited": 0.5, "nearest": 0.0}, learn=False).current(NOW_MS) == wanted
    equal = Quotas(CONFIGURED, learn=True)
    for name in wanted:
        for _ in range(50):
            equal.shown((name,), NOW_MS)
            equal.acted((name,), NOW_MS)
    assert equal.current(NOW_MS) == wanted


def test_what_was_learned_is_forgotten_and_strangers_do_not_count() -> None:
    quotas = watched({"covisited": 0.2, "nearest": 0.01, "trending": 0.1})
    quotas.acted((), NOW_MS)
    quotas.acted(("unknown",), NOW_MS)
    later = quotas.current(NOW_MS + 60 * DAY_MS)
    assert later == {"covisited": 100, "nearest": 100, "trending": 150}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["covisited", "nearest", "trending"]), st.booleans()), max_size=400))
def test_no_history_takes_a_source_out_of_its_bounds(events: list[tuple[str, bool]]) -> None:
    quotas = Quotas(CONFIGURED, learn=True)
    for number, (name, acted) in enumerate(events):
        quotas.shown((name, "caller"), NOW_MS + number)
        if acted:
            quotas.acted((name, "caller"), NOW_MS + number)
    current = quotas.current(NOW_MS + len(events))
    assert abs(sum(current.values()) - 350) <= 2
    for name, quota in current.items():
        assert CONFIGURED[name] / 4 - 1 <= quota <= 4 * CONFIGURED[name] + 1
