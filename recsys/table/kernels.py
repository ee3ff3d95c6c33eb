"""The loops of the CPU table, in Numba: no Python object, no GIL, one thread. All in one file, because Numba's on-disk
cache only sees changes of the file a kernel is in. Compiled at first use, not at import: see `cpu.warm_up`.

Legend: N keys of a call, D width of values, S width of state, U unique rows. `entries` [size, 2] is the index: key, and
slot << 32 | row, or EMPTY; size is a power of two. `links` [rows, 2] is a list of rows in order of change (previous,
next); row 0 is its ends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numba
import numpy as np

from recsys.types import Float32, Int32, Int64

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

EMPTY = -1
SGD, ADAGRAD, ROWWISE_ADAGRAD = 0, 1, 2


def _kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # no folder for the cache is writable: compile in each process
        return numba.njit(nogil=True)(function)


@_kernel
def _home(slot: int, key: int, mask: int) -> int:
    x = np.uint64(key) + np.uint64(slot) * np.uint64(0xD1342543DE82EF95) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.int64(x ^ (x >> np.uint64(31))) & mask  # type: ignore[return-value]


@_kernel
def find(entries: Int64, slots: Int32, keys: Int64, fallback: Int32, rows: Int32, values: Float32, out: Float32) -> int:
    """Rows [N] of the keys, `fallback[slot]` where missing; `out` [N, D] gets their values, if it is not empty.

    Returns the position of the first slot that has no fallback, or -1.
    """
    mask = entries.shape[0] - 1
    for n in range(slots.shape[0]):
        slot, key = np.int64(slots[n]), keys[n]
        if slot < 0 or slot >= fallback.shape[0] or fallback[slot] < 0:
            return n
        i = _home(slot, key, mask)
        while entries[i, 1] != EMPTY and (entries[i, 0] != key or entries[i, 1] >> 32 != slot):
            i = (i + 1) & mask
        rows[n] = fallback[slot] if entries[i, 1] == EMPTY else entries[i, 1] & 0xFFFFFFFF
    for n in range(out.shape[0]):
        row = rows[n]
        for d in range(out.shape[1]):
            out[n, d] = values[row, d]
    return -1


@_kernel
def insert(entries: Int64, free: Int32, counters: Int64, slots: Int32, keys: Int64, rows: Int32) -> None:
    """Rows [N] of the keys, made where missing from freed rows first. `counters`: next unused row, freed rows."""
    mask = entries.shape[0] - 1
    for n in range(slots.shape[0]):
        slot, key = np.int64(slots[n]), keys[n]
        i = _home(slot, key, mask)
        while entries[i, 1] != EMPTY and (entries[i, 0] != key or entries[i, 1] >> 32 != slot):
            i = (i + 1) & mask
        if entries[i, 1] == EMPTY:
            if counters[1] > 0:
                counters[1] -= 1
                row = np.int64(free[counters[1]])
            else:
                row = counters[0]
                counters[0] += 1
            entries[i, 0] = key
            entries[i, 1] = slot << 32 | row
        rows[n] = entries[i, 1] & 0xFFFFFFFF


@_kernel
def remove(entries: Int64, free: Int32, counters: Int64, slots: Int32, keys: Int64, rows: Int32) -> int:
    """Take the keys out of the index and free their rows, which are returned in `rows`; how many there were."""
    mask = entries.shape[0] - 1
    removed = 0
    for n in range(slots.shape[0]):
        slot, key = np.int64(slots[n]), keys[n]
        hole = _home(slot, key, mask)
        while entries[hole, 1] != EMPTY and (entries[hole, 0] != key or entries[hole, 1] >> 32 != slot):
            hole = (hole + 1) & mask
        if entries[hole, 1] == EMPTY:
            continue
        row = entries[hole, 1] & 0xFFFFFFFF
        free[counters[1]] = row
        counters[1] += 1
        rows[removed] = row
        removed += 1
        # Close the gap: an entry moves back unless its home lies behind the hole. So the index needs no tombstones.
        i = (hole + 1) & mask
        while entries[i, 1] != EMPTY:
            home = _home(entries[i, 1] >> 32, entries[i, 0], mask)
            if (i - home) & mask >= (i - hole) & mask:
                entries[hole, 0] = entries[i, 0]
                entries[hole, 1] = entries[i, 1]
                hole = i
            i = (i + 1) & mask
        entries[hole, 1] = EMPTY
    return removed


@_kernel
def rebuild(entries: Int64, owner_slot: Int32, owner_key: Int64, first: int, end: int) -> None:
    """Fill an empty index with the live rows of [first, end)."""
    mask = entries.shape[0] - 1
    for row in range(first, end):
        slot = np.int64(owner_slot[row])
        if slot < 0:
            continue
        i = _home(slot, owner_key[row], mask)
        while entries[i, 1] != EMPTY:
            i = (i + 1) & mask
        entries[i, 0] = owner_key[row]
        entries[i, 1] = slot << 32 | row


@_kernel
def combine(rows: Int32, gradients: Float32, place: Int32, unique: Int32, sums: Array, combined: Float32) -> int:
    """Sum the gradients of equal rows in float64, in order of first occurrence; U. `place` is zeros, and left so."""
    count = 0
    for n in range(rows.shape[0]):
        row = rows[n]
        at = place[row] - 1
        if at < 0:
            at = count
            count += 1
            place[row] = count
            unique[at] = row
            for d in range(gradients.shape[1]):
                sums[at, d] = gradients[n, d]
        else:
            for d in range(gradients.shape[1]):
                sums[at, d] += gradients[n, d]
    for at in range(count):
        place[unique[at]] = 0
        for d in range(gradients.shape[1]):
            combined[at, d] = sums[at, d]
    return count


@_kernel
def step(rows: Int32, gradients: Float32, values: Float32, state: Float32, spans: Int64, rates: Array) -> None:
    """One optimiser step of unique rows. `spans`: start, end, start of state, optimiser; `rates`: rate, epsilon.

    SGD: w -= lr g. Adagrad (Duchi et al. 2011): s += g², w -= lr g / (√s + ε). Row-wise Adagrad: one s for the segment,
    s += mean(g²), the convention of FBGEMM and TorchRec. Arithmetic in float64, storage in float32.
    """
    for n in range(rows.shape[0]):
        row = rows[n]
        for segment in range(spans.shape[0]):
            start, end, at, optimizer = spans[segment, 0], spans[segment, 1], spans[segment, 2], spans[segment, 3]
            rate, epsilon = rates[segment, 0], rates[segment, 1]
            if optimizer == ADAGRAD:
                for d in range(start, end):
                    g = np.float64(gradients[n, d])
                    total = np.float64(state[row, at + d - start]) + g * g
                    state[row, at + d - start] = total
                    values[row, d] = values[row, d] - rate / (np.sqrt(total) + epsilon) * g
                continue
            if optimizer == ROWWISE_ADAGRAD:
                squares = 0.0
                for d in range(start, end):
                    g = np.float64(gradients[n, d])
                    squares += g * g
                total = np.float64(state[row, at]) + squares / (end - start)
                state[row, at] = total
                rate = rate / (np.sqrt(total) + epsilon)
            for d in range(start, end):
                values[row, d] = values[row, d] - rate * np.float64(gradients[n, d])


@_kernel
def mark(rows: Int32, links: Int32, changed: Int64, now: int) -> None:
    """Move rows to the end of the list of changes at time `now` (> 0), or, at 0, take them out. Row 0 ends the list.

    `changed` is 0 for rows outside the list and -1 for default rows, which never enter it.
    """
    for n in range(rows.shape[0]):
        row = rows[n]
        if changed[row] == now or changed[row] < 0:
            continue
        if changed[row] > 0:
            links[links[row, 0], 1] = links[row, 1]
            links[links[row, 1], 0] = links[row, 0]
        changed[row] = now
        if now > 0:
            last = links[0, 0]
            links[last, 1] = row
            links[row, 0] = last
            links[row, 1] = 0
            links[0, 0] = row


@_kernel
def changes(links: Int32, changed: Int64, after: int, out: Int32) -> int:
    """Rows changed later than `after`, newest first; how many."""
    count = 0
    row = links[0, 0]
    while row != 0 and changed[row] > after:
        out[count] = row
        count += 1
        row = links[row, 0]
    return count
