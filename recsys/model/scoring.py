"""Scoring one request without torch: a ranker's weights as flat arrays, and what the light stage and the whole network say of its items.

Equal to `Ranker.predict` but for rounding: `tests/unit/test_model_scoring.py`. Legend: as in `score_kernels.py`; U unique rows.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from recsys import metrics
from recsys.compiled import one_at_a_time
from recsys.config import Config
from recsys.features.schema import Schema
from recsys.model import eager, gather, networks
from recsys.model import score_kernels as kernels
from recsys.model.din import MeanPool, TargetAttention
from recsys.model.fused import array
from recsys.model.home import Home, Level
from recsys.model.layers import Dice, GroupedLinear, StreamingNorm
from recsys.model.plan import Index, Plan
from recsys.model.ranker import Ranker, memory_keys
from recsys.model.row_fields import fields_of, starts, summed
from recsys.model.specs import CERTAIN, NUMBER_LIMIT, RankerSpec
from recsys.types import Float32

Array = np.ndarray[Any, Any]
NOTHING = np.zeros(0, np.float32)
compiled = threading.Event()
"""Set once no call of these kernels waits for a compiler."""


class UnknownPart(TypeError):
    """A part of a network that the kernels have no code for."""


def packed(schema: Schema, ranker: Ranker) -> Scoring | None:
    """What scores this network's requests; None where it has a part that the kernels do not know: torch does, then."""
    try:
        return Scoring(schema, ranker)
    except UnknownPart as error:
        metrics.SCORING_COMPILED.set(0)
        logging.getLogger("recsys").warning("requests are scored by torch, slower: %s", error)
        return None


def scored_by(config: Config) -> str:
    """What scores the requests of a configuration."""
    schema = Schema.of(config)
    return "torch" if packed(schema, networks.ranker(config, schema)) is None else "compiled kernels"


class Scoring:
    """A ranker's weights as they are now. Thread-safe: nothing here changes."""

    def __init__(self, schema: Schema, ranker: Ranker) -> None:
        self._ranker, self._after = ranker, ranker.spec.after
        self._dim, self._tasks = ranker.spec.dim, len(ranker.spec.tasks)
        self._fields = starts(schema.item_fields)
        self._past = starts(schema.item_fields[: schema.num_history_fields])
        self._bias, self._number_weights = array(ranker.bias), array(ranker.number_weights)
        self._numbers = _affine(ranker.number_norm)
        self._attention = [_attention(one) for one in ranker.attention]
        self._compress = None if ranker.compress is None else array(ranker.compress)
        self._meta, self._task, self._towers = _home(ranker.home)

    def light(self, lay: Plan, deep: Float32, wide: Float32) -> Float32:
        """What the wide part says of each item: rows deep [U, d + tasks …] and wide [U', tasks] of a request laid out -> logits [M, T]."""
        sums = summed(lay, deep, wide, self._dim)
        return np.asarray(lay.numbers @ self._number_weights + self._bias + sums, np.float32)

    def predict(self, lay: Plan, deep: Float32, light: Float32) -> Float32:
        """The probabilities [M, T] of a request's items, laid out, by the whole network; `light` [M, T] are their wide logits."""
        shared = self._take(deep, lay.shared, np.arange(lay.shared.shape[1] + 1))[0]
        history, items = self._take(deep, lay.history[0], self._past), self._take(deep, lay.item, self._fields)
        masks = lay.history_masks[:, 0]
        self._check(masks)
        candidates = np.ascontiguousarray(items[:, : history.shape[1]])
        pooled = np.empty((len(masks), *candidates.shape), np.float32)
        gaps = lay.history_gaps[0].astype(np.int64)
        for out, attention, mask in zip(pooled, self._attention, masks, strict=True):
            kernels.attend(attention, candidates, history, mask, gaps, out)
        present = masks.any(0)
        mean = present.astype(np.float32) @ history / np.float32(max(1, present.sum()))
        x = self._composed(np.concatenate([shared, mean]), pooled, items, lay.numbers)
        hidden = np.empty((self._tasks, len(x), self._meta.affine.shape[2]), np.float32)
        logits = np.empty((len(x), self._tasks), np.float32)
        kernels.head(x, self._meta, self._task, self._towers, hidden, logits)
        return self._corrected(logits + light, hidden)

    def probabilities(self, logits: Float32) -> Float32:
        """Of the tasks, from the network's logits [M, T]."""
        return _sigmoid(self._log_odds(logits))

    def _check(self, masks: Array) -> None:
        longest = int(masks.sum(1).max()) if masks.size else 0
        for attention in self._attention:
            if len(attention.candidate) and longest > len(attention.rank):
                raise ValueError(
                    f"history has {longest} entries, the attention knows {len(attention.rank)}: cut it to the newest"
                )

    def _take(self, rows: Float32, index: Index, fields: Index) -> Float32:
        return take(rows, index, fields, self._dim)

    def _composed(self, user: Float32, pooled: Float32, items: Float32, numbers: Float32) -> Float32:
        """HoME's input [M, V]."""
        width = len(user) + len(pooled) * pooled.shape[2] + items.shape[1] + numbers.shape[1]
        if self._compress is None:
            x = np.empty((len(items), width), np.float32)
            kernels.compose(user, pooled, items, numbers, self._numbers, NUMBER_LIMIT, x)
            return x
        own = np.empty((len(items), width - len(user)), np.float32)
        kernels.compose(user[:0], pooled, items, numbers, self._numbers, NUMBER_LIMIT, own)
        found: Float32 = own @ self._compress[len(user) :] + user @ self._compress[: len(user)]
        return found

    def _log_odds(self, logits: Float32) -> Float32:
        """As `Ranker.log_odds`."""
        if not any(parent >= 0 for parent in self._after):
            return logits
        logs = -np.logaddexp(0, -logits)
        for task, parent in enumerate(self._after):
            if parent >= 0:
                logs[:, task] += logs[:, parent]
        logs = np.minimum(logs, -CERTAIN)
        return np.where(np.array(self._after) >= 0, logs - np.log(-np.expm1(logs)), logits)

    def _corrected(self, logits: Float32, hidden: Float32) -> Float32:
        """Probabilities to serve. The correctors are a few operations of torch, where they are configured."""
        log_odds, memory = self._log_odds(logits), self._ranker.memory
        with torch.inference_mode():
            if self._ranker.calibrator is not None:
                log_odds = self._ranker.calibrator(torch.from_numpy(log_odds)).numpy()
            p = _sigmoid(log_odds)
            if memory is not None:
                p = memory(memory_keys(torch.from_numpy(hidden)), torch.from_numpy(p)).numpy()
        return p


