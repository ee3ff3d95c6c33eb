"""What scoring one request computes, on flat arrays: Numba, no GIL, one thread; matrix products by BLAS.

The weights of layers that follow each other lie flat in one array, with their widths beside it: another number of layers is no other
type, so that each kernel is compiled once. The torch modules of the same names are the definition; `scoring.py` packs their weights.

Legend: M candidates, T history entries, n of them present, D width of an entry, H width of a first layer, G groups of experts, K experts
of a group, E = G K, O outputs of a level, V width of a level's input, Z width of an expert's output, W width of a gate's input, r rank.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from recsys.model.fused_kernels import _exp, _sigmoid, kernel

Array = np.ndarray[Any, Any]
BLOCK = 64
"""Candidates at once: what they need between two layers stays in a core's second cache; double spills, half only adds calls."""
ENTRIES = 8
"""History entries in one matrix product: fewer leave the registers empty, more spill."""


class Attention(NamedTuple):
    """A `TargetAttention`, or with H = 0 a `MeanPool`."""

    candidate: Array
    """[H, D]: weights of the candidate"""
    entry: Array
    """[D, H]: weights of the entry"""
    product: Array
    """[H, D]: weights of both, multiplied"""
    rank: Array
    """[history_len, H]"""
    gap: Array
    """[buckets, H]; none: [0, H]"""
    widths: Array
    """[layers] int64: units of each hidden layer"""
    activations: Array
    """[3, all units]: scale, shift and alpha of Dice; of PReLU the slope, last"""
    weights: Array
    """Of the layers behind the first, each [out, in], flat"""
    biases: Array
    """Of the same, flat"""
    prelu: bool
    softmax: bool


class Level(NamedTuple):
    """A `Level` of HoME."""

    pick: Array
    """[G] int64: which input each group sees"""
    down: Array
    """[G, V, 2 r + 1]; without feature gates [0, 0, 0]"""
    choice: Array
    """[G]: bias of the choice between the two maps"""
    up: Array
    """[G, 2, r, V]"""
    first: Array
    """[G, V, K hidden]"""
    first_bias: Array
    """[G, K hidden]"""
    widths: Array
    """[layers] int64 of an expert, its first layer's too"""
    weights: Array
    """Of the layers behind the first, each [E, in, out], flat"""
    biases: Array
    """Of the same, each [E, out], flat"""
    affine: Array
    """[2, E, Z]: scale and shift of the norm"""
    gate: Array
    """[O, W, E + own]"""
    gate_bias: Array
    """[O, E + own]"""
    reach: Array
    """[O, ...] int64: experts that an output mixes, -1: none; the last `own` are its own"""
    own: int


class Towers(NamedTuple):
    """The towers of HoME, one a task."""

    category: Array
    """[tasks] int64: each task's output of the first level"""
    widths: Array
    """[layers + 1] int64, from the input to 1"""
    weights: Array
    """Each [tasks, in, out], flat"""
    biases: Array
    """Each [tasks, out], flat"""


@kernel
def attend(a: Attention, candidates: Array, history: Array, present: Array, gaps: Array, out: Array) -> None:
    """Pool the history for each candidate: candidates [M, D], history [T, D], present [T] bool, gaps [T] int64 -> out [M, D]."""
    rows = np.flatnonzero(present)
    count, width, units = len(rows), history.shape[1], len(a.candidate)
    out[:] = 0
    if not count:
        return
    entries = np.empty((count, width), np.float32)
    for i in range(count):
        entries[i] = history[rows[i]]
    if not units:
        for i in range(count):
            for d in range(width):
                out[0, d] += entries[i, d] / np.float32(count)
        out[1:] = out[0]
        return
    bias = np.dot(entries, a.entry)
    matrix = np.empty((count * units, width), np.float32)  # the first layer, folded with the history
    for i in range(count):
        for h in range(units):
            bias[i, h] += a.rank[i, h]
            if len(a.gap):
                bias[i, h] += a.gap[gaps[rows[i]], h]
            for d in range(width):
                matrix[i * units + h, d] = a.product[h, d] * entries[i, d] + a.candidate[h, d]
    for start in range(0, len(candidates), BLOCK):
        block = candidates[start : start + BLOCK]
        scores = _scores(a, matrix, bias, np.ascontiguousarray(block.T))
        if a.softmax:
            _normalise(scores)
        else:
            scores *= np.float32(1 / math.sqrt(count))
        out[start : start + BLOCK] = np.dot(scores.T, entries)


