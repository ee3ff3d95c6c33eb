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

import numpy as np
import numpy.typing as npt

from recsys.table import kernels
from recsys.table.base import Layout, Pending, Rows, Segment, SlotPolicy, Touched
from recsys.table.cursors import Cursors
from recsys.table.index import KeyIndex, group
from recsys.table.pending import PendingCounts
from recsys.table.rows import (
    check_layout,
    check_pairs,
    check_width,
    default_values,
    initial_state,
    initial_values,
    state_width,
    table_full,
)
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
        self._default_row = np.full(slots[-1] + 1, -1, np.int32)
        self._default_row[slots] = np.arange(len(slots))
        self._admission = np.ones(slots[-1] + 1, np.int64)
        self._admission[slots] = [layout.slots[slot].admission for slot in slots]
        self._index = KeyIndex(layout.capacity, first=len(slots))
        self._fresh = initial_state(layout)
        total = len(slots) + layout.capacity
        self._values = np.zeros((total, layout.dim), np.float32)
        self._state = np.zeros((total, len(self._fresh)), np.float32)
        self._last_seen_ms = np.zeros(total, np.int64)
        self._links = np.zeros((total, 2), np.int32)
        self._changed = np.zeros(total, np.int64)
        self._changed[: len(slots)] = -1
        self._place = np.zeros(total, np.int32)
        self._values[: len(slots)] = default_values(layout)
        self._state[: len(slots)] = self._fresh
        self._spans, self._rates = _segments(layout)
        self._pending = PendingCounts(self._default_row)
        self._cursors = Cursors()
        self._swept = 0
        self._lock = threading.RLock()
        self._writer = threading.RLock()

    def lookup(self, slots: Int32, keys: Int64) -> tuple[Float32, Bool]:
        slots, keys = self._pairs(slots, keys)
        out = np.empty((len(keys), self.layout.dim), np.float32)
        with self._lock:
            rows = self._index.find(slots, keys, self._default_row, self._values, out)
        return out, rows >= self._index.first

    def lookup_train(self, slots: Int32, keys: Int64, now_ms: int, admit: bool = True) -> Float32:
        slots, keys = self._pairs(slots, keys)
        out = np.empty((len(keys), self.layout.dim), np.float32)
        with self._writer:
            rows = self._index.find(slots, keys, self._default_row, self._values, out)
            missing = rows < self._index.first
            if admit and missing.any() and self._admit(slots[missing], keys[missing], now_ms):
                rows = self._index.find(slots, keys, self._default_row, self._values, out)
            with self._lock:
                self._see(rows, now_ms)
        return out

    def apply_gradients(self, slots: Int32, keys: Int64, gradients: Float32, now_ms: int) -> None:
        slots, keys = self._pairs(slots, keys)
        gradients = self._matrix("gradients", gradients, slots, keys)
        unique = np.empty(len(keys), np.int32)
        combined = np.empty(gradients.shape, np.float32)
        with self._writer:
            rows = self._index.find(slots, keys, self._default_row)
            sums = np.empty(gradients.shape, np.float64)
            count = kernels.combine(rows, gradients, self._place, unique, sums, combined)
            unique = unique[:count]
            if not np.isfinite(combined[:count]).all():
                raise ValueError(f"table {self.layout.name!r}: gradients are not finite; nothing was changed")
            with self._lock:
                kernels.step(unique, combined, self._values, self._state, self._spans, self._rates)
                kernels.mark(unique, self._links, self._changed, self._cursors.now)
                self._see(unique, now_ms)

    def expire(self, now_ms: int, max_rows: int | None = None) -> int:
        cutoff = np.full(len(self._default_row), np.iinfo(np.int64).min)
        for slot, policy in self.layout.slots.items():
            if policy.expiry_s is not None:
                cutoff[slot] = now_ms - int(policy.expiry_s * 1000)
        removed = 0
        with self._writer:
            live = self._index.end - self._index.first
            todo = live if max_rows is None else min(max_rows, live)
            if max_rows is None:
                self._swept = 0
            while todo > 0:
                chunk = min(todo, _SWEEP_ROWS)
                removed += self._sweep(cutoff, chunk)
                todo -= chunk
            self._pending.expire(cutoff)
        return removed

    def touched(self, cursor: str) -> Touched:
        with self._writer:
            version, after, removed_slots, removed_keys = self._cursors.take(cursor)
            out = np.empty(len(self), np.int32)
            rows = out[: kernels.changes(self._links, self._changed, after, out)]
            _, removed_slots, removed_keys = group(removed_slots, removed_keys)
            gone = self._index.find(removed_slots, removed_keys, self._default_row) < self._index.first
            return Touched(
                version=version,
                slots=self._index.owner_slot[rows],
                keys=self._index.owner_key[rows],
                removed_slots=removed_slots[gone],
                removed_keys=removed_keys[gone],
            )

    def acknowledge(self, cursor: str, version: int) -> None:
        with self._writer:
            self._cursors.acknowledge(cursor, version)

    def export(self, slots: Int32, keys: Int64) -> Rows:
        slots, keys = self._pairs(slots, keys)
        with self._lock:
            rows = self._index.find(slots, keys, self._default_row)
            missing = np.flatnonzero(rows < self._index.first)
            if len(missing):
                at = missing[0]
                raise KeyError(f"table {self.layout.name!r} has no row of slot {slots[at]}, key {keys[at]}")
            return self._copy(slots.copy(), keys.copy(), rows)

    def restore(self, rows: Rows) -> None:
        slots, keys = self._pairs(rows.slots, rows.keys)
        values = self._matrix("values", rows.values, slots, keys)
        check_width(self.layout, "state", rows.state, len(self._fresh), 0)
        with self._writer:
            missing = self._make_room(slots, keys)
            with self._lock:
                at = self._create(slots, keys, missing)
                self._values[at] = values
                self._state[at] = rows.state if rows.state.shape[1] else self._fresh
                self._last_seen_ms[at] = rows.last_seen_ms

    def write(self, slots: Int32, keys: Int64, values: Float32, now_ms: int) -> None:
        slots, keys = self._pairs(slots, keys)
        values = self._matrix("values", values, slots, keys)
        with self._writer:
            missing = self._make_room(slots, keys)
            with self._lock:
                at = self._create(slots, keys, missing)
                self._values[at] = values
                self._see(at, now_ms)

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
            self._pending = PendingCounts(self._default_row)
            self._pending.put(slots, keys, pending.counts, pending.last_seen_ms)

    def defaults(self) -> Rows:
        with self._lock:
            slots = np.flatnonzero(self._default_row >= 0).astype(np.int32)
            return self._copy(slots, np.zeros(len(slots), np.int64), self._default_row[slots])

    def restore_defaults(self, rows: Rows) -> None:
        slots, keys = self._pairs(rows.slots, rows.keys)
        check_pairs(self.layout, slots, keys)
        values = self._matrix("values", rows.values, slots, keys)
        check_width(self.layout, "state", rows.state, len(self._fresh), 0)
        with self._writer, self._lock:
            at = self._default_row[slots]
            self._values[at] = values
            self._state[at] = rows.state if rows.state.shape[1] else self._fresh

    def memory_bytes(self) -> int:
        # Beside values and state: slot 4, key 8, free 4, last seen 8, links 8, changed 8, place 4.
        row = 4 * (self.layout.dim + len(self._fresh)) + 44
        return self._index.end * row + self._index.index_bytes + self._pending.memory_bytes()

    def __len__(self) -> int:
        with self._lock:
            return len(self._index)

    # Below: the caller holds the writer's lock, and the rows' lock where rows change.

    def _pairs(self, slots: Int32, keys: Int64) -> tuple[Int32, Int64]:
        # Writeable and aligned: Numba would compile each kernel anew, in the middle of a request, for other arrays.
        if slots.ndim != 1 or slots.shape != keys.shape:
            check_pairs(self.layout, slots, keys)
        return np.require(slots, np.int32, ["C", "A", "W"]), np.require(keys, np.int64, ["C", "A", "W"])

    def _matrix(self, name: str, array: Float32, slots: Int32, keys: Int64) -> Float32:
        check_width(self.layout, name, array, self.layout.dim)
        if len(array) != len(keys):
            check_pairs(self.layout, slots, keys, array)
        return np.require(array, np.float32, ["C", "A", "W"])

    def _see(self, rows: Int32, now_ms: int) -> None:
        self._last_seen_ms[rows] = np.maximum(self._last_seen_ms[rows], now_ms)

    def _copy(self, slots: Int32, keys: Int64, rows: Int32) -> Rows:
        is_row = rows >= self._index.first
        return Rows(
            slots=slots,
            keys=keys,
            values=self._values[rows],
            state=self._state[rows],
            last_seen_ms=np.where(is_row, self._last_seen_ms[rows], 0),
        )

    def _make_room(self, slots: Int32, keys: Int64) -> Bool:
        """Which keys are missing [N]; the index then has room for them. TableFull if they do not fit."""
        missing = self._index.find(slots, keys, self._default_row) < self._index.first
        new = int(missing.sum())
        if len(self) + new > self.layout.capacity:
            new = len(group(slots[missing], keys[missing])[1])
            if len(self) + new > self.layout.capacity:
                raise table_full(self.layout, len(self), new)
        self._index.reserve(new)
        return missing

    def _create(self, slots: Int32, keys: Int64, missing: Bool) -> Int32:
        """Rows of the keys, made where missing, all marked as touched; the caller sets the values."""
        rows = self._index.insert(slots, keys)
        new = rows[missing]
        self._state[new] = self._fresh
        self._last_seen_ms[new] = 0
        kernels.mark(rows, self._links, self._changed, self._cursors.now)
        self._pending.remove(slots[missing], keys[missing])
        return rows

    def _admit(self, slots: Int32, keys: Int64, now_ms: int) -> bool:
        """Count the occurrences of missing keys and create the rows that are due; were there any?"""
        place, slots, keys = group(slots, keys)
        counts = np.bincount(place, minlength=len(keys)) + self._pending.get(slots, keys)
        due = counts >= self._admission[slots]
        missing = self._make_room(slots[due], keys[due])
        wait = ~due
        if wait.any():
            self._pending.put(slots[wait], keys[wait], counts[wait], np.full(int(wait.sum()), now_ms, np.int64))
        values = initial_values(self.layout, slots[due], keys[due])
        with self._lock:
            rows = self._create(slots[due], keys[due], missing)
            self._values[rows] = values
            self._last_seen_ms[rows] = now_ms
        return len(rows) > 0

    def _remove(self, slots: Int32, keys: Int64) -> int:
        rows, slots, keys = self._index.remove(slots, keys)
        kernels.mark(rows, self._links, self._changed, 0)
        self._cursors.removed(slots, keys)
        return len(rows)

    def _sweep(self, cutoff_ms: Int64, count: int) -> int:
        """Look at the next rows, round and round, and remove those expired."""
        if self._swept + self._index.first >= self._index.end:
            self._swept = 0
        start = self._index.first + self._swept
        stop = min(start + count, self._index.end)
        self._swept += stop - start
        slots, keys = self._index.owner_slot[start:stop], self._index.owner_key[start:stop]
        gone = (slots >= 0) & (self._last_seen_ms[start:stop] <= cutoff_ms[slots])
        if not gone.any():
            return 0
        with self._lock:
            return self._remove(slots[gone], keys[gone])


def _segments(layout: Layout) -> tuple[Int64, npt.NDArray[np.float64]]:
    """`spans` and `rates` of `kernels.step`."""
    numbers = {"sgd": kernels.SGD, "adagrad": kernels.ADAGRAD, "rowwise_adagrad": kernels.ROWWISE_ADAGRAD}
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
    table.expire(now_ms=2000)
    table.touched("warm_up")
