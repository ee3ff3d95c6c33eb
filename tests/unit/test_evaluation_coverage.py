"""Intervals hold the truth as often as they say, in worlds whose truth is known: `load_tests.off_policy`, small."""

from __future__ import annotations

import json
from math import isfinite

import pytest

from load_tests.common import RESULTS, read_budgets
from load_tests.off_policy import BIASED, BOUNDED, UNBIASED, coverage, worlds

RUNS = 80


@pytest.mark.parametrize("name", ["drawn", "uniform", "cascade"])
def test_intervals_of_unbiased_estimators_hold_the_truth_at_the_stated_rate(name: str) -> None:
    world = worlds(seed=1, num=1000)[name]
    found = coverage(world.draw, world.truth, RUNS, seed=1, resamples=200)
    for estimator in set(found) & set(UNBIASED):
        result = found[estimator]
        assert result.bootstrap * RUNS >= 67, estimator  # 76 expected; fewer than 67 has a chance of 3 in 10,000
        assert abs(result.bias) < 4.5 * result.error, estimator
        if estimator in BOUNDED:
            assert result.bernstein is not None and result.bernstein * RUNS >= 76, estimator
            assert result.width_ratio is not None and 1.5 < result.width_ratio < 20, estimator
    for estimator in set(found) & set(BIASED):
        assert abs(found[estimator].bias) > 4.5 * found[estimator].error, estimator


def test_every_estimator_is_in_the_committed_result_with_a_coverage() -> None:
    rows = {row["name"]: row for row in json.loads((RESULTS / "off_policy.json").read_text())["results"]}
    assert set(read_budgets()["off_policy"]) <= set(rows)
    for estimator in (*UNBIASED, *BIASED):
        assert 0 <= rows[f"bootstrap_coverage_{estimator}"]["value"] <= 1
        assert isfinite(rows[f"bias_{estimator}"]["value"])