@kernel
def _scores(a: Attention, matrix: Array, bias: Array, candidates: Array) -> Array:
    """Weight of each entry for each candidate [n, M]: matrix [n H, D], bias [n, H], candidates [D, M]."""
    count, units = bias.shape
    scores = np.empty((count, candidates.shape[1]), np.float32)
    for start in range(0, count, ENTRIES):
        lines = np.dot(matrix[start * units : (start + ENTRIES) * units], candidates)
        for i in range(start, min(start + ENTRIES, count)):
            x = lines[(i - start) * units : (i - start + 1) * units]
            _activate(x, bias[i], a.activations[:, :units], a.prelu)
            weight, unit, behind = 0, units, 0
            for layer in range(1, len(a.widths)):
                inputs, outputs = a.widths[layer - 1], a.widths[layer]
                w = a.weights[weight : weight + outputs * inputs].reshape(outputs, inputs)
                x = np.dot(w, x)
                _activate(
                    x,
                    a.biases[behind : behind + outputs],
                    a.activations[:, unit : unit + outputs],
                    a.prelu,
                )
                weight, unit, behind = weight + outputs * inputs, unit + outputs, behind + outputs
            line = scores[i]
            line[:] = a.biases[behind]
            for h in range(len(x)):
                for m in range(len(line)):
                    line[m] += a.weights[weight + h] * x[h, m]
    return scores


@kernel
def _activate(x: Array, bias: Array, activation: Array, prelu: bool) -> None:
    """Add the bias and apply Dice or PReLU, in place: x [units, M], bias [units], activation [3, units]."""
    one = np.float32(1)
    for h in range(len(x)):
        line, add, scale, shift, low = x[h], bias[h], activation[0, h], activation[1, h], activation[2, h]
        if prelu:
            for m in range(len(line)):
                value = line[m] + add
                line[m] = max(value, np.float32(0)) + low * min(value, np.float32(0))
        else:
            for m in range(len(line)):
                value = line[m] + add
                line[m] = value * (low + (one - low) * _sigmoid(value * scale + shift))


@kernel
def _normalise(scores: Array) -> None:
    """Softmax over the entries, in place: [n, M]."""
    for m in range(scores.shape[1]):
        highest, total = scores[0, m], np.float32(0)
        for i in range(len(scores)):
            highest = max(highest, scores[i, m])
        for i in range(len(scores)):
            scores[i, m] = _exp(scores[i, m] - highest)
            total += scores[i, m]
        for i in range(len(scores)):
            scores[i, m] /= total


@kernel
def compose(user: Array, pooled: Array, items: Array, numbers: Array, affine: Array, limit: float, out: Array) -> None:
    """HoME's input of each candidate, out [M, V]: what is the same for all, user [U]; pooled [S, M, D]; items [M, F]; numbers [M, N],
    normalised by affine [2, N] (scale, shift) and cut at ± limit."""
    for m in range(len(out)):
        line, at = out[m], len(user)
        line[:at] = user
        for s in range(len(pooled)):
            line[at : at + pooled.shape[2]] = pooled[s, m]
            at += pooled.shape[2]
        line[at : at + items.shape[1]] = items[m]
        at += items.shape[1]
        for n in range(numbers.shape[1]):
            line[at + n] = min(max(numbers[m, n] * affine[0, n] + affine[1, n], -limit), limit)


@kernel
def head(x: Array, meta: Level, task: Level, towers: Towers, hidden: Array, out: Array) -> None:
    """HoME: x [M, V] -> what its towers see, hidden [tasks, M, Z], and their logits, out [M, tasks]."""
    tasks, width = len(towers.category), hidden.shape[2]
    for start in range(0, len(x), BLOCK):
        part = x[start : start + BLOCK]
        block = part.reshape(1, len(part), x.shape[1])
        first = _level(meta, block, block)
        gates = np.empty((tasks, len(part), 2 * width), np.float32)
        for t in range(tasks):
            gates[t, :, :width] = first[towers.category[t]]
            gates[t, :, width:] = first[0]
        second = _level(task, first, gates)
        for t in range(tasks):
            hidden[t, start : start + BLOCK] = second[t]
            _tower(towers, t, second[t], out[start : start + BLOCK])


@kernel
def _level(a: Level, x: Array, gate_inputs: Array) -> Array:
    """One level: x [inputs, M, V], gate_inputs [1 or O, M, W] -> [O, M, Z]."""
    groups, examples = len(a.pick), x.shape[1]
    experts, width = a.affine.shape[1:]
    outputs = np.empty((experts, examples, width), np.float32)
    for group in range(groups):
        mine = x[a.pick[group]]
        _experts(a, group, _gated(a, group, mine) if len(a.down) else mine, outputs)
    mixed = np.zeros((len(a.gate), examples, width), np.float32)
    for output in range(len(a.gate)):
        logits = np.dot(gate_inputs[output % len(gate_inputs)], a.gate[output])
        _mix(a, output, logits, outputs, mixed[output])
    return mixed


