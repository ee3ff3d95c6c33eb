"""The loops of training: chain the keys of one row, then one step of each row's optimisers, in Numba as `kernels.py`.

Arithmetic is in float64 and storage in float32 (or half); where a vector of sixteen is at hand, it is in float32, which moves
a step by some ten-millionths of itself.

Legend: N keys of a call, D width of values, U unique rows; `at` and `Store` as in `kernels.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from recsys.table.intrinsics import (
    adagrad8,
    bits_float,
    decode,
    encode,
    float_bits,
    load_float,
    prefetch,
    squares16,
    subtract16,
)
from recsys.table.kernels import Store, _mix, kernel, part
from recsys.types import Float32, Int32

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

SGD, ADAGRAD, ROWWISE_ADAGRAD, ADAM, FTRL = range(5)
BLOCK = 16
"""Rows whose steps go on side by side, while the rows of the next block are on their way."""
_U = np.uint64


@kernel
def largest(bits: Int32) -> int:
    """The largest magnitude of float32 numbers, of and as their bits: from 0x7F800000 on it is not finite."""
    most = np.int32(0)
    for n in range(bits.shape[0]):
        most = max(most, bits[n] & np.int32(0x7FFFFFFF))
    return int(most)


@kernel
def chain(at: Int32, work: Int32, seen: Int32) -> int:
    """Chain the keys of each row, in order of occurrence: work[0, u] is the first of unique row u, work[1, n] the key after
    key n, or -1. Returns U. `work` [3, N]: room; `seen`: zeros, a power of two, at least twice N.
    """
    count, mask = at.shape[1], _U(seen.shape[0] - 1)
    unique = 0
    for n in range(count):
        row = at[0, _U(n)]
        work[1, _U(n)] = -1
        i = ((_U(row) * _U(0x9E3779B97F4A7C15)) >> _U(32)) & mask
        while seen[i] != 0 and at[0, _U(work[0, _U(seen[i] - 1)])] != row:
            i = (i + _U(1)) & mask
        if seen[i] == 0:
            work[0, _U(unique)] = n
            work[2, _U(unique)] = n
            unique += 1
            seen[i] = unique
        else:
            u = _U(seen[i] - 1)
            work[1, _U(work[2, u])] = n
            work[2, u] = n
    return unique


@kernel
def overflows(gradients: Float32, work: Int32, unique: int, total: Array) -> bool:
    """Whether the sum of a row's gradients is no float32. `total` [D]: room."""
    for u in range(unique):
        _sum(gradients, work, work[0, u], total)
        for d in range(total.shape[0]):
            if not np.isfinite(np.float32(total[d])):
                return True
    return False


@part
def _sum(gradients: Float32, work: Int32, n: int, total: Array) -> None:
    """The float64 sum of a chain of gradients, in order."""
    gradient = gradients[n]
    for d in range(total.shape[0]):
        total[d] = gradient[d]
    n = work[1, n]
    while n >= 0:
        gradient = gradients[n]
        for d in range(total.shape[0]):
            total[d] += gradient[d]
        n = work[1, n]


@kernel
def step(store: Store, at: Int32, work: Int32, span: Any, gradients: Float32, room: Any, noise: Any) -> None:
    """One optimiser step of unique rows [start, stop) of `chain`, in blocks: a row's sum of squares, root and quotient take
    longer than its step, so those of a block go on side by side. `room`: float64 [D], float32 [BLOCK, D] twice (the second
    [BLOCK, 0] unless rounding is stochastic), float64 [BLOCK], int64 [BLOCK].

    `noise`: whether to round stochastically, head of its hash, and slots and keys [N] of the call.
    """
    values, state, dim = store.values, store.state, gradients.shape[1]
    total, sums, moved, _, sources = room
    width, wide = values.strides[0], state.strides[0]
    for block in range(span[0], span[1], BLOCK):
        end = min(block + BLOCK, span[1])
        for u in range(end if block > span[0] else block, min(end + BLOCK, span[1])):
            row = np.int64(at[0, _U(work[0, _U(u)])])
            for line in range(0, width, 64):
                prefetch(values.ctypes.data + row * width + line)
            for line in range(0, wide, 64):
                prefetch(state.ctypes.data + row * wide + line)
        for u in range(block, end):
            n = np.int64(work[0, _U(u)])
            sources[_U(u - block)] = gradients.ctypes.data + n * dim * 4
            if work[1, _U(n)] >= 0:
                combined = sums[u - block]
                _sum(gradients, work, n, total)
                for d in range(dim):
                    combined[d] = total[d]
                sources[_U(u - block)] = combined.ctypes.data
        for segment in range(store.spans.shape[0]):
            optimizer = store.spans[segment, 3]
            if optimizer in (SGD, ROWWISE_ADAGRAD):
                _step_scaled(store, segment, at, work[0, block:end], room)
            else:
                _step_each(store, segment, at, work[0, block:end], room)
        if noise[0]:
            for u in range(block, end):
                n = np.int64(work[0, _U(u)])
                key = noise[3][n] if at[1, _U(n)] >= 0 else 0
                mixed = _mix(_mix(_U(noise[2][n]) + _U(noise[1])) + _U(key))
                _store_drawn(store, np.int64(at[0, _U(n)]), moved[u - block], mixed)


