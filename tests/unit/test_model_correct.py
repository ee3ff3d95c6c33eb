"""The fast correctors: exact where the formulas say what must come out, and following a drift."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from recsys.config import parse
from recsys.model.correct import HALF_LIFE, Calibrator, ErrorMemory
from recsys.model.layers import seeded
from recsys.model.ranker import Ranker, memory_keys
from recsys.training.delayed import Importance
from tests.unit.test_model_ranker import SPEC, inputs


def stream(examples: int, slope: float, bias: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-odds [M, 1] of a model, and labels drawn with slope * log-odds + bias."""
    generator = seeded(seed)
    log_odds = torch.randn(examples, 1, generator=generator) * 1.5 - 1
    labels = (torch.rand(examples, 1, generator=generator) < torch.sigmoid(slope * log_odds + bias)).float()
    return log_odds, labels


def test_a_new_calibrator_changes_nothing_and_finds_bias_and_slope() -> None:
    calibrator = Calibrator(1)
    log_odds, labels = stream(60_000, 0.6, -0.5, seed=1)
    assert torch.equal(calibrator(log_odds), log_odds)
    for x, y in zip(log_odds.split(256), labels.split(256), strict=True):
        calibrator.update(x, y, torch.ones_like(y))
    np.testing.assert_allclose(calibrator.coefficients[0].numpy(), [0.6, -0.5], atol=0.05)
    for x, y in zip(*(part.split(256) for part in stream(150_000, 1.3, 0.4, seed=2)), strict=True):
        calibrator.update(x, y, torch.ones_like(y))
    np.testing.assert_allclose(calibrator.coefficients[0].numpy(), [1.3, 0.4], atol=0.1)


def test_unknown_labels_and_one_odd_batch_do_not_move_the_calibrator_far() -> None:
    calibrator = Calibrator(2)
    log_odds, labels = torch.randn(64, 2, generator=seeded(1)), torch.ones(64, 2)
    weights = torch.ones(64, 2)
    weights[:, 1] = 0
    calibrator.update(log_odds, labels, weights)
    assert calibrator.coefficients[1].tolist() == [1.0, 0.0]
    before = calibrator.coefficients.clone()
    calibrator.update(torch.full((4, 2), torch.nan), torch.ones(4, 2), torch.ones(4, 2))
    assert torch.equal(calibrator.coefficients, before)
    for _ in range(200):
        calibrator.update(log_odds, (log_odds < 0).float(), torch.ones(64, 2))
    assert (calibrator.coefficients[:, 0] >= 0.25).all()


def memory(**options: float) -> ErrorMemory:
    settings = {"strength": 1.0, "shrink": 0.0} | options
    return ErrorMemory(5, 2, seed=1, shape=(3, 4), **settings)  # type: ignore[arg-type]


def keys(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, 5, generator=seeded(seed))


def test_an_empty_memory_or_one_without_strength_returns_the_prediction() -> None:
    p = torch.rand(6, 2, generator=seeded(2))
    assert torch.equal(memory()(keys(6), p), p)
    weak = memory(strength=0.0)
    weak.update(keys(6), p, torch.ones(6, 2), torch.ones(6, 2, dtype=torch.bool))
    assert torch.equal(weak(keys(6), p), p)


def test_with_own_and_full_strength_it_returns_the_mean_label_of_equal_keys() -> None:
    filled, key = memory(own=True), keys(1).expand(4, -1)
    labels = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0], [1.0, 0.0]])
    filled.update(key, torch.full((4, 2), 0.3), labels, torch.ones(4, 2, dtype=torch.bool))
    torch.testing.assert_close(filled(key[:1], torch.tensor([[0.9, 0.2]])), torch.tensor([[0.75, 0.25]]))


def test_it_adds_the_mean_error_of_each_array_shrunk_by_how_little_it_has_seen() -> None:
    filled, known, asked = memory(shrink=10.0, strength=0.5), keys(40, 3), keys(7, 4)
    generator = seeded(5)
    p = torch.rand(40, 2, generator=generator)
    labels = (torch.rand(40, 2, generator=generator) < 0.5).float()
    mask = torch.rand(40, 2, generator=generator) < 0.7
    filled.update(known, p, labels, mask)
    base = torch.full((7, 2), 0.5)
    buckets, mine = filled.buckets(known), filled.buckets(asked)
    for i in range(7):
        for t in range(2):
            corrections = []
            for k in range(3):
                same = (buckets[:, k] == mine[i, k]) & mask[:, t]
                corrections.append(float((labels - p)[same, t].sum()) / (float(same.sum()) + 10))
            expected = 0.5 + 0.5 * np.mean(corrections)
            assert filled(asked, base)[i, t].item() == pytest.approx(expected, abs=1e-6)


def test_what_came_as_negative_first_and_late_as_positive_leaves_no_error_behind() -> None:
    """fnw: every impression comes as negative, a share again as positive; a network that is right is not corrected."""
    tasks = [{"name": name, "types": [name], "labels": "fnw"} for name in ("click", "like")]
    importance = Importance(parse({"tasks": tasks}).tasks)
    model = Ranker(replace(SPEC, error_memory=1.0), seed=1)
    assert model.memory is not None
    hidden = model.scores(inputs(items=1, requests=1))[1].detach()
    p, labels = torch.full((1200, 2), 0.2), torch.cat([torch.zeros(1000, 2), torch.ones(200, 2)])
    model.observe(torch.logit(p), hidden.expand(-1, 1200, -1), labels, importance.weights(p, labels))
    torch.testing.assert_close(model.memory(memory_keys(hidden), p[:1]), p[:1])


def test_what_was_remembered_fades_with_what_came_since() -> None:
    filled = memory()
    every = torch.ones(8, 2, dtype=torch.bool)
    filled.update(keys(8), torch.zeros(8, 2), torch.ones(8, 2), every)
    once = filled.sums.clone()
    filled.update(keys(8), torch.zeros(8, 2), torch.ones(8, 2), torch.zeros_like(every))
    torch.testing.assert_close(filled.sums, once * 0.5 ** (8 / HALF_LIFE))


def test_equal_keys_share_their_buckets_whatever_their_length() -> None:
    filled = memory()
    assert torch.equal(filled.buckets(keys(5)), filled.buckets(3 * keys(5)))
    assert len(filled.buckets(keys(200)).unique(dim=0)) > 20