@kernel
def _gated(a: Level, group: int, x: Array) -> Array:
    """A group's own view of its input: [M, V] -> [M, V]."""
    rank, one = a.up.shape[2], np.float32(1)
    low = np.dot(x, a.down[group])
    left = np.dot(np.ascontiguousarray(low[:, :rank]), a.up[group, 0])
    right = np.dot(np.ascontiguousarray(low[:, rank : 2 * rank]), a.up[group, 1])
    for m in range(len(x)):
        second = _sigmoid(low[m, 2 * rank] + a.choice[group])
        line, other, mine = left[m], right[m], x[m]
        for v in range(x.shape[1]):
            line[v] = np.float32(2) * mine[v] * ((one - second) * _sigmoid(line[v]) + second * _sigmoid(other[v]))
    return left


@kernel
def _experts(a: Level, group: int, x: Array, out: Array) -> None:
    """The experts of a group: x [M, V] -> their places in out [E, M, Z]."""
    experts, width = a.affine.shape[1:]
    each = experts // len(a.pick)
    hidden = _layer(x, a.first[group], a.first_bias[group], len(a.widths) == 1)
    for k in range(each):
        expert = group * each + k
        y = np.ascontiguousarray(hidden[:, k * a.widths[0] : (k + 1) * a.widths[0]])
        weight, behind = 0, 0
        for layer in range(1, len(a.widths)):
            inputs, outputs = a.widths[layer - 1], a.widths[layer]
            at = weight + expert * inputs * outputs
            w = a.weights[at : at + inputs * outputs].reshape(inputs, outputs)
            bias = a.biases[behind + expert * outputs : behind + (expert + 1) * outputs]
            y = _layer(y, w, bias, layer == len(a.widths) - 1)
            weight, behind = weight + experts * inputs * outputs, behind + experts * outputs
        scale, shift = a.affine[0, expert], a.affine[1, expert]
        for m in range(len(y)):
            for z in range(width):
                u = y[m, z] * scale[z] + shift[z]
                out[expert, m, z] = u * _sigmoid(u)


@kernel
def _layer(x: Array, weight: Array, bias: Array, last: bool) -> Array:
    """An affine map, with Swish behind it unless it is the last one: x [M, in], weight [in, out], bias [out] -> [M, out]."""
    y = np.dot(x, weight)
    for m in range(len(y)):
        for z in range(len(bias)):
            u = y[m, z] + bias[z]
            y[m, z] = u if last else u * _sigmoid(u)
    return y


@kernel
def _mix(a: Level, output: int, logits: Array, experts: Array, out: Array) -> None:
    """Add to out [M, Z] an output's mixtures of experts [E, M, Z] by its gate's logits [M, E + own], which are overwritten."""
    reach, own = a.reach[output], a.own
    places, count, shares = len(reach), len(experts), np.zeros(len(reach), np.float32)
    for m in range(len(out)):
        line, mixed = logits[m], out[m]
        line += a.gate_bias[output]
        highest, total = line[reach[-1]], np.float32(0)
        for expert in reach:
            if expert >= 0:
                highest = max(highest, line[expert])
        for place in range(places):
            if reach[place] >= 0:
                shares[place] = _exp(line[reach[place]] - highest)
                total += shares[place]
        for place in range(places):
            shares[place] /= total
        if own == 1:
            shares[-1] += _sigmoid(line[count])
        elif own:
            _add_softmax(line[count:], shares[places - own :])
        for place in range(places):
            if reach[place] >= 0:
                share, mine = shares[place], experts[reach[place], m]
                for z in range(len(mixed)):
                    mixed[z] += share * mine[z]


@kernel
def _add_softmax(logits: Array, out: Array) -> None:
    highest, total = logits[0], np.float32(0)
    for k in range(len(logits)):
        highest = max(highest, logits[k])
    for k in range(len(logits)):
        logits[k] = _exp(logits[k] - highest)
        total += logits[k]
    for k in range(len(logits)):
        out[k] += logits[k] / total


@kernel
def _tower(a: Towers, task: int, x: Array, out: Array) -> None:
    """A task's logits: x [M, Z] -> out [M, tasks], its column."""
    weight, behind, tasks, y = 0, 0, len(a.category), x
    for layer in range(len(a.widths) - 1):
        inputs, outputs = a.widths[layer], a.widths[layer + 1]
        at = weight + task * inputs * outputs
        w = a.weights[at : at + inputs * outputs].reshape(inputs, outputs)
        y = _layer(y, w, a.biases[behind + task * outputs : behind + (task + 1) * outputs], layer == len(a.widths) - 2)
        weight, behind = weight + tasks * inputs * outputs, behind + tasks * outputs
    for m in range(len(y)):
        out[m, task] = y[m, 0]