@part
def _step_scaled(store: Store, segment: int, at: Int32, keys: Int32, room: Any) -> None:
    """The step of one segment of the rows of a block, those of the keys numbered in `keys`, where all values have one factor.
    SGD: w -= lr g. Row-wise Adagrad: one s for the segment, s += mean(g²), the convention of FBGEMM and TorchRec.
    """
    _, _, moved, factors, sources = room
    start, end = store.spans[segment, 0], store.spans[segment, 1]
    own, rate, epsilon = _U(store.spans[segment, 2]), store.rates[segment, 0], store.rates[segment, 1]
    values, state, count = store.values, store.state, keys.shape[0]
    size = end - start
    whole = size & ~15 if values.itemsize == 4 else 0
    for j in range(count):
        factors[j] = rate
    if store.spans[segment, 3] == ROWWISE_ADAGRAD:
        for j in range(count):
            held = _U(at[0, _U(keys[j])])
            total = np.float64(state[held, own]) + _squares(sources[j] + 4 * start, size) / size
            state[held, own] = total
            factors[j] = rate / (np.sqrt(total) + epsilon)
    for j in range(count):
        row = np.int64(at[0, _U(keys[j])])
        target, source = values.ctypes.data + row * values.strides[0] + 4 * start, sources[j] + 4 * start
        for d in range(0, whole, 16):
            subtract16(target + 4 * d, factors[j], source + 4 * d)
        for d in range(whole, size):
            old = values[_U(row), _U(start + d)]
            new = np.float64(decode(old)) - factors[j] * np.float64(load_float(source + 4 * d))
            if moved.shape[1] > 0:
                moved[_U(j), _U(start + d)] = new
            else:
                values[_U(row), _U(start + d)] = encode(np.float32(new), old)


@part
def _step_each(store: Store, segment: int, at: Int32, keys: Int32, room: Any) -> None:
    """The same where each value has its own state: Adagrad, Adam, FTRL."""
    _, _, moved, _, sources = room
    start, end = store.spans[segment, 0], store.spans[segment, 1]
    own, optimizer, rates = store.spans[segment, 2], store.spans[segment, 3], store.rates[segment]
    for j in range(keys.shape[0]):
        row = np.int64(at[0, _U(keys[j])])
        values, state, kept = store.values[row, start:end], store.state[row, own:], moved[j, start:end]
        source = sources[j] + 4 * start
        if optimizer == ADAM:
            _adam(values, source, state, rates, kept)
        elif optimizer == FTRL:
            _ftrl(values, source, state, rates, kept)
        else:
            _adagrad(values, source, state, rates, kept)


@part
def _adagrad(values: Array, source: int, state: Float32, rates: Array, kept: Float32) -> None:
    """Adagrad (Duchi et al. 2011): s += g², w -= lr g / (√s + ε)."""
    rate, epsilon = rates[0], rates[1]
    whole = values.shape[0] & ~7 if values.itemsize == 4 else 0
    for d in range(0, whole, 8):
        adagrad8(values.ctypes.data + 4 * d, state.ctypes.data + 4 * d, source + 4 * d, rate, epsilon)
    for d in range(whole, values.shape[0]):
        g = np.float64(load_float(source + 4 * d))
        total = np.float64(state[d]) + g * g
        state[d] = total
        _keep(values, kept, d, np.float64(decode(values[d])) - rate / (np.sqrt(total) + epsilon) * g)


