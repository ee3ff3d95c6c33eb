"""The kernels that score a request, in NumPy: what serves while they are compiled. Names, arguments and legends as in `gather.py` and
`score_kernels.py`; several times slower."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from recsys.model.score_kernels import Attention, Level, Towers
from recsys.types import Float32

Array = np.ndarray[Any, Any]


def take_fields(rows: Array, index: Array, starts: Array, out: Array) -> None:
    columns = _extended(rows[:, : out.shape[2]])[index]
    counts = np.add.reduceat((index < len(rows)).astype(np.int64), starts[:-1], axis=1)
    out[:] = np.add.reduceat(columns, starts[:-1], axis=1) / np.maximum(counts, 1)[..., None]


def sum_columns(rows: Array, start: int, index: Array, owner: Array, out: Array) -> None:
    out += _extended(rows[:, start : start + out.shape[1]])[index[owner]].sum(1)


def _extended(rows: Array) -> Array:
    """With a row of zeros at the end, which is that of a missing value."""
    return np.concatenate([rows, np.zeros((1, rows.shape[1]), rows.dtype)])


def attend(a: Attention, candidates: Array, history: Array, present: Array, gaps: Array, out: Array) -> None:
    rows = np.flatnonzero(present)
    entries = history[rows]
    if not len(rows):
        out[:] = 0
        return
    if not len(a.candidate):
        out[:] = entries.mean(0)
        return
    bias = entries @ a.entry + a.rank[: len(rows)]
    if len(a.gap):
        bias += a.gap[gaps[rows]]
    matrix = a.product * entries[:, None] + a.candidate
    scores = _weights(a, (candidates @ matrix.reshape(-1, matrix.shape[2]).T).reshape(-1, *bias.shape) + bias)
    out[:] = (_softmax(scores) if a.softmax else scores / np.float32(len(rows) ** 0.5)) @ entries


def _weights(a: Attention, x: Float32) -> Float32:
    """Of each candidate's entries [M, n]: pre-activations of the first layer [M, n, H], through the others."""
    unit = weight = behind = 0
    x = _activated(a, x, unit)
    for inputs, outputs in pairwise(a.widths.tolist()):
        w = a.weights[weight : weight + outputs * inputs].reshape(outputs, inputs)
        unit += inputs
        x = _activated(a, x @ w.T + a.biases[behind : behind + outputs], unit)
        weight, behind = weight + outputs * inputs, behind + outputs
    found: Float32 = x @ a.weights[weight:] + a.biases[behind]
    return found


def _activated(a: Attention, x: Float32, unit: int) -> Float32:
    """By Dice or PReLU of the units from this one on."""
    scale, shift, low = a.activations[:, unit : unit + x.shape[2]]
    if a.prelu:
        return np.maximum(x, np.float32(0)) + low * np.minimum(x, np.float32(0))
    return x * (low + (1 - low) * sigmoid(x * scale + shift))


def compose(user: Array, pooled: Array, items: Array, numbers: Array, affine: Array, limit: float, out: Array) -> None:
    normed = np.clip(numbers * affine[0] + affine[1], -limit, limit)
    out[:] = np.concatenate([np.broadcast_to(user, (len(out), len(user))), *pooled, items, normed], 1)


def head(x: Array, meta: Level, task: Level, towers: Towers, hidden: Array, out: Array) -> None:
    first = _level(meta, x[None], x[None])
    mine = first[towers.category]
    hidden[:] = _level(task, first, np.concatenate([mine, np.broadcast_to(first[:1], mine.shape)], 2))
    y, groups = hidden, len(towers.category)
    weight = behind = 0
    for layer, (inputs, outputs) in enumerate(pairwise(towers.widths.tolist())):
        w = towers.weights[weight : weight + groups * inputs * outputs].reshape(groups, inputs, outputs)
        bias = towers.biases[behind : behind + groups * outputs].reshape(groups, 1, outputs)
        y = (_swish(y) if layer else y) @ w + bias
        weight, behind = weight + groups * inputs * outputs, behind + groups * outputs
    out[:] = y[..., 0].T


def _level(a: Level, x: Float32, gate_inputs: Float32) -> Float32:
    """x [inputs, M, V], gate_inputs [1 or O, M, W] -> [O, M, Z]."""
    mine = x[a.pick]
    experts = _experts(a, _gated(a, mine) if len(a.down) else mine)
    logits = gate_inputs @ a.gate + a.gate_bias[:, None]
    mixed = []
    for output, reach in enumerate(a.reach):
        reach = reach[reach >= 0]
        shares = _softmax(logits[output][:, reach])
        if a.own == 1:
            shares[:, -1] += sigmoid(logits[output][:, -1])
        elif a.own:
            shares[:, -a.own :] += _softmax(logits[output][:, -a.own :])
        mixed.append(np.einsum("me,emz->mz", shares, experts[reach]))
    return np.stack(mixed)


def _gated(a: Level, x: Float32) -> Float32:
    rank = a.up.shape[2]
    low = x @ a.down
    left, right = (sigmoid(low[..., side * rank : (side + 1) * rank] @ a.up[:, side]) for side in range(2))
    second = sigmoid(low[..., -1:] + a.choice[:, None, None])
    return 2 * x * ((1 - second) * left + second * right)


def _experts(a: Level, x: Float32) -> Float32:
    """[G, M, V] -> [E, M, Z]."""
    groups, examples = x.shape[:2]
    experts = a.affine.shape[1]
    y = x @ a.first + a.first_bias[:, None]
    y = y.reshape(groups, examples, experts // groups, -1).swapaxes(1, 2).reshape(experts, examples, -1)
    weight = behind = 0
    for inputs, outputs in pairwise(a.widths.tolist()):
        w = a.weights[weight : weight + experts * inputs * outputs].reshape(experts, inputs, outputs)
        y = _swish(y) @ w + a.biases[behind : behind + experts * outputs].reshape(experts, 1, outputs)
        weight, behind = weight + experts * inputs * outputs, behind + experts * outputs
    return _swish(y * a.affine[0][:, None] + a.affine[1][:, None])


def sigmoid(x: Float32) -> Float32:
    found: Float32 = np.float32(1) / (np.float32(1) + np.exp(np.minimum(-x, np.float32(87))))
    return found


def _swish(x: Float32) -> Float32:
    return x * sigmoid(x)


def _softmax(x: Float32) -> Float32:
    """Over the last axis."""
    powers = np.exp(x - x.max(-1, keepdims=True))
    found: Float32 = powers / powers.sum(-1, keepdims=True)
    return found
