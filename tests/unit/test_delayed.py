"""Importance weights: with true helper values, the expected gradient vanishes at the true probability."""

import pytest
import torch

from recsys.config import parse
from recsys.model.ranker import losses
from recsys.training.delayed import Importance

Rows = list[tuple[float, float]]


def gradient(policy: str, probabilities: list[float], rows: Rows) -> float:
    """Of the expected loss in the first task's logit, over observed rows (share, label), given the predictions of all tasks."""
    wait = {"wait_s": 5} if policy == "es_dfm" else {}
    task = {"name": "buy", "types": ["buy"], "window_s": 60, "labels": policy, **wait}
    importance = Importance(parse({"tasks": [task]}).tasks)
    p = torch.tensor(probabilities, dtype=torch.float64).expand(len(rows), -1)
    logits = torch.logit(p).requires_grad_()
    share, label = (torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True))
    labels = torch.zeros_like(p)
    labels[:, 0] = label
    mask = torch.zeros_like(p, dtype=torch.bool)
    mask[:, 0] = True
    weights = importance.weights(torch.sigmoid(logits), labels).double() * share.unsqueeze(1)
    losses(logits, labels, mask, weights)[0].backward()
    assert logits.grad is not None
    return float(logits.grad[:, 0].sum())


@pytest.mark.parametrize("p", [0.01, 0.1, 0.3, 0.6])
def test_fnw_is_right_at_the_true_probability(p: float) -> None:
    """Every impression comes as negative, a share p again as positive."""
    rows = [(1.0, 0.0), (p, 1.0)]
    assert gradient("fnw", [p], rows) == pytest.approx(0, abs=1e-7)
    assert gradient("window", [p / (1 + p)], rows) == pytest.approx(0, abs=1e-7)  # without weights: too low
    assert gradient("fnw", [1.2 * p], rows) > 1e-4 and gradient("fnw", [0.8 * p], rows) < -1e-4


@pytest.mark.parametrize(("p", "late"), [(0.02, 0.006), (0.1, 0.05), (0.4, 0.32)])
def test_es_dfm_is_right_at_the_true_probability(p: float, late: float) -> None:
    """Positives within the wait, the rest as negative, and late positives again."""
    rows = [(p - late, 1.0), (1 - p + late, 0.0), (late, 1.0)]
    never = (1 - p) / (1 - p + late)
    assert gradient("es_dfm", [p, late, never], rows) == pytest.approx(0, abs=1e-7)
    assert gradient("es_dfm", [1.2 * p, late, never], rows) > 1e-4


def test_without_delay_es_dfm_is_plain_log_loss() -> None:
    importance = Importance(parse({"tasks": [{"name": "b", "types": ["b"], "labels": "es_dfm", "wait_s": 5}]}).tasks)
    weights = importance.weights(torch.tensor([[0.3, 0.0, 1.0]] * 2), torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]))
    assert weights.tolist() == [[1.0] * 3] * 2


def test_a_tasks_weight_in_the_loss_multiplies() -> None:
    tasks = [{"name": "a", "types": ["a"], "loss_weight": 0.5, "labels": "fnw"}, {"name": "b", "types": ["b"]}]
    weights = Importance(parse({"tasks": tasks}).tasks).weights(torch.tensor([[0.2, 0.9]]), torch.tensor([[1.0, 1.0]]))
    assert weights[0].tolist() == pytest.approx([0.6, 1.0])
