"""Vectors of users and items without torch: a handful of small products, of which torch's fixed cost was the most.

Equal to those of `TwoTower` but for rounding: `tests/unit/test_model_scoring.py`. Legend: as in `two_tower.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from recsys.model.specs import TwoTowerSpec
from recsys.model.weights import Weights
from recsys.types import Bool, Float32


@dataclass(frozen=True, slots=True)
class Towers:
    """Both towers' weights. Thread-safe; they change only where a trainer of this process learns them."""

    spec: TwoTowerSpec
    weights: Weights

    def copied(self) -> Towers:
        """The same as they are now."""
        return replace(self, weights={name: np.array(value) for name, value in self.weights.items()})

    def user_vectors(self, shared: Float32, history: Float32, present: Bool) -> Float32:
        """shared [R, num_shared d], history [R, T, num_history d], present [R, T] -> [R, tower_dim], or [R, K, tower_dim]."""
        spec, weights = self.spec, self.weights
        weight = (spec.recency_decay ** np.arange(present.shape[1]) * present)[:, None]
        if spec.interests > 1:
            logits = np.tanh(history @ weights["attention"].T) @ weights["heads"].T
            weight = np.exp(logits.transpose(0, 2, 1)) * weight
            shared = np.repeat(shared[:, None], spec.interests, 1)
        else:
            shared = shared[:, None]
        weight = (weight / np.maximum(weight.sum(2, keepdims=True), 1e-12)).astype(np.float32)
        vectors = self._through("user_tower", np.concatenate([shared, weight @ history], 2))
        return vectors if spec.interests > 1 else vectors[:, 0]

    def item_vectors(self, items: Float32) -> Float32:
        """items [N, num_item d] -> [N, tower_dim]."""
        return self._through("item_tower", items)

    def _through(self, tower: str, x: Float32) -> Float32:
        """Of length 1."""
        for layer in range(len(self.spec.hidden) + 1):
            if layer:
                x = x / (1 + np.exp(-x))  # Swish
            x = x @ self.weights[f"{tower}.weights.{layer}"].T + self.weights[f"{tower}.biases.{layer}"]
        x /= np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
        return x
