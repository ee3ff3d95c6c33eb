"""The CPU table: an index beside values that never move, loops in Numba.

Rows 0 … slots-1 are the slots' shared default rows, so a missing key is a row like any other: gathering, combining and
training need no second path. Reserved arrays are touched as rows come.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from recsys.table import kernels, optimizers
from recsys.table.base import Layout, Pending, Rows, Segment, SlotPolicy, Touched
from recsys.table.cursors import Cursors
from recsys.table.index import KeyIndex, group
from recsys.table.kernels import Store
from recsys.table.memory import reserve
from recsys.table.pending import PendingCounts
from recsys.table.rows import (
    check_layout,
    check_pairs,
    check_width,
    default_values,
    initial_state,
    scales,
    seed_head,
    state_width,
    table_full,
)
from recsys.table.stamps import Stamps
from recsys.types import Bool, Float32, Int32, Int64

_SWEEP_ROWS = 8192
"""Rows of one step of `expire`: removing all of them holds the lock for about 1 ms."""


class CpuTable:
    """See `recsys.table.base.Table`.

    Thread-safe with one lock, held by every call while it reads or changes rows (1 ms for 4,096 rows out of a million):
    a reader never sees half a row. A second lock makes writers take turns; the index grows under that one alone.
    """

    def __init__(self, layout: Layout) -> None:
        check_layout(layout)
        self.layout = layout
        slots = sorted(layout.slots)
        self._slot_of = np.array(slots, np.int32)
        self._place_of = np.full(slots[-1] + 1, -1, np.int32)
        self._place_of[slots] = np.arange(len(slots))
        self._admission = np.ones(slots[-1] + 1, np.int64)
        self._admission[slots] = [layout.slots[slot].admission for slot in slots]
        fresh, total = initial_state(layout), len(slots) + layout.capacity
        spans, rates = _segments(layout)
        self._store = Store(
            values=reserve((total, layout.dim), np.float32),
            state=reserve((total, len(fresh)), np.float32),
            fresh=fresh,
            scale=scales(layout),
            spans=spans,
            rates=rates,
        )
        self._store.values[: len(slots)] = default_values(layout)
        self._store.state[: len(slots)] = fresh
        self._head = int(seed_head(layout.seed).view(np.int64)[0])
        self._index = KeyIndex(layout.capacity, len(slots), self._place_of, self._store.values.view(np.int32))
        self._stamps = Stamps(self._index)
        self._pending = PendingCounts(self._place_of, self._slot_of)
        self._cursors = Cursors()
        self._swept = 0
        self._lock = threading.RLock()
        self._writer = threading.RLock()

    def lookup(self, slots: Int32, keys: Int64) -> tuple[Float32, Bool]:
        slots, keys = self._pairs(slots, keys)
        out = self._new_values(len(keys))
        with self._lock:
            at, _ = self._index.find(slots, keys, values=self._store.values, out=out)
        return out, at[0] >= 0

    def lookup_train(self, slots: Int32, keys: Int64, now_ms: int, admit: bool = True) -> Float32:
        slots, keys = self._pairs(slots, keys)
        out = self._new_values(len(keys))
        values = self._store.values
        with self._writer, self._lock:
            # Nothing may be stamped before it is sure that the table does not get full.
            roomy = len(self) + len(keys) <= self.layout.capacity
            at, missing = self._index.find(slots, keys, self._stamps.of(now_ms) if roomy else -1, values, out)
            if missing and admit:
                self._admit(slots, keys, at, now_ms, out)
            if not roomy:
                self._index.find(slots, keys, self._stamps.of(now_ms))
        return out

    def apply_gradients(self, slots: Int32, keys: Int64, gradients: Float32, now_ms: int) -> None:
        slots, keys = self._pairs(slots, keys)
        gradients = self._matrix("gradients", gradients, slots, keys)
        work = np.empty((len(keys), 2), np.int32)
        seen = np.zeros(1 << (2 * len(keys) + 1).bit_length(), np.int32)
        sums = np.empty((len(keys) // 2, self.layout.dim), np.float64)
        combined = np.empty(sums.shape, np.float32)
        with self._writer:
            at, _ = self._index.find(slots, keys)
            unique = optimizers.combine(self._index.arrays, slots, at, gradients, work, seen, (sums, combined))
            if unique < 0:
                raise ValueError(f"table {self.layout.name!r}: gradients are not finite; nothing was changed")
            with self._lock:
                marks = self._stamps.of(now_ms), self._code()
                optimizers.step(self._index.arrays, self._store, at, work[:unique], gradients, combined, marks)

    def expire(self, now_ms: int, max_rows: int | None = None) -> int:
        removed = 0
        with self._writer:
            cutoff, oldest = self._cutoffs(now_ms)
            todo = len(self) if max_rows is None else min(max_rows, len(self))
            if max_rows is None:
                self._swept = 0
            while todo > 0:
                looked, gone = self._sweep(oldest, min(todo, _SWEEP_ROWS))
                removed += gone
                todo -= looked
            self._pending.expire(cutoff)
        return removed

    def touched(self, cursor: str) -> Touched:
        with self._writer:
            version, after, removed_slots, removed_keys = self._cursors.take(cursor)
            places, keys, _, _ = self._index.read(self._index.changed(self._cursors.code_after(after)))
            _, first = group(self._place_of, removed_slots, removed_keys)
            removed_slots, removed_keys = removed_slots[first], removed_keys[first]
            gone = self._index.find(removed_slots, removed_keys)[0][0] < 0
            return Touched(
                version=version,
                slots=self._slot_of[places],
                keys=keys,
                removed_slots=removed_slots[gone],
                removed_keys=removed_keys[gone],
            )

    def acknowledge(self, cursor: str, version: int) -> None:
        with self._writer:
            self._cursors.acknowledge(cursor, version)

    def export(self, slots: Int32, keys: Int64) -> Rows:
        slots, keys = self._pairs(slots, keys)
        values = self._new_values(len(keys))
        with self._lock:
            at, _ = self._index.find(slots, keys, values=self._store.values, out=values)
            missing = np.flatnonzero(at[0] < 0)
            if len(missing):
                first = missing[0]
                raise KeyError(f"table {self.layout.name!r} has no row of slot {slots[first]}, key {keys[first]}")
            return Rows(
                slots=slots.copy(),
                keys=keys.copy(),
                values=values,
                state=self._store.state.take(at[0], axis=0),
                last_seen_ms=self._stamps.times_ms(self._index.read(at[1])[3]),
            )

    def restore(self, rows: Rows) -> None:
        slots, keys = self._pairs(rows.slots, rows.keys)
        values = self._matrix("values", rows.values, slots, keys)
        check_width(self.layout, "state", rows.state, len(self._store.fresh), 0)
        with self._writer, self._lock:
            stamps = self._stamps.of_all(np.asarray(rows.last_seen_ms, np.int64))
            at = self._put(slots, keys, values, 0)
            self._store.state[at[0]] = rows.state if rows.state.shape[1] else self._store.fresh
            self._index.set_stamps(at[1], stamps)

    def write(self, slots: Int32, keys: Int64, values: Float32, now_ms: int) -> None:
        slots, keys = self._pairs(slots, keys)
        values = self._matrix("values", values, slots, keys)
        with self._writer, self._lock:
            self._put(slots, keys, values, self._stamps.of(now_ms))

    def remove(self, slots: Int32, keys: Int64) -> None:
        slots, keys = self._pairs(slots, keys)
        check_pairs(self.layout, slots, keys)
        with self._writer, self._lock:
            self._remove(slots, keys)

    def pending(self) -> Pending:
        with self._writer:
            return self._pending.export()

    def restore_pending(self, pending: Pending) -> None:
        slots, keys = self._pairs(pending.slots, pending.keys)
        check_pairs(self.layout, slots, keys)
        with self._writer:
            self._pending = PendingCounts(self._place_of, self._slot_of)
            self._pending.put(slots, keys, pending.counts, pending.last_seen_ms)

    def defaults(self) -> Rows:
        none = np.zeros(len(self._slot_of), np.int64)
        with self._lock:
            return Rows(
                slots=self._slot_of.copy(),
                keys=none,
                values=self._store.values[: len(none)].copy(),
                state=self._store.state[: len(none)].copy(),
                last_seen_ms=none.copy(),
            )

    def restore_defaults(self, rows: Rows) -> None:
        slots, keys = self._pairs(rows.slots, rows.keys)
        check_pairs(self.layout, slots, keys)
        values = self._matrix("values", rows.values, slots, keys)
        check_width(self.layout, "state", rows.state, len(self._store.fresh), 0)
        with self._writer, self._lock:
            at = self._place_of[slots]
            self._store.values[at] = values
            self._store.state[at] = rows.state if rows.state.shape[1] else self._store.fresh

    def memory_bytes(self) -> int:
        row = 4 * (self.layout.dim + len(self._store.fresh))
        return self._index.end * row + self._index.index_bytes + self._pending.memory_bytes()

    def __len__(self) -> int:
        return len(self._index)

    # Below: the caller holds the writer's lock, and the rows' lock where rows change.

    def _pairs(self, slots: Int32, keys: Int64) -> tuple[Int32, Int64]:
        if slots.ndim != 1 or slots.shape != keys.shape:
            check_pairs(self.layout, slots, keys)
        return _ready(slots, np.int32), _ready(keys, np.int64)

    def _matrix(self, name: str, array: Float32, slots: Int32, keys: Int64) -> Float32:
        check_width(self.layout, name, array, self.layout.dim)
        if len(array) != len(keys):
            check_pairs(self.layout, slots, keys, array)
        return _ready(array, np.float32)

    def _new_values(self, count: int) -> Float32:
        """An array [N, D] that starts on a cache line."""
        size = count * self.layout.dim
        room = np.empty(size + 16, np.float32)
        start = -room.__array_interface__["data"][0] % 64 // 4
        return room[start : start + size].reshape(count, self.layout.dim)

    def _code(self) -> int:
        return self._cursors.code(self._index.arrays.changed[: self._index.positions])

    def _make_room(self, slots: Int32, keys: Int64) -> None:
        """Room in the index for missing keys. TableFull if they do not fit."""
        if len(self) + len(keys) > self.layout.capacity:
            new = len(group(self._place_of, slots, keys)[1])
            if len(self) + new > self.layout.capacity:
                raise table_full(self.layout, len(self), new)
        self._index.reserve(len(keys))

    def _put(self, slots: Int32, keys: Int64, values: Float32, stamp: int) -> Int32:
        """`at` of the keys, with rows made where missing, all marked as touched, the last of duplicates in them."""
        at, missing = self._index.find(slots, keys)
        if missing:
            new = at[0] < 0
            self._make_room(slots[new], keys[new])
            self._pending.remove(slots[new], keys[new])
        todo = np.arange(len(keys), dtype=np.int32)
        self._index.insert(slots, keys, at, todo, self._store, (stamp, self._code(), 0, 0))
        self._store.values[at[0]] = values
        return at

    def _admit(self, slots: Int32, keys: Int64, at: Int32, now_ms: int, out: Float32) -> None:
        """Count the occurrences of missing keys and create the rows that are due, into `at` and `out`."""
        todo = np.flatnonzero(at[0] < 0).astype(np.int32)
        missing_slots, missing_keys = slots[todo], keys[todo]
        if len(self._pending) or (self._admission[missing_slots] > 1).any():
            which, first = group(self._place_of, missing_slots, missing_keys)
            unique_slots, unique_keys = missing_slots[first], missing_keys[first]
            counts = np.bincount(which, minlength=len(first)) + self._pending.get(unique_slots, unique_keys)
            due = counts >= self._admission[unique_slots]
            self._make_room(unique_slots[due], unique_keys[due])
            wait = ~due
            seen_ms = np.full(int(wait.sum()), now_ms, np.int64)
            self._pending.put(unique_slots[wait], unique_keys[wait], counts[wait], seen_ms)
            self._pending.remove(unique_slots[due], unique_keys[due])
            todo = todo[due[which]]
        else:
            self._make_room(missing_slots, missing_keys)
        marks = self._stamps.of(now_ms), self._code(), 1, self._head
        self._index.insert(slots, keys, at, todo, self._store, marks)
        kernels.fill(at, todo, self._store.values, out)

    def _remove(self, slots: Int32, keys: Int64) -> None:
        gone = self._index.remove(slots, keys)
        self._cursors.removed(slots[gone], keys[gone])

    def _cutoffs(self, now_ms: int) -> tuple[Int64, Int64]:
        """Per slot, the time up to which a key not seen since is expired; per place, the least stamp that is not."""
        cutoff = np.full(len(self._place_of), np.iinfo(np.int64).min)
        oldest = np.zeros(len(self._slot_of), np.int64)
        for slot, policy in self.layout.slots.items():
            if policy.expiry_s is not None:
                cutoff[slot] = now_ms - int(policy.expiry_s * 1000)
                oldest[self._place_of[slot]] = self._stamps.expired_below(int(cutoff[slot]))
        return cutoff, oldest

    def _sweep(self, oldest: Int64, looks: int) -> tuple[int, int]:
        """Look at the next rows, round and round, and remove those expired; how many of both."""
        gone = np.empty((looks, 2), np.int64)
        with self._lock:
            end = self._index.positions
            start = self._swept if self._swept < end else 0
            stop = min(start + 4 * _SWEEP_ROWS, end)
            self._swept, looked, removed = kernels.sweep(self._index.arrays, start, stop, looks, oldest, gone)
            self._cursors.removed(self._slot_of[gone[:removed, 1]], gone[:removed, 0].copy())
        return looked, removed


def _ready(array: npt.NDArray[Any], kind: type[np.generic]) -> npt.NDArray[Any]:
    # Writeable and aligned: Numba would compile each kernel anew, in the middle of a request, for other arrays.
    return array if array.flags.carray and array.dtype == kind else np.require(array, kind, ["C", "A", "W"])


def _segments(layout: Layout) -> tuple[Int64, npt.NDArray[np.float64]]:
    """`spans` and `rates` of `kernels.step`."""
    numbers = {"sgd": optimizers.SGD, "adagrad": optimizers.ADAGRAD, "rowwise_adagrad": optimizers.ROWWISE_ADAGRAD}
    spans, start, state = [], 0, 0
    for segment in layout.segments:
        spans.append((start, start + segment.dim, state, numbers[segment.optimizer]))
        start, state = start + segment.dim, state + state_width(segment)
    return np.array(spans, np.int64), np.array([(s.learning_rate, s.epsilon) for s in layout.segments], np.float64)


def warm_up() -> None:
    """Compile every kernel, or read it from the on-disk cache, so that no request waits for it.

    Processes that start together take turns: the first compiles, the others read what it cached.
    """
    with contextlib.ExitStack() as turn:
        with contextlib.suppress(OSError):
            lock = turn.enter_context((Path(tempfile.gettempdir()) / f"recsys-compile-{os.getuid()}.lock").open("a"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        _run_each_kernel()


def _run_each_kernel() -> None:
    segment = Segment(name="deep", dim=2)
    table = CpuTable(Layout(name="warm_up", segments=(segment,), slots={0: SlotPolicy(expiry_s=1.0)}, capacity=1000))
    slots, keys = np.zeros(1000, np.int32), np.arange(1000)
    table.touched("warm_up")
    table.lookup_train(slots, keys, now_ms=0)
    table.apply_gradients(slots, keys, np.zeros((1000, 2), np.float32), now_ms=0)
    table.lookup(slots, keys)
    table.remove(slots[:1], keys[:1])
    table.expire(now_ms=2000)
    table.touched("warm_up")
    kernels.relabel(np.zeros(1, np.uint8), np.zeros(1, np.uint8))
