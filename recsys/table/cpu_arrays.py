"""The CPU table's arrays: what kernels take, how values are stored, in which turns and parts calls are done."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from recsys.table import kernels, optimizers
from recsys.table.base import Layout
from recsys.table.kernels import Store
from recsys.table.memory import Room, reserve
from recsys.table.rows import check_pairs, check_width, default_values, initial_state, scales, state_width
from recsys.types import Float32, Int32, Int64

LOCK_ROWS = 4096
"""Rows read or changed in one turn of the lock, well under 1 ms."""
STORED = {"float32": np.float32, "float16": np.uint16, "bfloat16": np.int16}


class Turn:
    """Rows and entries change in turns of a lock, and `changes` is odd meanwhile.

    What was read without the lock is right if `changes` was even before and is the same after: memory never moves, so
    whoever reads beside a change reads old, new or mixed values, and then finds out.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.changes = 0

    def __enter__(self) -> None:
        self.lock.acquire()
        self.changes += 1

    def __exit__(self, *_: object) -> None:
        self.changes += 1
        self.lock.release()


def ready(array: npt.NDArray[Any], kind: type[np.generic]) -> npt.NDArray[Any]:
    # Writeable and aligned: Numba would compile each kernel anew, in the middle of a request, for other arrays.
    return array if array.flags.carray and array.dtype == kind else np.require(array, kind, ["C", "A", "W"])


def matrix(layout: Layout, name: str, array: Float32, slots: Int32, keys: Int64) -> Float32:
    """One row of the layout's width a key, as kernels take it; ValueError names what is wrong."""
    check_width(layout, name, array, layout.dim)
    if len(array) != len(keys):
        check_pairs(layout, slots, keys, array)
    return ready(array, np.float32)


def decoded(values: npt.NDArray[Any]) -> Float32:
    """Stored values as float32, a copy."""
    if values.dtype == np.uint16:
        return values.view(np.float16).astype(np.float32)
    if values.dtype == np.int16:
        return (values.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values.copy()


def parts(count: int) -> Iterator[slice]:
    """So many keys at a time are read or changed under one turn of the lock."""
    return (slice(start, min(start + LOCK_ROWS, count)) for start in range(0, count, LOCK_ROWS))


def new_store(layout: Layout, room: Room) -> Store:
    """The rows of a table of this layout: the slots' defaults, and room for as many as it may have."""
    fresh, defaults = initial_state(layout), len(layout.slots)
    total = defaults + layout.capacity
    spans, rates = segments(layout)
    store = Store(
        values=room((total, layout.dim), STORED[layout.precision]),
        state=reserve((total, len(fresh)), np.float32),
        writes=room((total,), np.uint8),
        fresh=fresh,
        scale=scales(layout),
        spans=spans,
        rates=rates,
    )
    kernels.put(np.arange(defaults, dtype=np.int32)[None, :], store, default_values(layout))
    store.state[:defaults] = fresh
    return store


def segments(layout: Layout) -> tuple[Int64, npt.NDArray[np.float64]]:
    """`spans` and `rates` of `kernels.Store`."""
    spans, rates, start, state = [], [], 0, 0
    for s in layout.segments:
        spans.append((start, start + s.dim, state, getattr(optimizers, s.optimizer.upper())))
        own = (s.beta1, s.beta2, 0.0) if s.optimizer == "adam" else (s.beta, s.l1, s.l2)
        rates.append((s.learning_rate, s.epsilon, *own))
        start, state = start + s.dim, state + state_width(s)
    return np.array(spans, np.int64), np.array(rates, np.float64)


def new_values(count: int, dim: int) -> Float32:
    """An array [N, D] that starts on a cache line."""
    size = count * dim
    room = np.empty(size + 16, np.float32)
    start = -room.__array_interface__["data"][0] % 64 // 4
    return room[start : start + size].reshape(count, dim)
