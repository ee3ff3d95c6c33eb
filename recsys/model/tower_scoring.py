"""Vectors of users and items by the towers. A user's without torch: a handful of small products, of which its fixed cost was the most.

Equal to `TwoTower.user_vectors` but for rounding: `tests/unit/test_model_scoring.py`. Legend: as in `two_tower.py`.
"""

from __future__ import annotations

import numpy as np
import torch

from recsys.model.fused import array
from recsys.model.layers import MLP
from recsys.model.two_tower import TwoTower
from recsys.types import Bool, Float32


def user_vectors(towers: TwoTower, shared: Float32, history: Float32, present: Bool) -> Float32:
    """shared [R, num_shared d], history [R, T, num_history d], present [R, T] -> [R, tower_dim], or [R, K, tower_dim]."""
    spec = towers.spec
    weight = (spec.recency_decay ** np.arange(present.shape[1]) * present)[:, None]
    if spec.interests > 1:
        logits = np.tanh(history @ array(towers.attention).T) @ array(towers.heads).T
        weight = np.exp(logits.transpose(0, 2, 1)) * weight
        shared = np.repeat(shared[:, None], spec.interests, 1)
    else:
        shared = shared[:, None]
    weight = (weight / np.maximum(weight.sum(2, keepdims=True), 1e-12)).astype(np.float32)
    vectors = _mlp(towers.user_tower, np.concatenate([shared, weight @ history], 2))
    vectors /= np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
    return vectors if spec.interests > 1 else vectors[:, 0]


def item_vectors(towers: TwoTower, fields: Float32) -> Float32:
    """Fields [n, F d] of looked-up rows -> [n, tower_dim]."""
    with torch.inference_mode():
        vectors: Float32 = towers.item_vectors(torch.from_numpy(fields)).numpy()
    return vectors


def _mlp(tower: MLP, x: Float32) -> Float32:
    for layer, (weight, bias) in enumerate(zip(tower.weights, tower.biases, strict=True)):
        if layer:
            x = x / (1 + np.exp(-x))  # Swish
        x = x @ array(weight).T + array(bias)
    return x
