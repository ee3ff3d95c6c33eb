"""The search for the knee finds it, ends, and counts what failed as late."""

from __future__ import annotations

import asyncio
import math

import pytest

from load_tests.client import Sample
from load_tests.knee import APART, FIRST, MOST, p99_ms, search


def sought(knee: float, tries: int = 1000) -> tuple[float, float, list[float]]:
    tried: list[float] = []

    async def holds(rate: float) -> bool:
        tried.append(rate)
        return rate <= knee

    low, high = asyncio.run(search(holds, lambda: len(tried) < tries))
    return low, high, tried


@pytest.mark.parametrize("knee", [1.0, 9.0, 19.4, 61.0, 100.0, 700.0])
def test_knee_is_found_within_a_twentieth_in_few_tries(knee: float) -> None:
    low, high, tried = sought(knee)
    assert low <= knee < high <= APART * low
    assert len(tried) <= 14 and tried[:1] == [FIRST]


def test_what_nothing_holds_and_what_all_hold_ends() -> None:
    low, high, tried = sought(0.0)
    assert low == 0.0 and high <= FIRST and len(tried) < 20
    assert sought(math.inf)[:2] == (MOST, math.inf)


def test_search_ends_when_its_time_does() -> None:
    low, high, tried = sought(61.0, tries=4)
    assert (low, high, len(tried)) == (40.0, 80.0, 4)


def test_a_failed_request_took_for_ever_and_the_lead_does_not_count() -> None:
    def sample(due: float, ms: float, ok: bool = True) -> Sample:
        return Sample(due_s=due, late_s=0.0, latency_s=ms / 1000, ok=ok)

    calm = [sample(2 + n / 10, 20.0) for n in range(100)]
    assert p99_ms([sample(1.0, 900.0), *calm]) == 20.0
    assert p99_ms(calm + [sample(2 + n, 5.0, ok=False) for n in range(10)]) == math.inf
    assert p99_ms([]) == math.inf
