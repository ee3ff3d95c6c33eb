"""The month's own arithmetic: growth, expected AUC, and what counts as lost."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from load_tests.month import Judged, auc, growth
from load_tests.month_run import Ledger
from recsys.evaluation.measures import auc as plain_auc


def test_growth_is_that_of_the_last_third_and_one_reading_moves_it_little() -> None:
    steady = [50.0] * 5 + [100.0] * 25
    assert growth(steady) == pytest.approx(0.0)
    assert growth([float(day) for day in range(100, 130)]) == pytest.approx(10 / 124.5)
    steady[-5] = 130.0
    assert abs(growth(steady) or 0.0) < 0.02
    assert growth([1.0]) is None


def test_auc_of_labels_is_the_plain_one_and_of_probabilities_its_expectation() -> None:
    rng = np.random.default_rng(0)
    truth = rng.uniform(0.05, 0.6, 400)
    predictions = np.round(truth + rng.normal(0, 0.2, 400), 2)
    labels = rng.random(400) < truth
    assert auc(predictions, labels) == pytest.approx(plain_auc(predictions, labels))
    drawn = [auc(predictions, rng.random(400) < truth) for _ in range(400)]
    assert auc(predictions, truth) == pytest.approx(np.mean(drawn), abs=0.006)
    twice = np.concatenate([predictions, predictions[:100]]), np.concatenate([truth, truth[:100]])
    weight = np.where(np.arange(400) < 100, 2.0, 1.0)
    assert auc(predictions, truth, weight) == pytest.approx(auc(*twice))


def test_error_of_a_ratio_is_small_where_both_runs_predict_alike() -> None:
    rng = np.random.default_rng(1)
    truth = rng.uniform(0.05, 0.6, 2000).astype(np.float32)
    users = rng.integers(200, size=2000)

    def part(noise: float, size: int = 2000) -> dict[str, Any]:
        return {"prediction": truth[:size] + noise, "truth": truth[:size], "user": users[:size]}

    wobble = rng.normal(0, 0.1, 2000)
    assert Judged([part(wobble), part(wobble)]).ratio() == (1.0, 0.0)
    ratio, error = Judged([part(wobble), part(wobble + rng.normal(0, 0.1, 2000))]).ratio()
    assert ratio > 1.0 and 0.0 < error < 0.05


def test_label_that_was_not_trained_or_was_twice_is_lost() -> None:
    ledger = Ledger(("click", "like"))
    ledger.shown(20)
    ledger.accepted([{"type": "purchase", "request_id": "r"}, {"type": "click"}], [{"status": "accepted"}] * 2)
    assert ledger.lost == 41
    ledger.trained.update({"click": 20, "like": 20})
    ledger.trained_positive.update({"like": 1})
    assert ledger.lost == 0
    ledger.trained.update({"click": 3})
    assert ledger.lost == 3