@part
def _keep(values: Array, kept: Float32, d: int, value: float) -> None:
    """Store a new value; those that are to be rounded stochastically wait in `kept`."""
    if kept.shape[0] > 0:
        kept[d] = value
    else:
        values[d] = encode(np.float32(value), values[d])


@part
def _adam(values: Array, source: int, state: Float32, rates: Array, kept: Float32) -> None:
    """Adam (Kingma and Ba 2015, algorithm 1), its bias corrected by the row's own steps. State: means, squares, steps."""
    width = values.shape[0]
    rate, epsilon, beta1, beta2 = rates[0], rates[1], rates[2], rates[3]
    steps = np.float64(state[2 * width]) + 1.0
    state[2 * width] = steps
    first, second = 1.0 - beta1**steps, 1.0 - beta2**steps
    for d in range(width):
        g = np.float64(load_float(source + 4 * d))
        mean = beta1 * np.float64(state[d]) + (1.0 - beta1) * g
        square = beta2 * np.float64(state[width + d]) + (1.0 - beta2) * g * g
        state[d] = mean
        state[width + d] = square
        change = rate * (mean / first) / (np.sqrt(square / second) + epsilon)
        _keep(values, kept, d, np.float64(decode(values[d])) - change)


@part
def _ftrl(values: Array, source: int, state: Float32, rates: Array, kept: Float32) -> None:
    """FTRL-proximal (McMahan et al. 2013, algorithm 1). State: z, sums of squares."""
    width = values.shape[0]
    rate, beta, l1, l2 = rates[0], rates[2], rates[3], rates[4]
    for d in range(width):
        g = np.float64(load_float(source + 4 * d))
        before = np.float64(state[width + d])
        after = before + g * g
        z = np.float64(state[d]) + g - (np.sqrt(after) - np.sqrt(before)) / rate * np.float64(decode(values[d]))
        state[d] = z
        state[width + d] = after
        pull = (beta + np.sqrt(after)) / rate + l2
        _keep(values, kept, d, 0.0 if abs(z) <= l1 else -(z - np.copysign(l1, z)) / pull)


@part
def _store_drawn(store: Store, row: int, moved: Float32, mixed: Any) -> None:
    """Round to one of the two nearest halves, as `rows.round_stochastic`: the farther from 0 if a draw is below the share
    of the way to it. `mixed`: the hash of seed, slot and key. Counts the row's steps.
    """
    values, steps = store.values, store.state.shape[1] - 1
    mixed = mixed + _U(store.state[row, steps]) * _U(65536)
    store.state[row, steps] += np.float32(1)
    wide = values.itemsize == 2 and encode(np.float32(1), values[0, 0]) == 0x3F80  # bfloat16
    largest = 3.3895313892515355e38 if wide else 65504.0
    for d in range(values.shape[1]):
        draw = np.int64(_mix(mixed + _U(d)) >> _U(40))
        x = np.float32(min(max(moved[d], -largest), largest))
        bits = float_bits(x)
        cut, shift = (16, 8) if wide else (13, 11)
        low = bits & ((1 << cut) - 1)
        away = (1 << cut) if (draw >> shift) < low else 0
        rounded = bits_float(bits - low + away)
        steps_up = abs(x) * np.float32(2**24)
        if not wide and steps_up < 1024:  # below 2^-14 halves are multiples of 2^-24
            whole = np.floor(steps_up)
            whole += np.float32(draw) * np.float32(2**-24) < steps_up - whole
            rounded = np.copysign(np.float32(whole * np.float32(2**-24)), x)
        values[row, d] = encode(rounded, values[row, d])


@part
def _squares(source: int, size: int) -> float:
    """The sum of squares, sixteen at a time in float32, those sums and the rest in float64; the order is always the same."""
    total = 0.0
    for d in range(0, size & ~15, 16):
        total += np.float64(squares16(source + 4 * d))
    for d in range(size & ~15, size):
        x = np.float64(load_float(source + 4 * d))
        total += x * x
    return total
