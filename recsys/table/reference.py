"""The oracle: one dictionary, plain loops, float64 arithmetic, float32 storage. Slow and obviously right."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from recsys.table.base import Layout, Pending, Rows, Touched
from recsys.table.rows import (
    check_layout,
    check_pairs,
    check_width,
    default_values,
    initial_state,
    initial_values,
    last_seen,
    state_width,
    table_full,
)
from recsys.types import Bool, Float32, Int32, Int64

Pair = tuple[int, int]


@dataclass(slots=True)
class _Row:
    values: Float32
    state: Float32
    last_seen_ms: int = 0
    changed: int = 0


def _arrays(pairs: Iterable[Pair]) -> tuple[Int32, Int64]:
    listed = list(pairs)
    return np.array([p[0] for p in listed], np.int32), np.array([p[1] for p in listed], np.int64)


class ReferenceTable:
    """See `recsys.table.base.Table`. One lock a call."""

    def __init__(self, layout: Layout) -> None:
        check_layout(layout)
        self.layout = layout
        self._fresh = initial_state(layout)
        self._rows: dict[Pair, _Row] = {}
        self._pending: dict[Pair, tuple[int, int]] = {}  # occurrences, last seen
        values = default_values(layout)
        self._defaults = {s: _Row(values[n], self._fresh.copy()) for n, s in enumerate(sorted(layout.slots))}
        self._clock = 1
        self._removed: dict[Pair, int] = {}
        self._cursors: dict[str, tuple[int, int]] = {}  # rows and tombstones newer than these are due
        self._swept: list[Pair] = []
        self._lock = threading.RLock()

    def _pairs(self, slots: Int32, keys: Int64, *others: Float32) -> list[Pair]:
        check_pairs(self.layout, slots, keys, *others)
        return list(zip(slots.tolist(), keys.tolist(), strict=True))

    def _row(self, pair: Pair) -> _Row:
        return self._rows.get(pair) or self._defaults[pair[0]]

    def _require_room(self, pairs: Iterable[Pair]) -> None:
        new = len({p for p in pairs if p not in self._rows})
        if len(self._rows) + new > self.layout.capacity:
            raise table_full(self.layout, len(self._rows), new)

    def _get_or_create(self, pair: Pair) -> _Row:
        if pair not in self._rows:
            slots, keys = _arrays([pair])
            self._rows[pair] = _Row(initial_values(self.layout, slots, keys)[0], self._fresh.copy())
            self._removed.pop(pair, None)
            self._pending.pop(pair, None)
        self._rows[pair].changed = self._clock
        return self._rows[pair]

    def lookup(self, slots: Int32, keys: Int64) -> tuple[Float32, Bool]:
        with self._lock:
            pairs = self._pairs(slots, keys)
            values = np.zeros((len(pairs), self.layout.dim), np.float32)
            for n, pair in enumerate(pairs):
                values[n] = self._row(pair).values
            return values, np.array([p in self._rows for p in pairs], np.bool_)

    def lookup_train(self, slots: Int32, keys: Int64, now_ms: int, admit: bool = True) -> Float32:
        with self._lock:
            pairs = self._pairs(slots, keys)
            if admit:
                self._admit(Counter(p for p in pairs if p not in self._rows), now_ms)
            for pair in pairs:
                if pair in self._rows:
                    self._rows[pair].last_seen_ms = max(self._rows[pair].last_seen_ms, last_seen(now_ms))
            return self.lookup(slots, keys)[0]

    def _admit(self, missing: Counter[Pair], now_ms: int) -> None:
        counts = {p: self._pending.get(p, (0, now_ms))[0] + n for p, n in missing.items()}
        admitted = [p for p, n in counts.items() if n >= self.layout.slots[p[0]].admission]
        self._require_room(admitted)
        for pair, count in counts.items():
            seen = self._pending.get(pair, (0, now_ms))[1]
            self._pending[pair] = (count, max(seen, now_ms))
        for pair in admitted:
            self._get_or_create(pair).last_seen_ms = last_seen(now_ms)

    def apply_gradients(self, slots: Int32, keys: Int64, gradients: Float32, now_ms: int) -> None:
        with self._lock:
            check_width(self.layout, "gradients", gradients, self.layout.dim)
            pairs = self._pairs(slots, keys, gradients)
            sums: dict[int, np.ndarray[tuple[int], np.dtype[np.float64]]] = {}
            chosen: dict[int, _Row] = {}
            for pair, gradient in zip(pairs, gradients, strict=True):
                row = self._row(pair)
                chosen[id(row)] = row
                sums[id(row)] = sums.get(id(row), np.zeros(self.layout.dim)) + gradient.astype(np.float64)
            combined = {name: total.astype(np.float32).astype(np.float64) for name, total in sums.items()}
            if not all(np.isfinite(total).all() for total in combined.values()):
                raise ValueError(f"table {self.layout.name!r}: gradients are not finite; nothing was changed")
            for name, row in chosen.items():
                self._step(row, combined[name].tolist())
            for pair in pairs:
                if pair in self._rows:
                    self._rows[pair].changed = self._clock
                    self._rows[pair].last_seen_ms = max(self._rows[pair].last_seen_ms, last_seen(now_ms))

    def _step(self, row: _Row, gradient: list[float]) -> None:
        start = state = 0
        for segment in self.layout.segments:
            positions = range(start, start + segment.dim)
            squares = [gradient[d] * gradient[d] for d in positions]
            if segment.optimizer == "rowwise_adagrad":
                squares = [sum(squares) / segment.dim]
            sums = [float(row.state[state + n]) + square for n, square in enumerate(squares[: state_width(segment)])]
            for n, d in enumerate(positions):
                rate = segment.learning_rate
                if sums:
                    rate /= math.sqrt(sums[n if len(sums) > 1 else 0]) + segment.epsilon
                row.values[d] = np.float32(float(row.values[d]) - rate * gradient[d])
            row.state[state : state + len(sums)] = sums
            start, state = start + segment.dim, state + len(sums)

    def expire(self, now_ms: int, max_rows: int | None = None) -> int:
        with self._lock:
            if max_rows is None:
                looked = list(self._rows)
            else:
                if not self._swept:
                    self._swept = list(reversed(self._rows))
                looked = [self._swept.pop() for _ in range(min(max_rows, len(self._swept)))]
            gone = [p for p in looked if p in self._rows and self._expired(p, self._rows[p].last_seen_ms, now_ms)]
            for pair in gone:
                self._remove(pair)
            for pair in [p for p, (_, seen) in self._pending.items() if self._expired(p, seen, now_ms)]:
                del self._pending[pair]
            return len(gone)

    def _expired(self, pair: Pair, last_seen_ms: int, now_ms: int) -> bool:
        expiry_s = self.layout.slots[pair[0]].expiry_s
        return expiry_s is not None and last_seen_ms <= now_ms - int(expiry_s * 1000)

    def _remove(self, pair: Pair) -> None:
        del self._rows[pair]
        self._removed[pair] = self._clock

    def touched(self, cursor: str) -> Touched:
        with self._lock:
            if cursor not in self._cursors:
                self._cursors[cursor] = (0, self._clock)
                self._clock += 1
            rows_after, removed_after = self._cursors[cursor]
            slots, keys = _arrays(p for p, row in self._rows.items() if row.changed > rows_after)
            removed_slots, removed_keys = _arrays(p for p, at in self._removed.items() if at > removed_after)
            version = self._clock
            self._clock += 1
            return Touched(
                version=version, slots=slots, keys=keys, removed_slots=removed_slots, removed_keys=removed_keys
            )

    def acknowledge(self, cursor: str, version: int) -> None:
        with self._lock:
            if cursor not in self._cursors or version >= self._clock:
                raise ValueError(f"table {self.layout.name!r}: cursor {cursor!r} was never given version {version}")
            rows_after, removed_after = self._cursors[cursor]
            self._cursors[cursor] = (max(rows_after, version), max(removed_after, version))

    def export(self, slots: Int32, keys: Int64) -> Rows:
        with self._lock:
            rows = []
            for pair in self._pairs(slots, keys):
                if pair not in self._rows:
                    raise KeyError(f"table {self.layout.name!r} has no row of slot {pair[0]}, key {pair[1]}")
                rows.append(self._rows[pair])
            return self._stack(slots.copy(), keys.copy(), rows)

    def _stack(self, slots: Int32, keys: Int64, rows: list[_Row]) -> Rows:
        return Rows(
            slots=slots,
            keys=keys,
            values=np.array([r.values for r in rows], np.float32).reshape(len(rows), self.layout.dim),
            state=np.array([r.state for r in rows], np.float32).reshape(len(rows), len(self._fresh)),
            last_seen_ms=np.array([r.last_seen_ms for r in rows], np.int64),
        )

    def restore(self, rows: Rows) -> None:
        with self._lock:
            pairs = self._checked(rows)
            self._require_room(pairs)
            for n, pair in enumerate(pairs):
                row = self._get_or_create(pair)
                row.values[:] = rows.values[n]
                row.state[:] = rows.state[n] if rows.state.shape[1] else self._fresh
                row.last_seen_ms = last_seen(int(rows.last_seen_ms[n]))

    def _checked(self, rows: Rows) -> list[Pair]:
        check_width(self.layout, "values", rows.values, self.layout.dim)
        check_width(self.layout, "state", rows.state, len(self._fresh), 0)
        return self._pairs(rows.slots, rows.keys, rows.values, rows.state)

    def write(self, slots: Int32, keys: Int64, values: Float32, now_ms: int) -> None:
        with self._lock:
            check_width(self.layout, "values", values, self.layout.dim)
            pairs = self._pairs(slots, keys, values)
            self._require_room(pairs)
            for n, pair in enumerate(pairs):
                row = self._get_or_create(pair)
                row.values[:] = values[n]
                row.last_seen_ms = max(row.last_seen_ms, last_seen(now_ms))

    def remove(self, slots: Int32, keys: Int64) -> None:
        with self._lock:
            for pair in self._pairs(slots, keys):
                if pair in self._rows:
                    self._remove(pair)

    def pending(self) -> Pending:
        with self._lock:
            slots, keys = _arrays(self._pending)
            counts = np.array([count for count, _ in self._pending.values()], np.int64)
            seen = np.array([seen for _, seen in self._pending.values()], np.int64)
            return Pending(slots=slots, keys=keys, counts=counts, last_seen_ms=seen)

    def restore_pending(self, pending: Pending) -> None:
        with self._lock:
            pairs = self._pairs(pending.slots, pending.keys)
            counted = zip(pending.counts.tolist(), pending.last_seen_ms.tolist(), strict=True)
            self._pending = dict(zip(pairs, counted, strict=True))

    def defaults(self) -> Rows:
        with self._lock:
            slots, keys = _arrays((slot, 0) for slot in self._defaults)
            return self._stack(slots, keys, list(self._defaults.values()))

    def restore_defaults(self, rows: Rows) -> None:
        with self._lock:
            for n, (slot, _) in enumerate(self._checked(rows)):
                self._defaults[slot].values[:] = rows.values[n]
                self._defaults[slot].state[:] = rows.state[n] if rows.state.shape[1] else self._fresh

    def memory_bytes(self) -> int:
        return len(self._rows) * (4 * self.layout.dim + 4 * len(self._fresh) + 400) + 200 * len(self._pending)

    def __len__(self) -> int:
        return len(self._rows)
