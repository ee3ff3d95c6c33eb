"""The CPU table's rows as they are served and saved: an index beside values that never move, loops in Numba.

Rows 0 … slots-1 are the slots' shared default rows, so a missing key is a row like any other: gathering, combining and
training need no second path. Reserved arrays are touched as rows come.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import numpy.typing as npt

from recsys.table import kernels
from recsys.table.base import Layout, Rows, Touched
from recsys.table.cpu_arrays import LOCK_ROWS, Turn, decoded, matrix, new_store, new_values, parts, ready
from recsys.table.cpu_changes import Changes
from recsys.table.index import KeyIndex, group
from recsys.table.kernels import Store
from recsys.table.memory import Room, reserve
from recsys.table.rows import check_layout, check_pairs, check_width, table_full
from recsys.table.stamps import Stamps
from recsys.types import Bool, Float32, Int32, Int64


class CpuServingTable:
    """See `recsys.table.base.ServingTable`.

    Readers take no lock, unless a writer changed something meanwhile; then they wait for its turn to end (4,096 rows, well
    under 1 ms) and read again. Each turn, and each 4,096 keys of a reader, is atomic: half a row, or the row of another
    key, is never seen. Writers take turns by a second lock.
    """

    def __init__(self, layout: Layout, room: Room = reserve) -> None:
        check_layout(layout)
        if len(layout.slots) + layout.capacity > kernels.MAX_ROW:
            raise ValueError(f"layout {layout.name!r}: capacity {layout.capacity} is more than a CPU table's 2^28 rows")
        self.layout = layout
        slots = sorted(layout.slots)
        self._slot_of = np.array(slots, np.int32)
        self._place_of = np.full(slots[-1] + 1, -1, np.int32)
        self._place_of[slots] = np.arange(len(slots))
        self._store = new_store(layout, room)
        row_bytes = self._store.values.strides[0]
        links = None if row_bytes % 4 else self._store.values.view(np.int32)
        self._index = KeyIndex(layout.capacity, len(slots), self._place_of, links, layout.order, room)
        self._row_bytes = row_bytes + self._store.state.strides[0] + 4 * (links is None)
        self._stamps = Stamps(self._index)
        self._changes = Changes(self._index, self._place_of, self._slot_of)
        self._turn = Turn()
        self._writer = threading.RLock()

    def lookup(self, slots: Int32, keys: Int64) -> tuple[Float32, Bool]:
        slots, keys = self._pairs(slots, keys)
        out, found = new_values(len(keys), self.layout.dim), np.empty(len(keys), np.bool_)
        stream = out.nbytes >= kernels.STREAM_BYTES
        for part in parts(len(keys)):
            before = self._turn.changes
            _read(self._index, self._store, (slots[part], keys[part]), out[part], found[part], stream)
            if before % 2 or before != self._turn.changes:  # a writer was at it meanwhile: once more, without one
                with self._turn.lock:
                    _read(self._index, self._store, (slots[part], keys[part]), out[part], found[part], stream)
        return out, found

    def touched(self, cursor: str) -> Touched:
        with self._writer:
            return self._changes.since(cursor)

    def acknowledge(self, cursor: str, version: int) -> None:
        with self._writer:
            self._changes.cursors.acknowledge(cursor, version)

    def release(self, cursor: str) -> None:
        with self._writer:
            self._changes.cursors.release(cursor)

    def export(self, slots: Int32, keys: Int64) -> Rows:
        slots, keys = self._pairs(slots, keys)
        values, state = (
            new_values(len(keys), self.layout.dim),
            np.empty((len(keys), len(self._store.fresh)), np.float32),
        )
        stamps, uses = np.empty(len(keys), np.int64), np.empty(len(keys), np.uint8)
        for part in parts(len(keys)):
            with self._turn.lock:
                at, missing = self._index.find(slots[part], keys[part])
                if missing:
                    first = part.start + int(np.argmax(at[1] < 0))
                    raise KeyError(f"table {self.layout.name!r} has no row of slot {slots[first]}, key {keys[first]}")
                kernels.gather(self._store.values, at, values[part], values.nbytes >= kernels.STREAM_BYTES)
                kernels.gather(self._store.state, at, state[part], False)
                _, _, _, stamps[part], uses[part] = self._index.read(at[1])
        return Rows(
            slots=slots.copy(),
            keys=keys.copy(),
            values=values,
            state=state,
            last_seen_ms=self._stamps.times_ms(stamps),
            uses=uses,
        )

    def restore(self, rows: Rows) -> None:
        slots, keys = self._pairs(rows.slots, rows.keys)
        values = matrix(self.layout, "values", rows.values, slots, keys)
        check_width(self.layout, "state", rows.state, len(self._store.fresh), 0)
        with self._writer:
            self._require_room(slots, keys)
            stamps, uses = self._stamps.of_all(np.asarray(rows.last_seen_ms, np.int64)), rows.levels
            # Rows may come in the order of this very index, and would crowd one end of a smaller one.
            missing = sum(self._index.find(slots[part], keys[part])[1] for part in parts(len(keys)))
            for extra in range(0, min(missing, self.layout.capacity - len(self)), LOCK_ROWS):
                with self._turn:
                    self._index.reserve(extra)
            for part in parts(len(keys)):
                with self._turn:
                    at = self._put(slots[part], keys[part], values[part], 0)
                    self._store.state[at[0]] = rows.state[part] if rows.state.shape[1] else self._store.fresh
                    self._index.set_stamps(at[1], stamps[part], uses[part])

    def write(self, slots: Int32, keys: Int64, values: Float32, now_ms: int) -> None:
        slots, keys = self._pairs(slots, keys)
        values = matrix(self.layout, "values", values, slots, keys)
        with self._writer:
            self._require_room(slots, keys)
            for part in parts(len(keys)):
                with self._turn:
                    self._put(slots[part], keys[part], values[part], self._stamps.of(now_ms))

    def remove(self, slots: Int32, keys: Int64) -> None:
        slots, keys = self._pairs(slots, keys)
        with self._writer, self._turn:
            gone = self._index.remove(slots, keys)
            self._changes.cursors.removed(slots[gone], keys[gone])

    def defaults(self) -> Rows:
        none = np.zeros(len(self._slot_of), np.int64)
        with self._turn.lock:
            return Rows(
                slots=self._slot_of.copy(),
                keys=none,
                values=decoded(self._store.values[: len(none)]),
                state=self._store.state[: len(none)].copy(),
                last_seen_ms=none.copy(),
            )

    def restore_defaults(self, rows: Rows) -> None:
        slots, keys = self._pairs(rows.slots, rows.keys)
        values = matrix(self.layout, "values", rows.values, slots, keys)
        check_width(self.layout, "state", rows.state, len(self._store.fresh), 0)
        with self._writer, self._turn:
            at = self._place_of[slots]
            kernels.put(at[None, :], self._store, values)
            self._store.state[at] = rows.state if rows.state.shape[1] else self._store.fresh

    @property
    def shared(self) -> dict[str, npt.NDArray[Any]]:
        """What `recsys.table.shared_table` reads, where `room` gave memory that other processes map. Such a table is written, not trained."""
        arrays = self._index.arrays
        return {
            "entries": arrays.entries,
            "meta": arrays.meta,
            "values": self._store.values,
            "writes": self._store.writes,
        }

    def memory_bytes(self) -> int:
        return self._index.end * self._row_bytes + self._index.index_bytes

    def __len__(self) -> int:
        return len(self._index)

    def _pairs(self, slots: Int32, keys: Int64) -> tuple[Int32, Int64]:
        if slots.ndim != 1 or slots.shape != keys.shape:
            check_pairs(self.layout, slots, keys)
        slots = ready(slots, np.int32)
        if kernels.unknown(self._place_of, slots):
            check_pairs(self.layout, slots, keys)
        return slots, ready(keys, np.int64)

    def _put(self, slots: Int32, keys: Int64, values: Float32, stamp: int) -> Int32:
        """Caller in its turn. `at` of the keys, with rows made where missing, all marked as touched, the last of duplicates in them."""
        self._index.reserve(min(len(keys), self.layout.capacity - len(self)))
        at, _ = self._index.find(slots, keys)
        todo = np.arange(len(keys), dtype=np.int32)
        self._index.insert(slots, keys, at, todo, self._store, (stamp, self._changes.made(slots, keys), 0, 0))
        kernels.put(at, self._store, values)
        return at

    def _require_room(self, slots: Int32, keys: Int64, todo: Int32 | None = None) -> None:
        """TableFull if rows for those of these keys that have none, or for those numbered in `todo`, do not fit."""
        if len(self) + len(keys) <= self.layout.capacity:
            return
        if todo is None:
            todo = np.flatnonzero(self._index.find(slots, keys)[0][1] < 0).astype(np.int32)
        new = len(group(self._place_of, slots[todo], keys[todo])[1])
        if len(self) + new > self.layout.capacity:
            raise table_full(self.layout, len(self), new)


def _read(index: KeyIndex, store: Store, pairs: tuple[Int32, Int64], out: Float32, found: Bool, stream: bool) -> None:
    batch = *pairs, np.empty((3, len(out)), np.int32)
    kernels.read(index.arrays, store.values, batch, out, found, stream)
