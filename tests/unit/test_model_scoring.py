"""Scoring in compiled calls, and in NumPy while they are compiled: what torch says of the same request, in every configuration."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

from recsys.config import Config, load, parse
from recsys.features.build import Features, UserFeatures
from recsys.features.schema import Schema
from recsys.model import gather, networks, score_kernels, scoring
from recsys.model.assemble import ranker_inputs, wide_sums
from recsys.model.plan import Plan, plan
from recsys.model.ranker import Ranker, to_bytes
from recsys.model.scoring import Scoring, scores_of, warm_up
from recsys.model.specs import TwoTowerSpec
from recsys.model.tower_scoring import Towers
from recsys.model.two_tower import TwoTower

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ("default", "kuairand", "globo", "globo_bandit", "movielens")
RANDOM = 24
TASKS: tuple[list[dict[str, Any]], ...] = (
    [{"name": "click", "types": ["click"]}],
    [{"name": "click", "types": ["click"]}, {"name": "like", "types": ["like"], "after": "click", "prior": 0.01}],
    [
        {"name": name, "types": [name], "group": group}
        for name, group in (("a", "x"), ("b", "y"), ("c", "z"), ("d", "x"))
    ],
)


def drawn(rng: np.random.Generator) -> Config:
    """A configuration of any of the network's parts."""

    def one(*values: Any) -> Any:
        return values[int(rng.integers(len(values)))]

    tasks = one(*TASKS)
    hidden = [int(n) for n in rng.integers(2, 20, one(1, 2, 3))]
    model = {
        "dim": int(rng.integers(4, 17)),
        "attention": one([], [8], [32, 16], [12, 9, 5]),
        "attention_activation": one("dice", "prelu"),
        "attention_softmax": one(True, False),
        "input_width": one(0, 24),
        "experts": one(1, 2, 3),
        "expert_hidden": hidden,
        "tower_hidden": one([], [16], [8, 4]),
        "feature_gate_rank": one(1, 16),
        "home_without": one([], ["norm"], ["hierarchy"], ["feature_gate", "self_gate"], ["norm", "hierarchy"]),
        "calibrate": one(True, False),
        "error_memory": one(0.0, 0.5),
    }
    sequences = one({}, {"all": ["click", "like", "purchase"], "some": ["like"]})
    features: Mapping[str, Any] = {"history_len": 50, "time_gaps": one(True, False)} | (
        {"sequences": sequences} if sequences else {}
    )
    return parse({"model": model, "tasks": tasks, "features": features})


def trained(ranker: Ranker, rng: np.random.Generator) -> Ranker:
    """Weights and statistics as after some training: nothing is zero."""
    with torch.no_grad():
        for name, value in ranker.state_dict().items():
            noise = torch.from_numpy(rng.standard_normal(value.shape)).to(value.dtype)
            if name.endswith("var"):
                value.copy_(noise.abs() + 0.3)
            elif "memory" in name or "calibrator" in name:
                value.add_(0.1 * noise.abs())
            elif value.is_floating_point():
                value.add_(0.2 * noise)
    return ranker.eval()


def asked(schema: Schema, rng: np.random.Generator, items: int, history: int) -> Features:
    """A request with columns that are there and such that are not."""

    def block(slots: Any, *shape: int) -> tuple[Any, Any]:
        keys = rng.integers(0, 300, (*shape, len(slots)))
        return keys, rng.random(keys.shape) < 0.8

    shared, past, item, crosses = (
        block(schema.shared_slots),
        block(schema.history_slots, history),
        block(schema.item_slots, items),
        block(schema.cross_slots, items),
    )
    user = UserFeatures(
        shared_keys=shared[0],
        shared_mask=shared[1],
        history_keys=past[0],
        history_mask=past[1],
        history_kinds=rng.integers(0, 1 << len(schema.sequences), history).astype(np.uint8),
        history_gaps=rng.integers(0, 4, history).astype(np.uint8),
    )
    numbers = 3 * rng.standard_normal((items, len(schema.numbers)), np.float32)
    return Features(
        user=user, item_keys=item[0], item_mask=item[1], cross_keys=crosses[0], cross_mask=crosses[1], numbers=numbers
    )


def rows(lay: Plan, schema: Schema, dim: int, rng: np.random.Generator) -> tuple[Any, Any]:
    tasks = len(schema.tasks)
    deep, wide = (
        rng.standard_normal((n, w), np.float32)
        for n, w in ((len(lay.deep.keys), dim + tasks), (len(lay.wide.keys), tasks))
    )
    return 0.5 * deep, 0.5 * wide


@contextlib.contextmanager
def by_numpy() -> Iterator[None]:
    """As before the kernels are compiled."""
    scoring.compiled.clear()
    try:
        yield
    finally:
        scoring.compiled.set()


