"""The element-wise parts of the networks, forward and backward, each in one pass: Numba, no GIL, one thread.

What torch does op by op costs more in memory traffic and in calls than in arithmetic. Arrays are contiguous, float32 (or
float64, for tests); callers give all room. Compiled at first use and kept on disk: see `fused.warm_up`.

Legend: G groups, M examples, V width, E experts, K experts of a group, O outputs, Z width of an expert's output, F features.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic, overload

from recsys.compiled import compiled as compile_

Array = np.ndarray[Any, Any]
compiled = threading.Event()
"""Set once what `fused.warm_up` compiles can be called without waiting. What learning alone calls: `training.learner.ready`."""

_LOG2E = np.float32(1.4426950408889634)
_EXP2 = tuple(
    np.float32(c) for c in (1.5353362e-4, 1.3398874e-3, 9.618437e-3, 5.5503324e-2, 2.4022648e-1, 6.9314718e-1, 1.0)
)
"""2^f for f in ±1/2 by its power series: relative error below 2e-7, as float32 can tell."""


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Sums may be reordered to use wide registers; infinities and NaN keep their meaning."""
    flags = {"reassoc", "contract", "arcp", "nsz", "afn"}
    return compile_(function, fastmath=flags, error_model="numpy")


@intrinsic
def _as_float(_typing: Any, bits: Any) -> Any:
    def emit(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), emit


def _exp(x: Any) -> Any:
    return math.exp(x)


@overload(_exp, inline="always")
def _exp_of(x: Any) -> Any:
    if x != types.float32:

        def exact(x: Any) -> Any:
            return math.exp(x)

        return exact

    def fast(x: Any) -> Any:
        scaled = min(max(x, np.float32(-87.0)), np.float32(87.0)) * _LOG2E
        whole = np.floor(scaled + np.float32(0.5))
        part = scaled - whole
        power = _EXP2[0]
        power = power * part + _EXP2[1]
        power = power * part + _EXP2[2]
        power = power * part + _EXP2[3]
        power = power * part + _EXP2[4]
        power = power * part + _EXP2[5]
        power = power * part + _EXP2[6]
        return power * _as_float((np.int32(whole) + np.int32(127)) << np.int32(23))

    return fast


@numba.njit(inline="always")
def _sigmoid(x: Any) -> Any:
    one = type(x)(1)
    return one / (one + _exp(-x))


@kernel
def feature_gate(x: Array, gates: Array, choice: Array, out: Array) -> None:
    """out = x * 2 ((1 - s) sigmoid(gates[0]) + s sigmoid(gates[1])), s = sigmoid(choice): x [G or 1, M, V], gates [2, G, M, V],
    choice [G, M], out [G, M, V]."""
    groups, examples, width = out.shape
    for group in range(groups):
        mine = x[group % x.shape[0]]
        for row in range(examples):
            second = _sigmoid(choice[group, row])
            first, one, two = 1 - second, gates[0, group, row], gates[1, group, row]
            for v in range(width):
                out[group, row, v] = 2 * mine[row, v] * (first * _sigmoid(one[v]) + second * _sigmoid(two[v]))


@kernel
def feature_gate_back(
    g: Array, x: Array, gates: Array, choice: Array, gx: Array, ggates: Array, gchoice: Array
) -> None:
    """Gradients of `feature_gate` for g [G, M, V]; gx [G or 1, M, V] is added to."""
    groups, examples, width = g.shape
    for group in range(groups):
        at = group % x.shape[0]
        for row in range(examples):
            second = _sigmoid(choice[group, row])
            first, total = 1 - second, type(second)(0)
            for v in range(width):
                a, b = _sigmoid(gates[0, group, row, v]), _sigmoid(gates[1, group, row, v])
                factor = 2 * g[group, row, v]
                gx[at, row, v] += factor * (first * a + second * b)
                factor *= x[at, row, v]
                ggates[0, group, row, v] = factor * first * a * (1 - a)
                ggates[1, group, row, v] = factor * second * b * (1 - b)
                total += factor * (b - a)
            gchoice[group, row] = total * first * second


