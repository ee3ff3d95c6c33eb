"""Learning without autograd: a ranker's scores, and the gradients of all that they are made of, in compiled calls.

Equal to what torch says but for rounding: `tests/unit/test_model_learning.py`. Weights, statistics and gradients are those of the torch
module, not copies. Legend: as in `learn_kernels.py`; V width of HoME's input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from recsys.features.schema import Schema
from recsys.model import gather
from recsys.model import learn_kernels as learn
from recsys.model.learning_home import HomeLearning
from recsys.model.learning_parts import AttentionLearning, Norm, Weight, empty, zeros
from recsys.model.plan import Plan
from recsys.model.ranker import Ranker
from recsys.model.row_fields import fields_back, fields_of, starts, summed
from recsys.model.specs import NUMBER_LIMIT
from recsys.types import Float32

Array = np.ndarray[Any, Any]


@dataclass(slots=True, kw_only=True)
class Scored:
    """A batch's scores, and what their gradients are computed from."""

    lay: Plan
    learning: bool
    logits: Float32
    """[M, T]"""
    hidden: Float32
    """What HoME's towers saw [T, M, Z]"""
    x: Float32
    """HoME's input before it is compressed [M, V]"""
    history: Float32
    """[R, T, D]"""
    items: Float32
    """[M, fields d]"""
    present: Array
    """[R, T] entries of any sequence"""


class Learning:
    """A ranker as it learns. It owns what a step leaves for its backward pass: one at a time. Not thread-safe."""

    def __init__(self, schema: Schema, ranker: Ranker) -> None:
        spec = ranker.spec
        self._dim = spec.dim
        self._fields, self._past = starts(schema.item_fields), starts(schema.item_fields[: schema.num_history_fields])
        self._bias, self._number_weights = Weight(ranker.bias), Weight(ranker.number_weights)
        reach = ranker.number_norm.reach
        self._numbers, self._odd = Norm(ranker.number_norm), None if reach is None else reach.numpy()
        self._attention = [AttentionLearning(one) for one in ranker.attention]
        self._compress = None if ranker.compress is None else Weight(ranker.compress)
        self._home = HomeLearning(ranker.home)

    def scores(self, lay: Plan, deep: Float32, wide: Float32, learning: bool) -> Scored:
        """Rows deep [U, d + tasks …] and wide [U', tasks] of a batch laid out -> its scores. `learning`: running statistics move, and
        gradients go through the batch's own."""
        shared = fields_of(deep, lay.shared, np.arange(lay.shared.shape[1] + 1), self._dim)
        history = fields_of(deep, lay.history, self._past, self._dim)
        items = fields_of(deep, lay.item, self._fields, self._dim)
        entry = history.shape[2]
        user = np.concatenate([shared, empty(len(shared), entry)], 1)
        present = np.logical_or.reduce(lay.history_masks)
        mean = empty(len(shared), entry)
        learn.mean_pool(history, present, mean)
        user[:, shared.shape[1] :] = mean
        candidates = np.ascontiguousarray(items[:, :entry])
        pooled = [
            attention.scores(candidates, history, mask, lay, learning)
            for attention, mask in zip(self._attention, lay.history_masks, strict=True)
        ]
        x = np.concatenate([user[lay.request], *pooled, items, self._normed(lay.numbers, learning)], 1)
        hidden, logits = self._home.scores(x if self._compress is None else x @ self._compress.value, learning)
        logits += lay.numbers @ self._number_weights.value + self._bias.value + summed(lay, deep, wide, self._dim)
        return Scored(
            lay=lay,
            learning=learning,
            logits=logits,
            hidden=hidden,
            x=x,
            history=history,
            items=items,
            present=present,
        )

    def gradients(self, of: Scored, glogits: Float32, deep: Float32, wide: Float32) -> tuple[Float32, Float32]:
        """Of the last scores, for gradients by logits [M, T]: those of the rows; those of the weights are set where they lie."""
        lay, request = of.lay, of.lay.request
        self._bias.grad[:] = glogits.sum(0)
        np.matmul(lay.numbers.T, glogits, out=self._number_weights.grad)
        gdeep, gwide = zeros(*deep.shape), zeros(*wide.shape)
        every = np.arange(len(request))
        gather.sum_columns_back(glogits, self._dim, lay.item, every, gdeep)
        gather.sum_columns_back(glogits, self._dim, lay.shared, request, gdeep)
        if lay.crosses.shape[1]:
            gather.sum_columns_back(glogits, 0, lay.crosses, every, gwide)
        gx = self._home.gradients(glogits)
        if self._compress is not None:
            np.matmul(of.x.T, gx, out=self._compress.grad)
            gx = gx @ self._compress.value.T
        self._inputs_back(of, gx, gdeep)
        return gdeep, gwide

    def _inputs_back(self, of: Scored, gx: Float32, gdeep: Float32) -> None:
        """From the gradient of HoME's input to that of the rows."""
        lay, entry = of.lay, of.history.shape[2]
        shared = lay.shared.shape[1] * self._dim
        guser = zeros(len(lay.shared), shared + entry)
        learn.add_rows(np.ascontiguousarray(gx[:, : shared + entry]), lay.request, guser)
        ghistory = zeros(*of.history.shape)
        learn.mean_pool_back(np.ascontiguousarray(guser[:, shared:]), of.present, ghistory)
        at = shared + entry
        own = at + entry * len(self._attention)
        gitems = np.ascontiguousarray(gx[:, own : own + of.items.shape[1]])
        for attention in self._attention:
            gitems[:, :entry] += attention.gradients(np.ascontiguousarray(gx[:, at : at + entry]), ghistory)
            at += entry
        gshared, own_fields = np.ascontiguousarray(guser[:, :shared]), np.arange(lay.shared.shape[1] + 1)
        fields_back(gshared, lay.shared, own_fields, self._dim, gdeep)
        fields_back(ghistory, lay.history, self._past, self._dim, gdeep)
        fields_back(gitems, lay.item, self._fields, self._dim, gdeep)

    def _normed(self, numbers: Float32, learning: bool) -> Float32:
        """By running statistics, clipped; what is learned from goes no further than its reach."""
        if not numbers.shape[1]:
            return numbers
        if learning:
            numbers = self._numbers.within(numbers, self._odd)
        scale, shift = self._numbers.settle(numbers[None], learning)[0][0, :, 0]
        return np.clip(numbers * scale + shift, -NUMBER_LIMIT, NUMBER_LIMIT)
