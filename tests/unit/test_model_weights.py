"""Weights as arrays: named and shaped as torch names and shapes them, drawn as torch draws them, refused where they do not fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from recsys.config import load
from recsys.errors import SchemaMismatch
from recsys.features.schema import Schema
from recsys.model import networks, specs, weights
from recsys.model.ranker import to_bytes
from recsys.model.specs import TwoTowerSpec
from recsys.model.two_tower import TwoTower
from tests.unit.test_model_scoring import RANDOM, SHIPPED, drawn

CONFIGS = Path(__file__).resolve().parents[2] / "deploy" / "configs"


@pytest.mark.parametrize("which", [*SHIPPED, *range(RANDOM)])
def test_names_shapes_and_types_are_those_of_torch(which: str | int) -> None:
    config = load(CONFIGS / f"{which}.toml") if isinstance(which, str) else drawn(np.random.default_rng(which))
    schema = Schema.of(config)
    pairs = [
        (networks.ranker(config, schema), weights.of_ranker(specs.ranker(config, schema), seed=config.seed)),
        (networks.two_tower(config, schema), weights.of_towers(specs.two_tower(config, schema), seed=config.seed)),
    ]
    for module, ours in pairs:
        expected = networks.arrays(module)
        assert {n: (a.shape, a.dtype) for n, a in ours.items()} == {n: (a.shape, a.dtype) for n, a in expected.items()}
    ranker, ours = pairs[0]
    expected = networks.arrays(ranker)
    for name in {"bias", "number_weights", "memory.projections"} & expected.keys():
        np.testing.assert_allclose(ours[name], expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", [0, 7, 2**32 + 3])
def test_untrained_towers_are_those_that_the_trainer_begins_with(seed: int) -> None:
    spec = TwoTowerSpec(num_shared=2, num_item=4, num_history=3, dim=5, tower_dim=7, interests=3)
    ours = weights.of_towers(spec, seed=seed)
    for name, expected in networks.arrays(TwoTower(spec, seed=seed)).items():
        np.testing.assert_allclose(ours[name], expected, rtol=1e-6)


def test_weights_of_another_network_are_refused_by_name() -> None:
    config = load(CONFIGS / "default.toml")
    schema = Schema.of(config)
    expected = weights.of_ranker(specs.ranker(config, schema), seed=0)
    sent = safetensors.numpy.load(to_bytes(networks.ranker(config, schema)))
    assert weights.fitted(sent, expected).keys() == expected.keys()
    other = {
        "bias": {**sent, "bias": np.zeros(99, np.float32)},
        "compress": {**sent, "compress": np.zeros((2, 2), np.float32)},
        "number_weights": {**sent, "number_weights": sent["number_weights"].astype(np.float64)},
        "home.towers.0.bias": {name: value for name, value in sent.items() if name != "home.towers.0.bias"},
    }
    for name, given in other.items():
        with pytest.raises(SchemaMismatch, match=name):
            weights.fitted(given, expected)