@kernel
def moments(x: Array, out: Array) -> None:
    """Mean and variance over M: x [G, M, F], out [2, G, F] float64."""
    groups, examples, width = x.shape
    for group in range(groups):
        mean, var = out[0, group], out[1, group]
        mean[:], var[:] = 0.0, 0.0
        for row in range(examples):
            for f in range(width):
                mean[f] += x[group, row, f]
        for f in range(width):
            mean[f] /= examples
        for row in range(examples):
            for f in range(width):
                var[f] += (x[group, row, f] - mean[f]) ** 2
        for f in range(width):
            var[f] /= examples


@kernel
def norm_silu(x: Array, affine: Array, out: Array) -> None:
    """out = silu(scale x + shift): x, out [G, M, F], affine [2, G, F] scale and shift."""
    groups, examples, width = x.shape
    for group in range(groups):
        scale, shift = affine[0, group], affine[1, group]
        for row in range(examples):
            for f in range(width):
                u = x[group, row, f] * scale[f] + shift[f]
                out[group, row, f] = u * _sigmoid(u)


@kernel
def norm_silu_back(g: Array, x: Array, affine: Array, batch: Array, through: bool, gx: Array, sums: Array) -> None:
    """Gradient of `norm_silu`: sums [2, G, F] float64 get those of shift and scale; batch [2, G, F] is the batch's mean and
    1 / std, through which gx flows as in batch normalisation if `through`."""
    groups, examples, width = x.shape
    for group in range(groups):
        scale, shift, total, product = affine[0, group], affine[1, group], sums[0, group], sums[1, group]
        total[:], product[:] = 0.0, 0.0
        for row in range(examples):
            for f in range(width):
                u = x[group, row, f] * scale[f] + shift[f]
                s = _sigmoid(u)
                gu = g[group, row, f] * s * (1 + u * (1 - s))
                gx[group, row, f] = gu
                total[f] += gu
                product[f] += gu * x[group, row, f]
        _through(gx[group], x[group], scale, batch[:, group], through, total, product)


@numba.njit(inline="always")
def _through(gu: Array, x: Array, scale: Array, batch: Array, through: bool, total: Array, product: Array) -> None:
    """From the gradient of scale x + shift to that of x, in place."""
    examples, width = x.shape
    mean, rstd = batch[0], batch[1]
    for row in range(examples):
        for f in range(width):
            centred = gu[row, f]
            if through:
                slope = (product[f] - mean[f] * total[f]) * rstd[f] * rstd[f]
                centred -= (total[f] + (x[row, f] - mean[f]) * slope) / examples
            gu[row, f] = scale[f] * centred


@kernel
def dice(x: Array, affine: Array, alpha: Array, out: Array) -> None:
    """out = x (alpha + (1 - alpha) sigmoid(scale x + shift)): x, out [M, F], affine [2, F], alpha [F]; out may be x."""
    examples, width = x.shape
    scale, shift = affine[0], affine[1]
    for row in range(examples):
        for f in range(width):
            p = _sigmoid(x[row, f] * scale[f] + shift[f])
            out[row, f] = x[row, f] * (alpha[f] + (1 - alpha[f]) * p)


@kernel
def dice_back(g: Array, x: Array, affine: Array, alpha: Array, batch: Array, through: bool, out: Array) -> None:
    """Gradient of `dice`: out [M + 1, F] is that of x, and in the last row that of alpha; batch [2, F] as in `norm_silu_back`."""
    examples, width = x.shape
    scale, shift = affine[0], affine[1]
    total, product, slope = np.zeros(width), np.zeros(width), np.zeros(width)
    for row in range(examples):
        for f in range(width):
            p = _sigmoid(x[row, f] * scale[f] + shift[f])
            moved = g[row, f] * x[row, f]
            gu = moved * (1 - alpha[f]) * p * (1 - p)
            out[row, f] = gu
            total[f] += gu
            product[f] += gu * x[row, f]
            slope[f] += moved * (1 - p)
    _through(out[:examples], x, scale, batch, through, total, product)
    for row in range(examples):
        for f in range(width):
            p = _sigmoid(x[row, f] * scale[f] + shift[f])
            out[row, f] += g[row, f] * (alpha[f] + (1 - alpha[f]) * p)
    for f in range(width):
        out[examples, f] = slope[f]


