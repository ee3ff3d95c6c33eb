"""The CPU table, trained: rows are counted, admitted, stepped, let go and expired."""

from __future__ import annotations

import numpy as np

from recsys.table import kernels, optimizers, upkeep, worth
from recsys.table.admission import Admission
from recsys.table.base import Layout, Pending
from recsys.table.cpu_arrays import matrix, new_values, parts
from recsys.table.cpu_serving import CpuServingTable
from recsys.table.index import group
from recsys.table.memory import Room, reserve
from recsys.table.rows import ROUNDING_SEED, seed_head
from recsys.types import Float32, Int32, Int64

_SWEEP_ROWS = 8192
"""Rows of one step of `expire`: removing all of them holds the lock for about 1 ms."""
_NONE = np.zeros(0, np.int32)
_INFINITE, _LARGEST = 0x7F800000, float(np.finfo(np.float32).max)


class CpuTable(CpuServingTable):
    """See `recsys.table.base.Table`. A new key that comes again behind the first 4,096 of its call may count as used twice."""

    def __init__(self, layout: Layout, room: Room = reserve) -> None:
        super().__init__(layout, room)
        self.evicted = self.refused = 0
        self._head, self._drawn_head = (
            int(seed_head(seed).view(np.int64)[0]) for seed in (layout.seed, layout.seed ^ ROUNDING_SEED)
        )
        self._admission = Admission(layout, self._place_of, self._slot_of)
        self._windows = worth.Windows()
        self._swept = 0

    def lookup_train(self, slots: Int32, keys: Int64, now_ms: int, admit: bool = True) -> Float32:
        slots, keys = self._pairs(slots, keys)
        out = new_values(len(keys), self.layout.dim)
        with self._writer:
            tick = worth.tick(now_ms) if admit else 0
            if admit and self.layout.spare:
                if len(self) + len(keys) > worth.target(self.layout):
                    self._make_room_for(slots, keys, now_ms, tick)
                    tick = 0  # they are counted
            elif admit and len(self) + len(keys) > self.layout.capacity:
                missing = np.flatnonzero(self._index.find(slots, keys)[0][1] < 0).astype(np.int32)
                self._require_room(slots, keys, self._admission.due(slots, keys, missing)[0])
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
                marks = self._stamps.of(now_ms), self._changes.made(slots[todo], keys[todo]), 1, self._head
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
        gradients = matrix(self.layout, "gradients", gradients, slots, keys)
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
                raise _not_finite(self.layout)
            if np.int32(bits).view(np.float32) > _LARGEST / max(len(keys), 1):
                at, _ = self._index.find(slots, keys)
                if optimizers.overflows(gradients, work, optimizers.chain(at, work, seen), room[0]):
                    raise _not_finite(self.layout)
                seen[:] = 0
            with self._turn:
                at, _ = self._index.find(slots, keys, self._stamps.of(now_ms), self._changes.made(slots, keys))
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

    def _put(self, slots: Int32, keys: Int64, values: Float32, stamp: int) -> Int32:
        if self._admission.num_counted:  # those that get rows need no counts
            new = self._index.find(slots, keys)[0][1] < 0
            self._admission.forget(slots[new], keys[new])
        return super()._put(slots, keys, values, stamp)

    def pending(self) -> Pending:
        with self._writer:
            return self._admission.export(self._windows.at)

    def restore_pending(self, pending: Pending) -> None:
        slots, keys = self._pairs(pending.slots, pending.keys)
        with self._writer:
            self._admission.restore(pending, slots, keys)
            self._windows.at = int(pending.windows[0])

    def memory_bytes(self) -> int:
        return super().memory_bytes() + self._admission.memory_bytes()

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
            self._changes.cursors.removed(self._slot_of[gone[:removed, 1]], gone[:removed, 0].copy())
        return looked, removed


def _not_finite(layout: Layout) -> ValueError:
    return ValueError(f"table {layout.name!r}: gradients are not finite; nothing was changed")