def take(rows: Float32, index: Index, fields: Index, dim: int) -> Float32:
    """Fields of looked-up rows, side by side: index [..., C] -> [..., F d]; before it is compiled by torch."""
    if not compiled.is_set():
        with torch.inference_mode():
            found: Float32 = eager.take_fields(torch.from_numpy(rows), dim, index, fields).flatten(-2).numpy()
        return found
    return fields_of(rows, index, fields, dim)


def warm_up() -> None:
    """Compile every kernel, or read it from the on-disk cache."""
    started, spec = (
        time.perf_counter(),
        RankerSpec(
            num_shared=1,
            num_item=1,
            num_history=1,
            history_len=1,
            dim=1,
            num_numbers=1,
            tasks=("click",),
            groups=("",),
            number_prior=(0.0,),
            task_prior=(0.5,),
        ),
    )
    ranker, one = Ranker(spec, seed=0), np.ones((1, 1), np.float32)
    index, sums = np.zeros((1, 1), np.intp), np.zeros((1, 1), np.float32)
    with one_at_a_time("scoring"):
        gather.sum_columns(one, 0, index, index[0], sums)
        gather.take_fields(one, index, np.arange(2), one[None].copy())
        kernels.attend(_attention(ranker.attention[0]), one, one, np.ones(1, np.bool_), index[0], one.copy())
        x = np.empty((1, ranker.home.meta.experts.first.weight.shape[1]), np.float32)
        kernels.compose(one[0].repeat(2), one[None], one, one, np.ones((2, 1), np.float32), NUMBER_LIMIT, x)
        meta, task, towers = _home(ranker.home)
        kernels.head(x, meta, task, towers, np.empty((1, 1, meta.affine.shape[2]), np.float32), one.copy())
    if not compiled.is_set():
        logging.getLogger("recsys").info("scoring compiled after %.1f s", time.perf_counter() - started)
    compiled.set()
    metrics.SCORING_COMPILED.set(1)