@kernel
def mix(logits: Array, experts: Array, reach: Array, own: int, shares: Array, out: Array) -> None:
    """Mix the experts in reach: logits [O, M, E + K], experts [E, M, Z], reach [O, ...] expert numbers (-1: none; the last
    `own` are the output's own) -> shares [O, M, E + K], out [O, M, Z].

    The first E shares are a softmax over the reach; the last `own` are a softmax, or with one expert a sigmoid, and are
    added once more on the output's own experts.
    """
    outputs, examples, _ = logits.shape
    num_experts, _, width = experts.shape
    places = reach.shape[1]
    for output in range(outputs):
        for row in range(examples):
            line, share, total = logits[output, row], shares[output, row], out[output, row]
            share[:], total[:] = 0, 0
            _softmax(line, share, reach[output])
            if own == 1:
                share[num_experts] = _sigmoid(line[num_experts])
            elif own:
                _softmax_range(line, share, num_experts, num_experts + own)
            for place in range(places):
                expert = reach[output, place]
                if expert >= 0:
                    weight = share[expert]
                    if place >= places - own:
                        weight += share[num_experts + place - (places - own)]
                    for z in range(width):
                        total[z] += weight * experts[expert, row, z]


@numba.njit(inline="always")
def _softmax(line: Array, share: Array, chosen: Array) -> None:
    highest, total = line[chosen[-1]], type(line[0])(0)
    for expert in chosen:
        if expert >= 0:
            highest = max(highest, line[expert])
    for expert in chosen:
        if expert >= 0:
            share[expert] = _exp(line[expert] - highest)
            total += share[expert]
    for expert in chosen:
        if expert >= 0:
            share[expert] /= total


@numba.njit(inline="always")
def _softmax_range(line: Array, share: Array, start: int, end: int) -> None:
    highest, total = line[start], type(line[0])(0)
    for place in range(start, end):
        highest = max(highest, line[place])
    for place in range(start, end):
        share[place] = _exp(line[place] - highest)
        total += share[place]
    for place in range(start, end):
        share[place] /= total


@kernel
def mix_back(g: Array, experts: Array, shares: Array, reach: Array, own: int, glogits: Array, gexperts: Array) -> None:
    """Gradients of `mix` for g [O, M, Z]; glogits and gexperts come as zeros."""
    outputs, examples, width = g.shape
    num_experts, places = experts.shape[0], reach.shape[1]
    for output in range(outputs):
        for row in range(examples):
            share, line = shares[output, row], glogits[output, row]
            for place in range(places):
                expert = reach[output, place]
                if expert >= 0:
                    dot, weight = type(share[0])(0), share[expert]
                    residual = place - (places - own)
                    if residual >= 0:
                        weight += share[num_experts + residual]
                    for z in range(width):
                        dot += g[output, row, z] * experts[expert, row, z]
                        gexperts[expert, row, z] += weight * g[output, row, z]
                    line[expert] = dot
                    if residual >= 0:
                        line[num_experts + residual] = dot
            _softmax_back(share[:num_experts], line[:num_experts])
            if own == 1:
                line[num_experts] *= share[num_experts] * (1 - share[num_experts])
            elif own:
                _softmax_back(share[num_experts:], line[num_experts:])


@numba.njit(inline="always")
def _softmax_back(share: Array, line: Array) -> None:
    mean = type(share[0])(0)
    for place in range(len(share)):
        mean += share[place] * line[place]
    for place in range(len(share)):
        line[place] = share[place] * (line[place] - mean)
