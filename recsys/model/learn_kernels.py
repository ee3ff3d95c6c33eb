"""The gradients of the ranker in compiled calls: Numba, no GIL, one thread; matrix products by BLAS. Arrays are contiguous float32.

With `fused_kernels.py` and `gather.py`, which have the element-wise parts, this is all that a step of training computes. The torch modules are
the definition: `tests/unit/test_model_learning.py`. Callers give all room for results.

Legend: G groups, N rows, I inputs, O outputs, Z width; M candidates, R requests, n present entries of a request, S of all requests, P pairs
of a candidate and such an entry, those of one candidate side by side, D width of an entry, H width of the first attention layer, T tasks.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from recsys.model.fused_kernels import _exp, _sigmoid, kernel

Array = np.ndarray[Any, Any]


@kernel
def layer(x: Array, weight: Array, bias: Array, out: Array) -> None:
    """Affine maps: x [G, N, I], weight [G, I, O], bias [G, 1, O] -> out [G, N, O]."""
    for group in range(len(weight)):
        line = out[group]
        np.dot(x[group], weight[group], line)
        for n in range(line.shape[0]):
            for o in range(line.shape[1]):
                line[n, o] += bias[group, 0, o]


@kernel
def layer_back(x: Array, weight: Array, g: Array, gx: Array, gweight: Array, gbias: Array) -> None:
    """Gradients of `layer` for g [G, N, O]."""
    for group in range(len(weight)):
        np.dot(x[group].T, g[group], gweight[group])
        np.dot(g[group], weight[group].T, gx[group])
        _sum_rows(g[group], gbias[group, 0])


@kernel
def wide_layer(x: Array, weight: Array, bias: Array, out: Array) -> None:
    """`layer` of one x [N, I] for all groups, by one product: thin ones, of a gate's few columns, leave most registers empty."""
    groups, _, width = weight.shape
    both = np.dot(x, _side_by_side(weight))
    for n in range(len(x)):
        for group in range(groups):
            for o in range(width):
                out[group, n, o] = both[n, group * width + o] + bias[group, 0, o]


@kernel
def wide_layer_back(x: Array, weight: Array, g: Array, gx: Array, gweight: Array, gbias: Array) -> None:
    """Gradients of `wide_layer` for g [G, N, O]."""
    both = _side_by_side(g)
    np.dot(both, _side_by_side(weight).T, gx)
    _apart(np.dot(x.T, both), gweight)
    for group in range(len(weight)):
        _sum_rows(g[group], gbias[group, 0])


@kernel
def _side_by_side(x: Array) -> Array:
    """[G, N, O] -> [N, G O]."""
    groups, rows, width = x.shape
    out = np.empty((rows, groups * width), x.dtype)
    for group in range(groups):
        for n in range(rows):
            for o in range(width):
                out[n, group * width + o] = x[group, n, o]
    return out


@kernel
def _apart(x: Array, out: Array) -> None:
    """[N, G O] -> [G, N, O]."""
    groups, rows, width = out.shape
    for group in range(groups):
        for n in range(rows):
            for o in range(width):
                out[group, n, o] = x[n, group * width + o]


@kernel
def _sum_rows(x: Array, out: Array) -> None:
    out[:] = 0
    for n in range(x.shape[0]):
        for o in range(x.shape[1]):
            out[o] += x[n, o]


@kernel
def silu(x: Array, out: Array) -> None:
    """Swish, of flat arrays."""
    for i in range(len(x)):
        out[i] = x[i] * _sigmoid(x[i])


@kernel
def silu_back(g: Array, x: Array) -> None:
    """Gradient of `silu`, in place of g."""
    for i in range(len(x)):
        s = _sigmoid(x[i])
        g[i] *= s * (1 + x[i] * (1 - s))


@kernel
def gate_maps(x: Array, down: Array, bias: Array, up: Array, low: Array, gates: Array, choice: Array) -> None:
    """The low-rank maps of feature gates: x [G or 1, N, V], down [G, V, 2 r + 1], bias [G, 1, 1], up [G, 2, r, V] -> low
    [2, G, N, r], gates [2, G, N, V], choice [G, N]."""
    groups, _, width = down.shape
    rank, shared = up.shape[2], len(x) < groups
    both = np.dot(x[0], _side_by_side(down) if shared else down[0])
    for group in range(groups):
        start = group * width if shared else 0
        if group and not shared:
            both = np.dot(x[group], down[group])
        for n in range(len(both)):
            choice[group, n] = both[n, start + 2 * rank] + bias[group, 0, 0]
            for r in range(rank):
                low[0, group, n, r] = both[n, start + r]
                low[1, group, n, r] = both[n, start + rank + r]
        for part in range(2):
            np.dot(low[part, group], up[group, part], gates[part, group])