def compare(config: Config, rng: np.random.Generator, items: int, history: int) -> None:
    schema = Schema.of(config)
    dim, ranker = config.model.dim, trained(networks.ranker(config, schema), rng)
    lay = plan(schema, [asked(schema, rng, items, history)])
    deep, wide = rows(lay, schema, dim, rng)
    scores = scores_of(config, schema, networks.arrays(ranker))
    assert isinstance(scores, Scoring)
    tensors = torch.from_numpy(deep), torch.from_numpy(wide)
    with torch.inference_mode():
        sums = wide_sums(schema, lay, *tensors, dim)
        light = ranker.probabilities(ranker.wide_logits(torch.from_numpy(lay.numbers), sums)).numpy()
        expected = ranker.predict(ranker_inputs(schema, lay, *tensors, dim)).numpy()
    some = np.sort(rng.permutation(items)[: max(1, items // 2)])
    for way in (contextlib.nullcontext(), by_numpy()):
        with way:
            logits = scores.light(lay, deep, wide)
            np.testing.assert_allclose(scores.probabilities(logits), light, atol=1e-5)
            for kept in (np.arange(items), some):
                found = scores.predict(lay.keep(kept), deep, logits[kept])
                assert found.dtype == np.float32
                np.testing.assert_allclose(found, expected[kept], atol=1e-5)


@pytest.fixture(autouse=True, scope="module")
def kernels() -> None:
    warm_up()


@pytest.mark.parametrize("seed", range(RANDOM))
def test_any_network_says_what_torch_says(seed: int) -> None:
    rng = np.random.default_rng(seed)
    config = drawn(rng)
    for items, history in ((1, 0), (63, 1), (130, 9), (70, 50)):
        compare(config, rng, items, history)


@pytest.mark.parametrize("seed", range(6))
def test_requests_laid_out_together_are_scored_as_each_alone(seed: int) -> None:
    rng = np.random.default_rng(seed)
    config = drawn(rng)
    schema = Schema.of(config)
    dim, ranker = config.model.dim, trained(networks.ranker(config, schema), rng)
    lay = plan(schema, [asked(schema, rng, *shape) for shape in ((3, 4), (1, 0), (70, 9), (0, 2), (2, 1))])
    deep, wide = rows(lay, schema, dim, rng)
    scores = scores_of(config, schema, networks.arrays(ranker))
    with torch.inference_mode():
        inputs = ranker_inputs(schema, lay, torch.from_numpy(deep), torch.from_numpy(wide), dim)
        expected = ranker.predict(inputs).numpy()
    np.testing.assert_allclose(scores.predict(lay, deep, scores.light(lay, deep, wide)), expected, atol=1e-5)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_networks_say_what_torch_says(name: str) -> None:
    config, rng = load(ROOT / "deploy" / "configs" / f"{name}.toml"), np.random.default_rng(0)
    for history in (0, 1, config.features.history_len):
        compare(config, rng, 200, history)


def test_no_request_waits_for_a_compiler() -> None:
    """Every configuration calls the kernels with the types that they were warmed up with, whether its weights are learned here or were
    sent."""
    called = (score_kernels.attend, score_kernels.compose, score_kernels.head, gather.sum_columns, gather.take_fields)
    before = [list(kernel.signatures) for kernel in called]
    for seed in range(6):
        rng = np.random.default_rng(seed)
        compare(drawn(rng), rng, 70, 9)
        config = drawn(np.random.default_rng(seed))
        schema = Schema.of(config)
        lay = plan(schema, [asked(schema, rng, 70, 9)])
        deep, wide = rows(lay, schema, config.model.dim, rng)
        sent = safetensors.numpy.load(to_bytes(networks.ranker(config, schema)))
        scores = scores_of(config, schema, scoring.checked(config, schema, sent))
        scores.predict(lay, deep, scores.light(lay, deep, wide))
    compare(load(ROOT / "deploy" / "configs" / "default.toml"), np.random.default_rng(0), 200, 0)
    assert [list(kernel.signatures) for kernel in called] == before and len(before[0]) == 1


@pytest.mark.parametrize("interests", [1, 3])
def test_vectors_of_users_and_items_are_those_of_torch(interests: int) -> None:
    spec = TwoTowerSpec(num_shared=2, num_item=4, num_history=3, dim=4, tower_dim=6, interests=interests)
    towers = TwoTower(spec, seed=1).eval()
    shared, history, items = torch.randn(5, 2, 4), torch.randn(5, 7, 3, 4), torch.randn(9, 4, 4)
    present = torch.rand(5, 7) < torch.linspace(0, 1, 5)[:, None]  # from none to all of them
    history = history * present[..., None, None]
    with torch.inference_mode():
        users, expected = towers.user_vectors(shared, history, present).numpy(), towers.item_vectors(items).numpy()
    ours = Towers(spec, networks.arrays(towers))
    found = ours.user_vectors(shared.flatten(1).numpy(), history.flatten(2).numpy(), present.numpy())
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, users, atol=1e-5)
    np.testing.assert_allclose(ours.item_vectors(items.flatten(1).numpy()), expected, atol=1e-5)


def test_what_a_trainer_learns_here_is_scored_as_it_is_now() -> None:
    config, rng = parse({"model": {"dim": 4, "calibrate": True}}), np.random.default_rng(0)
    schema = Schema.of(config)
    ranker = networks.ranker(config, schema).eval()
    learned = networks.arrays(ranker)
    trained(ranker, rng)
    for name, value in ranker.state_dict().items():
        np.testing.assert_array_equal(learned[name], value.numpy())


def test_a_history_that_is_too_long_is_refused_as_torch_refuses_it() -> None:
    config = parse({"features": {"history_len": 5}, "model": {"dim": 4}})
    schema, rng = Schema.of(config), np.random.default_rng(0)
    lay = plan(schema, [asked(schema, rng, 3, 6)])
    lay.history_masks[:] = True
    deep, wide = rows(lay, schema, 4, rng)
    scores = scores_of(config, schema, None)
    with pytest.raises(ValueError, match="history has 6 entries, the attention knows 5"):
        scores.predict(lay, deep, scores.light(lay, deep, wide))
