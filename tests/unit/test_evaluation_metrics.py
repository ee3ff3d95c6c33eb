"""Metrics against brute force and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.evaluation.bootstrap import Resamples, interval
from recsys.evaluation.measures import (
    NextItem,
    Progressive,
    auc,
    calibration,
    gauc,
    group_ids,
    log_loss,
    normalized_entropy,
)

examples = st.lists(
    st.tuples(st.sampled_from([0.1, 0.2, 0.5, 0.7, 0.9]), st.booleans(), st.integers(0, 3)), min_size=1, max_size=40
)


def pairwise_auc(scores: list[float], labels: list[bool]) -> float:
    """Every pair, as the definition says."""
    pairs = [
        (p > n) + 0.5 * (p == n)
        for p, y in zip(scores, labels, strict=True)
        if y
        for n, z in zip(scores, labels, strict=True)
        if not z
    ]
    return sum(pairs) / len(pairs) if pairs else math.nan


@given(examples)
@settings(max_examples=200, deadline=None)
def test_auc_and_gauc_equal_the_count_over_all_pairs(rows: list[tuple[float, bool, int]]) -> None:
    scores, labels, groups = (list(column) for column in zip(*rows, strict=True))
    assert auc(np.array(scores), np.array(labels)) == pytest.approx(pairwise_auc(scores, labels), nan_ok=True)
    total = weight = 0.0
    for group in set(groups):
        mine = [(s, y) for s, y, g in rows if g == group]
        area = pairwise_auc([s for s, _ in mine], [y for _, y in mine])
        if not math.isnan(area):
            total, weight = total + area * len(mine), weight + len(mine)
    expected = total / weight if weight else math.nan
    assert gauc(np.array(scores), np.array(labels), np.array(groups)) == pytest.approx(expected, nan_ok=True)


def test_auc_of_two_shifted_normals_is_the_closed_form() -> None:
    generator = np.random.default_rng(1)
    negative, positive = generator.normal(0, 1, 100_000), generator.normal(1, 1, 100_000)
    labels = np.repeat([False, True], 100_000)
    expected = 0.5 * (1 + math.erf(1 / math.sqrt(2) / math.sqrt(2)))  # Φ(1/√2)
    assert auc(np.concatenate([negative, positive]), labels) == pytest.approx(expected, abs=0.003)


def test_auc_sees_only_the_order() -> None:
    scores, labels = np.array([1e-300, 2e-300, 3e-300, 1e300]), np.array([0, 1, 0, 1])
    assert auc(scores, labels) == auc(np.arange(4), labels) == 0.75


def test_a_nan_prediction_is_refused() -> None:
    with pytest.raises(ValueError, match="1 NaN"):
        auc(np.array([0.5, math.nan]), np.array([0, 1]))


def test_log_loss_is_the_closed_form_and_finite_at_certainty() -> None:
    assert log_loss(np.array([0.25, 0.25]), np.array([1, 0])) == pytest.approx(-(math.log(0.25) + math.log(0.75)) / 2)
    assert log_loss(np.array([0.0, 1.0]), np.array([1, 0])) == pytest.approx(-math.log(1e-7), rel=1e-6)


def test_the_average_rate_has_normalised_entropy_and_calibration_of_one() -> None:
    labels = np.array([1, 0, 0, 1, 0])
    rate = np.full(5, 0.4)
    assert normalized_entropy(rate, labels) == pytest.approx(1.0)
    assert calibration(rate, labels) == pytest.approx(1.0)
    assert calibration(rate * 2, labels) == pytest.approx(2.0)
    assert normalized_entropy(np.array([0.9, 0.1, 0.1, 0.9, 0.1]), labels) == pytest.approx(
        math.log(0.9) / (0.4 * math.log(0.4) + 0.6 * math.log(0.6))
    )


def test_group_ids_tell_every_combination_apart() -> None:
    users, days = np.array([2**62, 5, 2**62, 5, -1]), np.array([0, 0, 1, 0, 0])
    assert group_ids(users, days).tolist() == [2, 1, 3, 1, 0]


def test_progressive_reports_what_the_functions_give_however_it_is_fed() -> None:
    generator = np.random.default_rng(0)
    num = 70_000  # more than a chunk
    p, users, days = generator.random(num), generator.integers(0, 50, num), generator.integers(0, 3, num)
    y = generator.random(num) < p
    progressive = Progressive(["click", "like"])
    cuts = [0, 1, 3, 65_536, 65_540, num]
    for a, b in zip(cuts, cuts[1:], strict=False):
        progressive.add("click", p[a:b], y[a:b], users[a:b], days[a:b])
    report = progressive.report()["tasks"]
    intervals = {name: report["click"].pop(name) for name in list(report["click"]) if name.endswith("_ci")}
    assert [day["day"] for day in progressive.report()["days"]] == [0, 1, 2]
    for name, (low, high) in intervals.items():
        assert low < report["click"][name.removesuffix("_ci")] < high
    assert report["click"] == {
        "examples": num,
        "auc": auc(p, y),
        "normalized_entropy": normalized_entropy(p, y),
        "gauc": gauc(p, y, users * 3 + days),
        "calibration": pytest.approx(calibration(p, y)),
    }
    nothing = {"examples": 0, "auc": None, "normalized_entropy": None, "gauc": None, "calibration": None}
    assert report["like"] == nothing


def test_next_item_counts_hits_and_reciprocal_ranks_among_the_first_twenty() -> None:
    counter = NextItem()
    nothing = {"hit_rate_at_20": None, "mrr_at_20": None, "candidate_recall_at_300": None, "candidates": None}
    assert counter.report() == {"predictions": 0, **nothing}
    shown = [str(i) for i in range(30)]
    for clicked, place in (("0", 0), ("3", 299), ("19", 300), ("20", 5), ("none", 1000)):
        counter.add(shown, clicked, 7, np.arange(400) == place)
    report = counter.report()
    unknown = dict.fromkeys(
        ("candidate_recall_at_300_ci", "hit_rate_at_20_ci", "mrr_at_20_ci")
    )  # one user tells nothing
    assert report == unknown | {
        "predictions": 5,
        "hit_rate_at_20": 3 / 5,
        "mrr_at_20": pytest.approx((1 + 1 / 4 + 1 / 20) / 5),
        "candidate_recall_at_300": 3 / 5,
        "candidates": 300,
    }


def test_a_resample_counts_each_example_as_often_as_its_user_was_drawn() -> None:
    generator = np.random.default_rng(1)
    users, p = generator.integers(0, 20, 300), np.round(generator.random(300), 1)
    y = generator.random(300) < p
    drawn = Resamples(users)
    areas, sums = drawn.auc(p, y), drawn.sums(p)
    for index in (0, 57):
        times = drawn.weights[index][drawn.of]
        assert areas[index] == pytest.approx(auc(np.repeat(p, times), np.repeat(y, times)))
        assert sums[index] == pytest.approx(np.repeat(p, times).sum())
    assert drawn.weights.sum(1).tolist() == [20] * len(drawn.weights)


def test_an_interval_of_a_mean_has_the_width_that_the_central_limit_gives() -> None:
    values = np.random.default_rng(2).standard_normal(2000)
    drawn = Resamples(np.arange(2000))
    found = interval(drawn.sums(values) / 2000)
    assert found is not None
    assert found[1] - found[0] == pytest.approx(2 * 1.96 * values.std() / np.sqrt(2000), rel=0.2)
    assert interval(np.array([np.nan, np.nan, 1.0])) is None
