"""The CPU table: an index beside values that never move, loops in Numba.

Rows 0 … slots-1 are the slots' shared default rows, so a missing key is a row like any other: gathering, combining and
training need no second path. Reserved arrays are touched as rows come.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import numpy.typing as npt

from recsys.table import kernels, optimizers, upkeep, worth
from recsys.table.admission import Admission
from recsys.table.base import Layout, Pending, Rows, Touched
from recsys.table.cpu_arrays import LOCK_ROWS, Turn, decoded, new_store, new_values, parts, ready
from recsys.table.cursors import Cursors
from recsys.table.index import KeyIndex, group
from recsys.table.memory import Room, reserve
from recsys.table.rows import (
    ROUNDING_SEED,
    check_layout,
    check_pairs,
    check_width,
    seed_head,
    table_full,
)
from recsys.table.stamps import Stamps
from recsys.types import Bool, Float32, Int32, Int64

_SWEEP_ROWS = 8192
"""Rows of one step of `expire`: removing all of them holds the lock for about 1 ms."""
_NONE = np.zeros(0, np.int32)
_INFINITE, _LARGEST = 0x7F800000, float(np.finfo(np.float32).max)


class CpuTable:
    """See `recsys.table.base.Table`.

    Readers take no lock, unless a writer changed something meanwhile; then they wait for its turn to end (4,096 rows, well
    under 1 ms) and read again. Each turn, and each 4,096 keys of a reader, is atomic: half a row, or the row of another
    key, is never seen. Writers take turns by a second lock. A new key that comes again behind the first 4,096 of its call
    may count as used twice.
    """

    def __init__(self, layout: Layout, room: Room = reserve) -> None:
        check_layout(layout)
        if len(layout.slots) + layout.capacity > kernels.MAX_ROW:
            raise ValueError(f"layout {layout.name!r}: capacity {layout.capacity} is more than a CPU table's 2^28 rows")
        self.layout = layout
        self.evicted = self.refused = 0
        slots = sorted(layout.slots)
        self._slot_of = np.array(slots, np.int32)
        self._place_of = np.full(slots[-1] + 1, -1, np.int32)
        self._place_of[slots] = np.arange(len(slots))
        self._store = new_store(layout, room)
        self._head, self._drawn_head = (
            int(seed_head(seed).view(np.int64)[0]) for seed in (layout.seed, layout.seed ^ ROUNDING_SEED)
        )
        row_bytes = self._store.values.strides[0]
        links = None if row_bytes % 4 else self._store.values.view(np.int32)
        self._index = KeyIndex(layout.capacity, len(slots), self._place_of, links, layout.order, room)
        self._row_bytes = row_bytes + self._store.state.strides[0] + 4 * (links is None)
        self._stamps = Stamps(self._index)
        self._admission = Admission(layout, self._place_of, self._slot_of)
        self._cursors = Cursors()
        self._windows = worth.Windows()
        self._swept = 0
        self._turn = Turn()
        self._writer = threading.RLock()

    def lookup(self, slots: Int32, keys: Int64) -> tuple[Float32, Bool]:
        slots, keys = self._pairs(slots, keys)
        out, found = new_values(len(keys), self.layout.dim), np.empty(len(keys), np.bool_)
        stream = out.nbytes >= kernels.STREAM_BYTES
        for part in parts(len(keys)):
            before = self._turn.changes
            self._read(slots[part], keys[part], out[part], found[part], stream)
            if before % 2 or before != self._turn.changes:  # a writer was at it meanwhile: once more, without one
                with self._turn.lock:
                    self._read(slots[part], keys[part], out[part], found[part], stream)
        return out, found

    def _read(self, slots: Int32, keys: Int64, out: Float32, found: Bool, stream: bool) -> None:
        batch = slots, keys, np.empty((3, len(keys)), np.int32)
        kernels.read(self._index.arrays, self._store.values, batch, out, found, stream)

    def lookup_train(self, slots: Int32, keys: Int64, now_ms: int, admit: bool = True) -> Float32:
        slots, keys = self._pairs(slots, keys)
        out = new_values(len(keys), self.layout.dim)
        with self._writer:
            tick = worth.tick(now_ms) if admit else 0
            if admit and self.layout.spare:
                if len(self) + len(keys) > worth.target(self.layout):
                    self._make_room_for(slots, keys, now_ms, tick)
                    tick = 0  # they are counted
            else:
                self._require_room(slots, keys, now_ms if admit else None)
            # What a call counts decides for all its keys together.
            for part in parts(len(keys)) if self._admission.at_once else (slice(0, len(keys)),):
                self._lookup_train(slots[part], keys[part], (now_ms, admit, tick), out[part])
        return out

    def _lookup_train(self, slots: Int32, keys: Int64, how: tuple[int, bool, int], out: Float32) -> None:
        now_ms, admit, tick = how
        room = self.layout.capacity - len(self)
        with self._turn:
            self._index.reserve(min(len(keys), room))
            at, missing = self._index.find(slots, keys, self._stamps.of(now_ms), 0, tick)
            if missing and admit:
                todo = np.flatnonzero(at[1] < 0).astype(np.int32)
                todo, refused = self._admission.count(slots, keys, todo, now_ms, room)
                self.refused += refused
                marks = self._stamps.of(now_ms), self._changes(slots[todo], keys[todo]), 1, self._head
                self._index.insert(slots, keys, at, todo, self._store, marks)
            kernels.gather(self._store.values, at, out, False)

    def _make_room_for(self, slots: Int32, keys: Int64, now_ms: int, tick: int) -> None:
        """See and count the rows of a call that are there, and let others go for those it will make."""
        if not len(keys):
            return
        kept = [np.zeros(0, np.int32)]
        new = []
        for part in parts(len(keys)):
            with self._turn:
                at = self._index.find(slots[part], keys[part], self._stamps.of(now_ms), 0, tick)[0]
            kept.append(at[1][at[1] >= 0])
            new.append(part.start + np.flatnonzero(at[1] < 0))
        todo = self._admission.due(slots, keys, np.concatenate(new).astype(np.int32))[0]
        due = len(group(self._place_of, slots[todo], keys[todo])[1])
        self._evict(worth.surplus(self.layout, len(self), due), np.concatenate(kept), self._stamps.of(now_ms))

    def make_room(self, rows: int) -> int:
        with self._writer:
            before = len(self)
            count = worth.surplus(self.layout, before, rows)
            self._evict(count)
            if len(self) + rows > self.layout.capacity:
                self._evict(count, everywhere=True)
            return before - len(self)

    def _evict(self, count: int, kept: Int32 = _NONE, kept_stamp: int = 0, everywhere: bool = False) -> None:
        """Remove `count` rows of least worth, but those at the positions `kept`, which are stamped `kept_stamp` or later."""
        if count <= 0 or not len(self):
            return
        looks = len(self) if everywhere else worth.looks_for(count)
        places, keys = self._index.least(count, self._windows.next(len(self), looks), kept, kept_stamp)
        slots = self._slot_of[places]
        for part in parts(len(keys)):
            self.remove(slots[part], keys[part])
        self.evicted += len(keys)

    def apply_gradients(self, slots: Int32, keys: Int64, gradients: Float32, now_ms: int) -> None:
        slots, keys = self._pairs(slots, keys)
        gradients = self._matrix("gradients", gradients, slots, keys)
        work = np.empty((3, len(keys)), np.int32)
        seen = np.zeros(1 << (2 * len(keys) + 1).bit_length(), np.int32)
        dim, drawn = self.layout.dim, self.layout.rounding == "stochastic"
        block = optimizers.BLOCK
        room = (
            np.empty(dim),
            np.empty((block, dim), np.float32),
            np.empty((block, dim * drawn), np.float32),
            np.empty(block),
            np.empty(block, np.int64),
        )
        bits = optimizers.largest(gradients.view(np.int32).reshape(-1))
        with self._writer:
            if bits >= _INFINITE:
                raise self._not_finite()
            if np.int32(bits).view(np.float32) > _LARGEST / max(len(keys), 1):
                at, _ = self._index.find(slots, keys)
                if optimizers.overflows(gradients, work, optimizers.chain(at, work, seen), room[0]):
                    raise self._not_finite()
                seen[:] = 0
            with self._turn:
                at, _ = self._index.find(slots, keys, self._stamps.of(now_ms), self._changes(slots, keys))
            unique = optimizers.chain(at, work, seen)
            noise = drawn, self._drawn_head, slots, keys
            for part in parts(unique):
                with self._turn:
                    optimizers.step(self._store, at, work, (part.start, part.stop), gradients, room, noise)

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
            self._admission.expire(cutoff, now_ms)
        return removed

    def touched(self, cursor: str) -> Touched:
        with self._writer:
            version, after, removed_slots, removed_keys = self._cursors.take(cursor)
            positions = self._index.changed(self._cursors.code_after(after), self._cursors.listed(after))
            places, keys = self._index.identify(positions)
            _, first = group(self._place_of, removed_slots, removed_keys)
            removed_slots, removed_keys = removed_slots[first], removed_keys[first]
            gone = self._index.find(removed_slots, removed_keys)[0][1] < 0
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

    def release(self, cursor: str) -> None:
        with self._writer:
            self._cursors.release(cursor)

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
        values = self._matrix("values", rows.values, slots, keys)
        check_width(self.layout, "state", rows.state, len(self._store.fresh), 0)
        with self._writer:
            self._require_room(slots, keys, None, every=True)
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
        values = self._matrix("values", values, slots, keys)
        with self._writer:
            self._require_room(slots, keys, None, every=True)
            for part in parts(len(keys)):
                with self._turn:
                    self._put(slots[part], keys[part], values[part], self._stamps.of(now_ms))

    def remove(self, slots: Int32, keys: Int64) -> None:
        slots, keys = self._pairs(slots, keys)
        with self._writer, self._turn:
            gone = self._index.remove(slots, keys)
            self._cursors.removed(slots[gone], keys[gone])

    def pending(self) -> Pending:
        with self._writer:
            return self._admission.export(self._windows.at)

    def restore_pending(self, pending: Pending) -> None:
        slots, keys = self._pairs(pending.slots, pending.keys)
        with self._writer:
            self._admission.restore(pending, slots, keys)
            self._windows.at = int(pending.windows[0])

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
        values = self._matrix("values", rows.values, slots, keys)
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
        return self._index.end * self._row_bytes + self._index.index_bytes + self._admission.memory_bytes()

    def __len__(self) -> int:
        return len(self._index)

    # Below: the caller holds the writer's lock, and the rows' lock where rows change.

    def _pairs(self, slots: Int32, keys: Int64) -> tuple[Int32, Int64]:
        if slots.ndim != 1 or slots.shape != keys.shape:
            check_pairs(self.layout, slots, keys)
        slots = ready(slots, np.int32)
        if kernels.unknown(self._place_of, slots):
            check_pairs(self.layout, slots, keys)
        return slots, ready(keys, np.int64)

    def _matrix(self, name: str, array: Float32, slots: Int32, keys: Int64) -> Float32:
        check_width(self.layout, name, array, self.layout.dim)
        if len(array) != len(keys):
            check_pairs(self.layout, slots, keys, array)
        return ready(array, np.float32)

    def _changes(self, slots: Int32, keys: Int64) -> int:
        """The code of a change made now to these rows."""
        self._cursors.changed(slots, keys, self._index.positions)
        return self._cursors.code(self._index.arrays.changed[: self._index.positions])

    def _not_finite(self) -> ValueError:
        return ValueError(f"table {self.layout.name!r}: gradients are not finite; nothing was changed")

    def _put(self, slots: Int32, keys: Int64, values: Float32, stamp: int) -> Int32:
        """`at` of the keys, with rows made where missing, all marked as touched, the last of duplicates in them."""
        self._index.reserve(min(len(keys), self.layout.capacity - len(self)))
        at, missing = self._index.find(slots, keys)
        if missing and not self._admission.at_once:
            new = at[1] < 0
            self._admission.forget(slots[new], keys[new])
        todo = np.arange(len(keys), dtype=np.int32)
        self._index.insert(slots, keys, at, todo, self._store, (stamp, self._changes(slots, keys), 0, 0))
        kernels.put(at, self._store, values)
        return at

    def _require_room(self, slots: Int32, keys: Int64, now_ms: int | None, every: bool = False) -> None:
        """TableFull if what a call would create does not fit: `every` missing key, or what is due at `now_ms`."""
        if len(self) + len(keys) <= self.layout.capacity:
            return
        at, missing = self._index.find(slots, keys)
        if not missing or (now_ms is None and not every):
            return
        todo = np.flatnonzero(at[1] < 0).astype(np.int32)
        if not every:
            todo = self._admission.due(slots, keys, todo)[0]
        new = len(group(self._place_of, slots[todo], keys[todo])[1])
        if len(self) + new > self.layout.capacity:
            raise table_full(self.layout, len(self), new)

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
        with self._turn:
            end = self._index.positions
            start = self._swept if self._swept < end else 0
            stop = min(start + 4 * _SWEEP_ROWS, end)
            self._swept, looked, removed = upkeep.sweep(self._index.arrays, start, stop, looks, oldest, gone)
            self._cursors.removed(self._slot_of[gone[:removed, 1]], gone[:removed, 0].copy())
        return looked, removed
