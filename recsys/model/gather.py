"""From rows to columns and back: Numba, no GIL, one thread.

Legend: U unique rows of width W, N places with C columns, F fields of d values, M candidates.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from recsys.model.fused_kernels import kernel

Array = np.ndarray[Any, Any]
compiled = threading.Event()
"""Set once what requests call of this can be called without waiting for a compiler."""


@kernel
def unique(slots: Array, keys: Array, mask: Array, heads: Array, first: Array, places: Array) -> int:
    """Number the distinct (slot, key) pairs where `mask` holds, in order of first occurrence: slots, keys, mask, places [n].

    `first` [n] gets the position at which each was first seen, `places` its number (their count where the mask does not
    hold); `heads`, a power of two of at least 2 n entries, comes as -1. Exact: both are compared. Returns the count.
    """
    count, last = 0, len(heads) - 1
    for position in range(len(keys)):
        if not mask[position]:
            continue
        slot, key = slots[position], keys[position]
        mixed = (np.uint64(key) ^ (np.uint64(slot) << np.uint64(56))) * np.uint64(0x9E3779B97F4A7C15)
        at = np.int64((mixed ^ (mixed >> np.uint64(32))) & np.uint64(last))
        while heads[at] >= 0:
            other = first[heads[at]]
            if keys[other] == key and slots[other] == slot:
                break
            at = (at + 1) & last
        if heads[at] < 0:
            heads[at] = count
            first[count] = position
            count += 1
        places[position] = heads[at]
    for position in range(len(keys)):
        if not mask[position]:
            places[position] = count
    return count


@kernel
def take_fields(rows: Array, index: Array, starts: Array, out: Array) -> None:
    """Mean of each field's present columns: rows [U, W], index [N, C] (U: missing), starts [F + 1] -> out [N, F, d]; zeros
    where none is present."""
    places, fields, width = out.shape
    for place in range(places):
        for field in range(fields):
            line = out[place, field]
            line[:] = 0
            count = 0
            for column in range(starts[field], starts[field + 1]):
                row = index[place, column]
                if row < len(rows):
                    count += 1
                    for d in range(width):
                        line[d] += rows[row, d]
            if count > 1:
                for d in range(width):
                    line[d] /= count


@kernel
def take_fields_back(g: Array, index: Array, starts: Array, grows: Array) -> None:
    """Add the gradient of `take_fields` to grows [U, W]."""
    places, fields, width = g.shape
    for place in range(places):
        for field in range(fields):
            line, count = g[place, field], 0
            for column in range(starts[field], starts[field + 1]):
                count += index[place, column] < len(grows)
            for column in range(starts[field], starts[field + 1]):
                row = index[place, column]
                if row < len(grows):
                    for d in range(width):
                        grows[row, d] += line[d] / count


@kernel
def sum_columns(rows: Array, start: int, index: Array, owner: Array, out: Array) -> None:
    """Add to out [M, T] the sum of rows [U, start : start + T] over the columns of index [N, C] at owner [M]."""
    places, width = out.shape
    for place in range(places):
        for column in range(index.shape[1]):
            row = index[owner[place], column]
            if row < len(rows):
                for t in range(width):
                    out[place, t] += rows[row, start + t]


@kernel
def sum_columns_back(g: Array, start: int, index: Array, owner: Array, grows: Array) -> None:
    """Add the gradient of `sum_columns` to grows [U, W]."""
    places, width = g.shape
    for place in range(places):
        for column in range(index.shape[1]):
            row = index[owner[place], column]
            if row < len(grows):
                for t in range(width):
                    grows[row, start + t] += g[place, t]


def warm_up() -> None:
    """Compile what requests call, or read it from the on-disk cache."""
    one, index = np.ones((1, 1), np.float32), np.zeros((1, 1), np.intp)
    unique(*(np.ones(1, t) for t in (np.int32, np.int64, np.bool_)), np.full(2, -1), *np.zeros((2, 1), np.intp))
    sum_columns(one, 0, index, index[0], np.zeros((1, 1), np.float32))
    take_fields(one, index, np.arange(2), one[None].copy())
    compiled.set()
