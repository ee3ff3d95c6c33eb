"""The oracle's rows as they are served and saved: one dictionary, plain loops. Slow and obviously right."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from recsys.table.base import Layout, Rows, Touched
from recsys.table.rows import (
    check_layout,
    check_pairs,
    check_width,
    default_values,
    initial_state,
    initial_values,
    last_seen,
    round_nearest,
    table_full,
)
from recsys.types import Bool, Float32, Int32, Int64

Pair = tuple[int, int]


@dataclass(slots=True)
class Row:
    """What there is of one key."""

    pair: Pair
    values: Float32
    state: Float32
    last_seen_ms: int = 0
    changed: int = 0
    uses: int = 0


def arrays(pairs: Iterable[Pair]) -> tuple[Int32, Int64]:
    """Slots and keys."""
    listed = list(pairs)
    return np.array([p[0] for p in listed], np.int32), np.array([p[1] for p in listed], np.int64)


class ReferenceServingTable:
    """See `recsys.table.base.ServingTable`. One lock a call."""

    def __init__(self, layout: Layout) -> None:
        check_layout(layout)
        self.layout = layout
        self._fresh = initial_state(layout)
        self._rows: dict[Pair, Row] = {}
        values = default_values(layout)
        self._defaults = {s: Row((s, 0), values[n], self._fresh.copy()) for n, s in enumerate(sorted(layout.slots))}
        self._clock = 1
        self._removed: dict[Pair, int] = {}
        self._cursors: dict[str, tuple[int, int]] = {}  # rows and tombstones newer than these are due
        self._lock = threading.RLock()

    def _pairs(self, slots: Int32, keys: Int64, *others: Float32) -> list[Pair]:
        check_pairs(self.layout, slots, keys, *others)
        return list(zip(slots.tolist(), keys.tolist(), strict=True))

    def _require_room(self, pairs: Iterable[Pair]) -> None:
        new = len({p for p in pairs if p not in self._rows})
        if len(self._rows) + new > self.layout.capacity:
            raise table_full(self.layout, len(self._rows), new)

    def _get_or_create(self, pair: Pair) -> Row:
        if pair not in self._rows:
            slots, keys = arrays([pair])
            self._rows[pair] = Row(pair, initial_values(self.layout, slots, keys)[0], self._fresh.copy())
            self._removed.pop(pair, None)
        self._rows[pair].changed = self._clock
        return self._rows[pair]

    def lookup(self, slots: Int32, keys: Int64) -> tuple[Float32, Bool]:
        with self._lock:
            pairs = self._pairs(slots, keys)
            values = np.zeros((len(pairs), self.layout.dim), np.float32)
            for n, pair in enumerate(pairs):
                values[n] = (self._rows.get(pair) or self._defaults[pair[0]]).values
            return values, np.array([p in self._rows for p in pairs], np.bool_)

    def _remove(self, pair: Pair) -> None:
        del self._rows[pair]
        self._removed[pair] = self._clock

    def touched(self, cursor: str) -> Touched:
        with self._lock:
            if cursor not in self._cursors:
                self._cursors[cursor] = (0, self._clock)
                self._clock += 1
            rows_after, removed_after = self._cursors[cursor]
            slots, keys = arrays(p for p, row in self._rows.items() if row.changed > rows_after)
            removed_slots, removed_keys = arrays(p for p, at in self._removed.items() if at > removed_after)
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

    def release(self, cursor: str) -> None:
        with self._lock:
            self._cursors.pop(cursor, None)

    def export(self, slots: Int32, keys: Int64) -> Rows:
        with self._lock:
            rows = []
            for pair in self._pairs(slots, keys):
                if pair not in self._rows:
                    raise KeyError(f"table {self.layout.name!r} has no row of slot {pair[0]}, key {pair[1]}")
                rows.append(self._rows[pair])
            return _stacked(self.layout, slots.copy(), keys.copy(), rows)

    def restore(self, rows: Rows) -> None:
        with self._lock:
            pairs = _checked(self.layout, rows)
            self._require_room(pairs)
            for n, pair in enumerate(pairs):
                row = self._get_or_create(pair)
                row.values[:] = round_nearest(rows.values[n], self.layout.precision)
                row.state[:] = rows.state[n] if rows.state.shape[1] else self._fresh
                row.last_seen_ms = last_seen(int(rows.last_seen_ms[n]))
                row.uses = int(rows.levels[n])

    def write(self, slots: Int32, keys: Int64, values: Float32, now_ms: int) -> None:
        with self._lock:
            check_width(self.layout, "values", values, self.layout.dim)
            pairs = self._pairs(slots, keys, values)
            self._require_room(pairs)
            for n, pair in enumerate(pairs):
                row = self._get_or_create(pair)
                row.values[:] = round_nearest(values[n], self.layout.precision)
                row.last_seen_ms = max(row.last_seen_ms, last_seen(now_ms))

    def remove(self, slots: Int32, keys: Int64) -> None:
        with self._lock:
            for pair in self._pairs(slots, keys):
                if pair in self._rows:
                    self._remove(pair)

    def defaults(self) -> Rows:
        with self._lock:
            slots, keys = arrays((slot, 0) for slot in self._defaults)
            return _stacked(self.layout, slots, keys, list(self._defaults.values()))

    def restore_defaults(self, rows: Rows) -> None:
        with self._lock:
            for n, (slot, _) in enumerate(_checked(self.layout, rows)):
                self._defaults[slot].values[:] = round_nearest(rows.values[n], self.layout.precision)
                self._defaults[slot].state[:] = rows.state[n] if rows.state.shape[1] else self._fresh

    def memory_bytes(self) -> int:
        return len(self._rows) * (4 * self.layout.dim + 4 * len(self._fresh) + 400)

    def __len__(self) -> int:
        return len(self._rows)


def _stacked(layout: Layout, slots: Int32, keys: Int64, rows: list[Row]) -> Rows:
    return Rows(
        slots=slots,
        keys=keys,
        values=np.array([r.values for r in rows], np.float32).reshape(len(rows), layout.dim),
        state=np.array([r.state for r in rows], np.float32).reshape(len(rows), len(initial_state(layout))),
        last_seen_ms=np.array([r.last_seen_ms for r in rows], np.int64),
        uses=np.array([r.uses for r in rows], np.uint8),
    )


def _checked(layout: Layout, rows: Rows) -> list[Pair]:
    check_width(layout, "values", rows.values, layout.dim)
    check_width(layout, "state", rows.state, len(initial_state(layout)), 0)
    check_pairs(layout, rows.slots, rows.keys, rows.values, rows.state)
    return list(zip(rows.slots.tolist(), rows.keys.tolist(), strict=True))
