"""Learning in compiled calls: torch's scores, statistics and gradients, in every configuration."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from recsys.config import Config, load, parse
from recsys.features.schema import Schema
from recsys.model import learn_kernels, loss_kernels, networks
from recsys.model.assemble import ranker_inputs
from recsys.model.learning import Learning
from recsys.model.plan import plan
from recsys.model.ranker import Ranker, RankerInputs, choices, label_losses
from recsys.training import dense
from recsys.training.delayed import Importance
from recsys.training.dense import DenseOptimizer
from recsys.training.learner import objective, warm_up
from tests.unit.test_model_scoring import RANDOM, ROOT, SHIPPED, asked, drawn, rows, trained


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    warm_up()


def compare(config: Config, rng: np.random.Generator, items: list[int], histories: list[int], learning: bool) -> None:
    """Of the same weights, rows and gradient by logits: what torch in float64 says, within 1e-5 of the largest of each kind."""
    schema, dim = Schema.of(config), config.model.dim
    ranker = trained(networks.ranker(config, schema), rng)
    ranker.number_norm.rows.fill_(5000)
    exact = copy.deepcopy(ranker).double().train(learning)
    DenseOptimizer(ranker, "adam", 0.001)
    lay = plan(schema, [asked(schema, rng, n, t) for n, t in zip(items, histories, strict=True)])
    deep, wide = rows(lay, schema, dim, rng)
    g = rng.standard_normal((sum(items), len(schema.tasks)), np.float32) / sum(items)

    step = Learning(schema, ranker)
    scored = step.scores(lay, deep, wide, learning)
    gdeep, gwide = step.gradients(scored, g, deep, wide)

    tensors = [torch.from_numpy(array.astype(np.float64)).requires_grad_() for array in (deep, wide)]
    inputs: Any = ranker_inputs(schema, lay, *tensors, dim)
    inputs = RankerInputs(**{n: v.double() if v.is_floating_point() else v for n, v in vars_of(inputs).items()})
    logits, hidden = exact.scores(inputs)
    (logits * torch.from_numpy(g)).sum().backward()
    near({"logits": scored.logits, "hidden": scored.hidden}, {"logits": logits, "hidden": hidden})
    near({"deep": gdeep, "wide": gwide}, {"deep": tensors[0].grad, "wide": tensors[1].grad})
    near(
        {name: p.grad for name, p in ranker.named_parameters()}, {name: p.grad for name, p in exact.named_parameters()}
    )
    for (name, mine), theirs in zip(ranker.named_buffers(), exact.buffers(), strict=True):
        near({name: mine}, {name: theirs})


def vars_of(inputs: RankerInputs) -> dict[str, Any]:
    return {name: getattr(inputs, name) for name in RankerInputs.__slots__}


def near(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Within 1e-5 of the largest value of each array, or of a tenth of the largest of all: what a norm takes out again has no gradient."""
    found = {name: np.asarray(a.detach() if isinstance(a, torch.Tensor) else a) for name, a in mine.items()}
    expected = {name: np.zeros_like(found[name]) if a is None else a.detach().numpy() for name, a in theirs.items()}
    largest = max(np.abs(a).max(initial=0) for a in expected.values())
    for name, array in expected.items():
        most = max(np.abs(array).max(initial=0), 0.1 * largest)
        np.testing.assert_allclose(found[name], array, rtol=0, atol=1e-5 * most, err_msg=name)


@pytest.mark.parametrize("seed", range(RANDOM))
def test_scores_and_gradients_are_torchs_in_random_configurations(seed: int) -> None:
    rng = np.random.default_rng(seed)
    config = drawn(rng)
    requests = int(rng.integers(1, 9))
    items = rng.integers(1, 12, requests).tolist()
    histories = (rng.integers(0, 51, requests) * (rng.random(requests) < 0.8)).tolist()
    compare(config, rng, items, histories, learning=bool(seed % 4))


POLICIES: list[dict[str, Any]] = [
    {"name": "seen", "types": ["view"], "loss_weight": 0.7, "prior": 0.5},
    {"name": "click", "types": ["click"], "after": "seen", "prior": 0.2},
    {"name": "buy", "types": ["buy"], "labels": "es_dfm", "wait_s": 1, "prior": 0.1},
    {"name": "like", "types": ["like"], "labels": "fnw", "after": "click", "prior": 0.01},
    {"name": "pick", "types": ["pick"], "loss": "softmax"},
]


@pytest.mark.parametrize("seed", range(12))
def test_losses_and_their_gradients_are_torchs_for_every_policy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    tasks = parse({"tasks": [task for task in POLICIES if seed % 4 or task["name"] != "pick"]}).tasks
    of, request = objective(tasks), np.repeat(np.arange(5), rng.integers(1, 7, 5))
    logits = rng.normal(0, 6, (len(request), len(tasks))).astype(np.float32)
    labels, mask = rng.random(logits.shape) < 0.4, rng.random(logits.shape) < 0.8
    odds, losses, weights, back = (np.empty_like(logits) for _ in range(4))
    loss_kernels.log_odds(of, logits, odds)
    loss_kernels.losses(of, odds, labels, mask, request, (losses, weights, back))
    loss_kernels.log_odds_back(of, logits, back)

    exact, y = torch.from_numpy(logits).double().requires_grad_(), torch.from_numpy(labels).double()
    names = [task.name for task in tasks]
    after = tuple(names.index(task.after) if task.after else -1 for task in tasks)
    their_odds = Ranker.log_odds(SimpleNamespace(spec=SimpleNamespace(after=after)), exact)  # type: ignore[arg-type]
    known, chosen = torch.from_numpy(mask), torch.tensor([task.loss == "softmax" for task in tasks])
    picked = -torch.where(known, y, 0.0) * choices(their_odds, torch.from_numpy(request))
    each = torch.where(chosen, picked, label_losses(their_odds, y, known))
    importance = Importance(tasks).weights(torch.sigmoid(their_odds), y)
    (each * importance).sum().backward()
    for mine, theirs in ((odds, their_odds), (losses, each), (weights, importance), (back, exact.grad)):
        np.testing.assert_allclose(mine, theirs.detach().numpy(), rtol=1e-4, atol=2e-5)  # type: ignore[union-attr]


def test_no_step_waits_for_a_compiler() -> None:
    """Every configuration calls the kernels with the types that they were warmed up with."""
    called = [
        f for module in (learn_kernels, loss_kernels, dense) for f in vars(module).values() if hasattr(f, "signatures")
    ]
    before = [list(kernel.signatures) for kernel in called]
    for seed in range(8):
        rng = np.random.default_rng(seed)
        compare(drawn(rng), rng, [3, 1], [7, 0], learning=True)
    test_losses_and_their_gradients_are_torchs_for_every_policy(1)
    assert len(before) > 20 and [list(kernel.signatures) for kernel in called] == before


@pytest.mark.parametrize("name", SHIPPED)
def test_scores_and_gradients_are_torchs_in_every_shipped_configuration(name: str) -> None:
    rng = np.random.default_rng(1)
    config = load(ROOT / "deploy" / "configs" / f"{name}.toml", {})
    most = Schema.of(config).history_len
    compare(config, rng, [10, 1, 30, 7], [most, 0, 3, most // 2], learning=True)
    compare(config, rng, [1], [0], learning=True)
