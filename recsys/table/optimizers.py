"""The loops of training: sum what is of one row, then one step of each row's optimisers, in Numba as `kernels.py`.

Legend: N keys of a call, D width of values, U unique rows; `at` [2, N]: row and position in the index of each key.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from recsys.table.intrinsics import prefetch
from recsys.table.kernels import MAX_STAMP, Index, Store, kernel
from recsys.types import Float32, Int32

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

SGD, ADAGRAD, ROWWISE_ADAGRAD = 0, 1, 2
_AHEAD = 8
"""Rows between asking for a row and changing it."""


@kernel
def combine(index: Index, slots: Int32, at: Int32, gradients: Float32, work: Int32, seen: Int32, sums: Any) -> int:
    """Which keys are the first of their row (work[u, 0]) and, where others have the same, which of `combined` is their
    sum (work[u, 1], else -1); float64 sums, in order of occurrence. Missing keys get the row of their place. Returns U,
    or -1 if a number is not finite.

    `seen`: zeros, a power of two, at least twice N: a hash table of the call, small enough for the cache.
    `sums`: float64 and float32 [N // 2, D], sums and `combined`.
    """
    count, dim = gradients.shape
    totals, combined = sums
    size = seen.shape[0]
    bits = gradients.view(np.int32)
    largest = np.int32(0)
    for n in range(count):
        for d in range(dim):
            largest = max(largest, bits[n, d] & np.int32(0x7FFFFFFF))
    if largest >= np.int32(0x7F800000):
        return -1
    unique = repeated = 0
    for n in range(count):
        if at[0, n] < 0:
            at[0, n] = index.place_of[slots[n]]
        row = at[0, n]
        i = np.int64((np.uint64(row) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)) & (size - 1)
        while seen[i] != 0 and at[0, work[seen[i] - 1, 0]] != row:
            i = (i + 1) & (size - 1)
        if seen[i] == 0:
            work[unique, 0] = n
            work[unique, 1] = -1
            unique += 1
            seen[i] = unique
            continue
        u = seen[i] - 1
        if work[u, 1] < 0:
            work[u, 1] = repeated
            for d in range(dim):
                totals[repeated, d] = gradients[work[u, 0], d]
            repeated += 1
        s = work[u, 1]
        for d in range(dim):
            totals[s, d] += gradients[n, d]
    for s in range(repeated):
        for d in range(dim):
            combined[s, d] = totals[s, d]
            if not np.isfinite(combined[s, d]):
                return -1
    return unique


@kernel
def step(index: Index, store: Store, at: Int32, work: Int32, gradients: Float32, combined: Float32, marks: Any) -> None:
    """One optimiser step of unique rows (`combine`); what has an entry gets `marks`: least stamp, code of the change."""
    entries, values = index.entries, store.values
    stamp, code = marks
    width = values.shape[1] * 4
    for u in range(work.shape[0]):
        if u + _AHEAD < work.shape[0]:
            n = work[u + _AHEAD, 0]
            for line in range(0, width, 64):
                prefetch(values.ctypes.data + np.int64(at[0, n]) * width + line)
            prefetch(store.state.ctypes.data + np.int64(at[0, n]) * store.state.shape[1] * 4)
            i = np.int64(max(at[1, n], 0))
            prefetch(entries.ctypes.data + i * 16)
            prefetch(index.changed.ctypes.data + i)
        n = work[u, 0]
        if work[u, 1] < 0:
            _step_row(store, np.int64(at[0, n]), gradients, n)
        else:
            _step_row(store, np.int64(at[0, n]), combined, work[u, 1])
        i = np.int64(at[1, n])
        if i >= 0:
            entry = entries[i, 1]
            entries[i, 1] = (entry & 0xFFFFFFFFFF) | max(stamp, (entry >> 40) & MAX_STAMP) << 40
            index.changed[i] = code


@kernel
def _step_row(store: Store, row: int, gradients: Float32, n: int) -> None:
    """SGD: w -= lr g. Adagrad (Duchi et al. 2011): s += g², w -= lr g / (√s + ε). Row-wise Adagrad: one s for the segment,
    s += mean(g²), the convention of FBGEMM and TorchRec. Arithmetic in float64, storage in float32.
    """
    for segment in range(store.spans.shape[0]):
        start, end = store.spans[segment, 0], store.spans[segment, 1]
        own, optimizer = store.spans[segment, 2], store.spans[segment, 3]
        rate, epsilon = store.rates[segment, 0], store.rates[segment, 1]
        values, gradient, state = store.values[row, start:end], gradients[n, start:end], store.state[row, own:]
        if optimizer == ADAGRAD:
            for d in range(values.shape[0]):
                g = np.float64(gradient[d])
                total = np.float64(state[d]) + g * g
                state[d] = total
                values[d] = values[d] - rate / (np.sqrt(total) + epsilon) * g
            continue
        if optimizer == ROWWISE_ADAGRAD:
            total = np.float64(state[0]) + _squares(gradient) / (end - start)
            state[0] = total
            rate = rate / (np.sqrt(total) + epsilon)
        for d in range(values.shape[0]):
            values[d] = values[d] - rate * np.float64(gradient[d])


@kernel
def _squares(x: Float32) -> float:
    """The sum of squares in eight lanes: a vector unit is as fast as it can be, and the order is always the same."""
    a = b = c = d = e = f = g = h = 0.0
    whole = x.shape[0] // 8
    for i in range(whole):
        a += np.float64(x[8 * i]) * np.float64(x[8 * i])
        b += np.float64(x[8 * i + 1]) * np.float64(x[8 * i + 1])
        c += np.float64(x[8 * i + 2]) * np.float64(x[8 * i + 2])
        d += np.float64(x[8 * i + 3]) * np.float64(x[8 * i + 3])
        e += np.float64(x[8 * i + 4]) * np.float64(x[8 * i + 4])
        f += np.float64(x[8 * i + 5]) * np.float64(x[8 * i + 5])
        g += np.float64(x[8 * i + 6]) * np.float64(x[8 * i + 6])
        h += np.float64(x[8 * i + 7]) * np.float64(x[8 * i + 7])
    total = a + b + c + d + e + f + g + h
    for i in range(8 * whole, x.shape[0]):
        total += np.float64(x[i]) * np.float64(x[i])
    return total