@kernel
def gate_maps_back(
    x: Array,
    weights: Any,
    low: Array,
    ggates: Array,
    gchoice: Array,
    gx: Array,
    gweights: Any,
) -> None:
    """Gradients of `gate_maps`; gx [G or 1, N, V] is added to. `weights`, `gweights`: down, bias and up, and room for theirs."""
    down, _, up = weights
    gdown, gbias, gup = gweights
    groups, _, width = down.shape
    rank, shared, rows = up.shape[2], len(x) < groups, x.shape[1]
    glow = np.empty((rows, groups * width if shared else width), np.float32)
    for group in range(groups):
        start, total = group * width if shared else 0, np.float32(0)
        for part in range(2):
            np.dot(low[part, group].T, ggates[part, group], gup[group, part])
            back = np.dot(ggates[part, group], up[group, part].T)
            for n in range(rows):
                for r in range(rank):
                    glow[n, start + part * rank + r] = back[n, r]
        for n in range(rows):
            glow[n, start + 2 * rank] = gchoice[group, n]
            total += gchoice[group, n]
        gbias[group, 0, 0] = total
        if not shared:
            np.dot(x[group].T, glow, gdown[group])
            gx[group] += np.dot(glow, down[group].T)
    if shared:
        _apart(np.dot(x[0].T, glow), gdown)
        gx[0] += np.dot(glow, _side_by_side(down).T)


@kernel
def attend_first(of: Any, weights: Any, biases: Any, out: Array) -> None:
    """The first attention layer of each pair: `of` entries [S, D], those of request r from starts[r] on, request [M] and candidates
    [M, D] -> out [P, H]. `weights`: of the entry and of both multiplied, each [D, H]; `biases`: of the candidate [M, H], of the rank, of
    the time gap, and each entry's gap [S].

    The candidate is put into the entry's weights, so that a pair costs one product.
    """
    entries, starts, request, candidates = of
    entry, product = weights
    own, rank, gap, gaps = biases
    at = 0
    fold = np.empty_like(entry)
    for m in range(len(request)):
        start, stop = starts[request[m]], starts[request[m] + 1]
        if start == stop:
            continue
        for d in range(fold.shape[0]):
            for h in range(fold.shape[1]):
                fold[d, h] = entry[d, h] + candidates[m, d] * product[d, h]
        np.dot(entries[start:stop], fold, out[at : at + stop - start])
        for n in range(stop - start):
            line = out[at + n]
            for h in range(len(line)):
                line[h] += own[m, h] + rank[n, h]
            if len(gap):
                line += gap[gaps[start + n]]
        at += stop - start


@kernel
def attend_first_back(g: Array, of: Any, weights: Any, gaps: Array, back: Any) -> None:
    """Gradients of `attend_first` for g [P, H]. `back` has room for those of entries (added to), candidates, both weights, and the
    biases of candidate, rank and gap; all but the candidate's bias come as zeros."""
    entries, starts, request, candidates = of
    entry, product = weights
    gentries, gcandidates, gentry, gproduct, gown, grank, ggap = back
    at = 0
    fold = np.empty_like(entry)
    for m in range(len(request)):
        start, stop = starts[request[m]], starts[request[m] + 1]
        gown[m] = 0
        if start == stop:
            continue
        mine = g[at : at + stop - start]
        for d in range(fold.shape[0]):
            for h in range(fold.shape[1]):
                fold[d, h] = entry[d, h] + candidates[m, d] * product[d, h]
        gentries[start:stop] += np.dot(mine, fold.T)
        gfold = np.dot(entries[start:stop].T, mine)
        for d in range(fold.shape[0]):
            c, total = candidates[m, d], np.float32(0)
            for h in range(fold.shape[1]):
                gentry[d, h] += gfold[d, h]
                gproduct[d, h] += c * gfold[d, h]
                total += product[d, h] * gfold[d, h]
            gcandidates[m, d] += total
        for n in range(stop - start):
            for h in range(mine.shape[1]):
                gown[m, h] += mine[n, h]
                grank[n, h] += mine[n, h]
            if len(ggap):
                ggap[gaps[start + n]] += mine[n]
        at += stop - start