def _sigmoid(x: Float32) -> Float32:
    found: Float32 = np.float32(1) / (np.float32(1) + np.exp(-x))
    return found


def _flat(tensors: Sequence[torch.Tensor]) -> Float32:
    return np.concatenate([NOTHING, *(array(tensor).ravel() for tensor in tensors)])


def _affine(norm: StreamingNorm) -> Float32:
    """Scale and shift [2, F] (of groups [2, G, F]) of a norm's running statistics, and of what it learned."""
    mean, rstd = array(norm.running())
    if norm.gain is None or norm.bias is None:
        return np.stack([rstd, -mean * rstd])
    scale = rstd * array(norm.gain).reshape(rstd.shape)
    return np.stack([scale, array(norm.bias).reshape(rstd.shape) - mean * scale])


def _activation(module: nn.Module) -> Float32:
    """[3, units]."""
    if isinstance(module, Dice):
        return np.concatenate([_affine(module.norm), array(module.alpha)[None]])
    if not isinstance(module, nn.PReLU):
        raise UnknownPart(f"activation {type(module).__name__}")
    slope = array(module.weight)
    return np.stack([np.ones_like(slope), np.zeros_like(slope), slope])


def _attention(module: nn.Module) -> kernels.Attention:
    if isinstance(module, MeanPool):
        none, sizes = np.zeros((0, 0), np.float32), np.zeros(0, np.int64)
        return kernels.Attention(
            none, none, none, none, none, sizes, np.zeros((3, 0), np.float32), NOTHING, NOTHING, False, False
        )
    if not isinstance(module, TargetAttention):
        raise UnknownPart(f"attention {type(module).__name__}")
    first = module.candidate
    return kernels.Attention(
        candidate=array(first),
        entry=array(module.entry.T),
        product=array(module.product),
        rank=array(module.rank_bias),
        gap=np.zeros((0, len(first)), np.float32) if module.gap_bias is None else array(module.gap_bias),
        widths=np.array([len(first), *(len(weight) for weight in module.weights[:-1])], np.int64),
        activations=np.concatenate([_activation(one) for one in module.activations], 1),
        weights=_flat(list(module.weights)),
        biases=_flat(list(module.biases)),
        prelu=not isinstance(module.activations[0], Dice),
        softmax=module.softmax,
    )


def _level(level: Level, pick: Array) -> kernels.Level:
    gates, experts = level.feature_gate, level.experts
    layers = [layer for layer in experts.rest if isinstance(layer, GroupedLinear)]
    groups, each = len(pick), experts.each
    hidden = experts.first.weight.shape[2] // each
    widths = np.array([hidden, *(layer.weight.shape[2] for layer in layers)], np.int64)
    bare = np.stack(
        [np.ones((groups * each, widths[-1]), np.float32), np.zeros((groups * each, widths[-1]), np.float32)]
    )
    none = np.zeros((0, 0, 0), np.float32)
    return kernels.Level(
        pick=pick,
        down=none if gates is None else array(gates.down),
        choice=NOTHING if gates is None else array(gates.bias).ravel(),
        up=none[None] if gates is None else array(gates.up),
        first=array(experts.first.weight),
        first_bias=array(experts.first.bias)[:, 0],
        widths=widths,
        weights=_flat([layer.weight for layer in layers]),
        biases=_flat([layer.bias for layer in layers]),
        affine=bare if experts.norm is None else _affine(experts.norm),
        gate=array(level.gate.weight),
        gate_bias=array(level.gate.bias)[:, 0],
        reach=level.reach,
        own=level.own,
    )


def _home(home: Home) -> tuple[kernels.Level, kernels.Level, kernels.Towers]:
    layers = [layer for layer in home.towers if isinstance(layer, GroupedLinear)]
    towers = kernels.Towers(
        category=array(home.category),
        widths=np.array([layers[0].weight.shape[1], *(layer.weight.shape[2] for layer in layers)], np.int64),
        weights=_flat([layer.weight for layer in layers]),
        biases=_flat([layer.bias for layer in layers]),
    )
    picks = np.zeros(int(home.category.max()) + 1, np.int64), array(home.inputs)
    return _level(home.meta, picks[0]), _level(home.task, picks[1]), towers
