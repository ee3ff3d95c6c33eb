"""Learning the towers without autograd: one batch's gradients, of all weights and of the rows that it was made of.

Equal to what torch says but for rounding: `tests/unit/test_model_two_tower.py`. Weights and gradients are those of the torch module, not
copies. Legend: as in `two_tower.py`; B pairs, N items each user passed over, H its history fields, S its own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from recsys.model.layers import MLP
from recsys.model.learning_parts import Weight, zeros
from recsys.model.two_tower import TwoTower
from recsys.types import Bool, Float32, Int64

Array = np.ndarray[Any, Any]
_LEAST = np.float32(1e-12)


class TowerBatch(NamedTuple):
    """Pairs of a user and an item, and what each user passed over."""

    shared: Float32
    """[B, S d]"""
    history: Float32
    """[B, T, H d], newest first"""
    present: Bool
    """[B, T]"""
    items: Float32
    """[B + B N, F d]: the batch's own, then what each user passed over; overwritten where an id is left out"""
    keys: Int64
    """[B] of the batch's items: the same one is no negative"""
    log_q: Float32
    """[B] how likely each is in a batch, logarithm"""
    passed: Bool
    """[B, N] which of them exist"""


class Gradients(NamedTuple):
    """Of the mean loss, by what the batch was made of; shapes as there."""

    shared: Float32
    history: Float32
    items: Float32


class TowersLearning:
    """The towers as they learn: `TwoTower.loss` and its gradients. Its optimiser comes first. Not thread-safe."""

    def __init__(self, towers: TwoTower) -> None:
        self._towers, self._spec = towers, towers.spec
        self._user, self._item = _Tower(towers.user_tower), _Tower(towers.item_tower)
        if self._spec.interests > 1:
            self._attention, self._heads = Weight(towers.attention), Weight(towers.heads)

    def gradients(self, batch: TowerBatch) -> Gradients:
        """Set the weights' gradients; returns those of the batch. What is not finite in there is not finite here."""
        with np.errstate(all="ignore"):
            kept = self._without_ids(batch.items)
            items = self._item.vectors(batch.items)
            inputs = self._user_inputs(batch)
            users = self._user.vectors(inputs.reshape(-1, inputs.shape[2])).reshape(*inputs.shape[:2], -1)
            guser, gitem = self._loss(users, items, batch)
            gitems = self._item.gradient(gitem)
            if kept is not None:
                gitems[:, : self._spec.dim] *= kept
            ginputs = self._user.gradient(guser.reshape(-1, guser.shape[2])).reshape(inputs.shape)
            width = batch.shared.shape[1]
            return Gradients(ginputs[:, :, :width].sum(1), self._history(ginputs[:, :, width:], batch), gitems)

    def _without_ids(self, items: Float32) -> Float32 | None:
        """Some items lose their id: which keep it [M, 1]."""
        if not self._spec.id_dropout:
            return None
        kept: Float32 = self._towers.kept(len(items)).numpy().reshape(-1, 1).astype(np.float32)
        items[:, : self._spec.dim] *= kept
        return kept

    def _user_inputs(self, batch: TowerBatch) -> Float32:
        """[B, K, (S + H) d]"""
        recency = np.float32(self._spec.recency_decay) ** np.arange(batch.present.shape[1], dtype=np.float32)
        weight = (recency * batch.present)[:, None]
        if self._spec.interests > 1:
            self._seen = np.tanh(batch.history @ self._attention.value.T)
            weight = np.exp((self._seen @ self._heads.value.T).transpose(0, 2, 1)) * weight
        self._weight = weight / np.maximum(weight.sum(2, keepdims=True), _LEAST)
        shared = np.broadcast_to(batch.shared[:, None], (len(weight), weight.shape[1], batch.shared.shape[1]))
        return np.concatenate([shared, self._weight @ batch.history], 2)

    def _loss(self, users: Float32, items: Float32, batch: TowerBatch) -> tuple[Float32, Float32]:
        """The gradients of users [B, K, D] and items [B + B N, D] by the softmax's cross-entropy."""
        size, scale = len(users), np.float32(1 / self._spec.temperature)
        own, passed = items[:size], items[size:].reshape(*batch.passed.shape, items.shape[1])
        nearest = (users @ own[:, :, None])[:, :, 0].argmax(1)  # of several interests that one learns
        user = users[np.arange(size), nearest]
        logits = user @ own.T * scale - batch.log_q
        same = batch.keys[:, None] == batch.keys
        np.fill_diagonal(same, False)
        logits[same] = -np.inf
        others = np.where(batch.passed, (passed @ user[:, :, None])[:, :, 0] * scale, np.float32(-np.inf))
        logits = np.concatenate([logits, others], 1)
        share = np.exp(logits - logits.max(1, keepdims=True))
        share /= share.sum(1, keepdims=True)
        share[np.arange(size), np.arange(size)] -= 1
        share *= scale / size
        mine, theirs = share[:, :size], share[:, size:]
        guser, gitem = zeros(*users.shape), np.empty_like(items)
        guser[np.arange(size), nearest] = mine @ own + (theirs[:, None] @ passed)[:, 0]
        gitem[:size] = mine.T @ user
        gitem[size:] = (theirs[:, :, None] * user[:, None]).reshape(len(items) - size, items.shape[1])
        return guser, gitem

    def _history(self, gmean: Float32, batch: TowerBatch) -> Float32:
        """The gradient of the history [B, T, H d] by that of its means [B, K, H d]; sets those of the attention."""
        ghistory: Float32 = self._weight.transpose(0, 2, 1) @ gmean
        if self._spec.interests > 1:
            gweight = gmean @ batch.history.transpose(0, 2, 1)
            glogits = self._weight * (gweight - (self._weight * gweight).sum(2, keepdims=True))
            gscores = glogits.transpose(0, 2, 1)
            self._heads.grad[:] = np.tensordot(gscores, self._seen, ((0, 1), (0, 1)))
            gseen = gscores @ self._heads.value * (1 - self._seen**2)
            self._attention.grad[:] = np.tensordot(gseen, batch.history, ((0, 1), (0, 1)))
            ghistory += gseen @ self._attention.value
        return ghistory


class _Tower:
    """An `MLP` and the length of its vectors brought to 1."""

    def __init__(self, tower: MLP) -> None:
        self._weights, self._biases = [Weight(w) for w in tower.weights], [Weight(b) for b in tower.biases]

    def vectors(self, x: Array) -> Float32:
        """[n, inputs] -> [n, D]"""
        self._layers: list[tuple[Array, Array, Array]] = []
        for layer, (weight, bias) in enumerate(zip(self._weights, self._biases, strict=True)):
            before, share = x, 1 / (1 + np.exp(-x)) if layer else x
            if layer:  # Swish
                x = x * share
            self._layers.append((before, share, x))
            x = x @ weight.value.T + bias.value
        self._length: Float32 = np.maximum(np.sqrt(np.square(x).sum(1, keepdims=True)), _LEAST)
        self._vectors: Float32 = np.divide(x, self._length)
        return self._vectors

    def gradient(self, g: Float32) -> Float32:
        """The inputs', by the vectors'; sets the weights'."""
        g = (g - self._vectors * (self._vectors * g).sum(1, keepdims=True)) / self._length
        for layer in reversed(range(len(self._weights))):
            x, share, inputs = self._layers[layer]
            self._biases[layer].grad[:] = g.sum(0)
            np.matmul(g.T, inputs, out=self._weights[layer].grad)
            g = g @ self._weights[layer].value
            if layer:
                g *= share * (1 + x * (1 - share))
        return g