@kernel
def attend_pool(scores: Array, of: Any, softmax: bool, weights: Array, out: Array) -> None:
    """From scores [P] to weights [P], and each candidate's sum of its entries by weight -> out [M, D]. `of`: see `attend_first`."""
    entries, starts, request, _ = of
    at = 0
    for m in range(len(request)):
        start, count = starts[request[m]], starts[request[m] + 1] - starts[request[m]]
        out[m] = 0
        if softmax and count:
            highest, total = scores[at], np.float32(0)
            for n in range(count):
                highest = max(highest, scores[at + n])
            for n in range(count):
                weights[at + n] = _exp(scores[at + n] - highest)
                total += weights[at + n]
            for n in range(count):
                weights[at + n] /= total
        for n in range(count):
            if not softmax:
                weights[at + n] = scores[at + n] / np.float32(math.sqrt(count))
            weight, line = weights[at + n], entries[start + n]
            for d in range(len(line)):
                out[m, d] += weight * line[d]
        at += count


@kernel
def attend_pool_back(g: Array, of: Any, softmax: bool, weights: Array, back: Any) -> None:
    """Gradients of `attend_pool` for g [M, D]: `back` is room for those of scores [P] and entries [S, D] (added to)."""
    entries, starts, request, _ = of
    gscores, gentries = back
    at = 0
    for m in range(len(request)):
        start, count = starts[request[m]], starts[request[m] + 1] - starts[request[m]]
        mean = np.float32(0)
        for n in range(count):
            dot, weight = np.float32(0), weights[at + n]
            for d in range(g.shape[1]):
                dot += g[m, d] * entries[start + n, d]
                gentries[start + n, d] += weight * g[m, d]
            gscores[at + n] = dot
            mean += dot * weight
        for n in range(count):
            if softmax:
                gscores[at + n] = weights[at + n] * (gscores[at + n] - mean)
            else:
                gscores[at + n] /= np.float32(math.sqrt(count))
        at += count


@kernel
def mean_pool(history: Array, mask: Array, out: Array) -> None:
    """Mean of each request's present entries: history [R, T, D], mask [R, T] -> out [R, D]."""
    for r in range(len(history)):
        out[r] = 0
        count = max(1, mask[r].sum())
        for t in range(history.shape[1]):
            if mask[r, t]:
                for d in range(history.shape[2]):
                    out[r, d] += history[r, t, d]
        for d in range(history.shape[2]):
            out[r, d] /= np.float32(count)


@kernel
def mean_pool_back(g: Array, mask: Array, ghistory: Array) -> None:
    """Add the gradient of `mean_pool` for g [R, D]."""
    for r in range(len(g)):
        count = np.float32(max(1, mask[r].sum()))
        for t in range(ghistory.shape[1]):
            if mask[r, t]:
                for d in range(ghistory.shape[2]):
                    ghistory[r, t, d] += g[r, d] / count


@kernel
def add_rows(source: Array, to: Array, out: Array) -> None:
    """Add each row of source [N, D] to out at row to[n]."""
    for n in range(len(source)):
        for d in range(source.shape[1]):
            out[to[n], d] += source[n, d]


@kernel
def settle(moments: Array, running: Any, rate: float, learned: Any, out: Array) -> None:
    """Move a norm's running mean and variance (`running`, with the least variance) by `rate` towards a batch's `moments` [2, F], and
    say what it does now, out [6, F]: scale and shift with what it learned (gain and bias), running mean and 1 / std, and those of the
    batch. A rate of 0 moves nothing, and there is no batch."""
    mean, var, epsilon = running
    gain, bias = learned
    one = np.float32(1)
    for f in range(len(mean)):
        of, spread = np.float32(moments[0, f]), np.float32(moments[1, f])
        if rate > 0:
            delta = of - mean[f]
            new = var[f] + rate * (spread + (one - rate) * delta * delta - var[f])
            if np.isfinite(new):  # one overflow must not poison the statistics for ever
                mean[f] += rate * delta
                var[f] = new
        rstd = one / np.sqrt(var[f] + epsilon)
        out[0, f] = gain[f] * rstd
        out[1, f] = bias[f] - mean[f] * out[0, f]
        out[2, f], out[3, f] = mean[f], rstd
        out[4, f], out[5, f] = of, one / np.sqrt(spread + epsilon)


@kernel
def finite(x: Array) -> bool:
    """Whether all of a flat array is."""
    total = np.float32(0)
    for i in range(len(x)):
        total += x[i] * np.float32(0)
    return bool(total == 0)
