"""The CUDA table: the contract in numpy arrays, the rows on a device."""

from __future__ import annotations

import secrets
import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recsys.table import worth
from recsys.table.base import Layout, Pending, Rows, Touched
from recsys.table.cuda_room import least_worth
from recsys.table.cuda_rows import CHUNK_ROWS, DeviceRows
from recsys.table.cursors import Cursors
from recsys.table.rows import check_pairs, check_width
from recsys.types import Bool, Float32, Int32, Int64

_PINNED_BYTES = 2**22
"""Copies up to this size go by way of memory that the device reads by itself: larger ones would hold on to much of it."""


def available() -> bool:
    """Whether there is a CUDA device."""
    return torch.cuda.is_available()


class CudaTable:
    """See `recsys.table.base.Table`. Thread-safe with one lock; all kernels run on the device's default stream.

    `rows` has the same verbs on tensors of the device, for callers that live there: they take turns by themselves. Sums
    are float64 in a fixed order: a batch gives the same bits every time, and those of the CPU table up to rounding.
    Gradients beyond 3.4e38 / N are refused as not finite.
    """

    def __init__(self, layout: Layout, device: str | torch.device = "cuda", chunk_rows: int = CHUNK_ROWS) -> None:
        if chunk_rows < 2 or chunk_rows & (chunk_rows - 1):
            raise ValueError(f"table {layout.name!r}: chunk_rows must be a power of two >= 2, got {chunk_rows}")
        self.layout = layout
        self.evicted = self.refused = 0
        self._order = secrets.randbits(63) if layout.order is None else layout.order
        self.rows = DeviceRows(layout, torch.device(device), chunk_rows)
        self._known = np.zeros(65536, np.bool_)
        self._known[list(layout.slots)] = True
        self._cursors = Cursors()
        self._windows = worth.Windows()
        self._swept = 0
        self._lock = threading.RLock()

    def lookup(self, slots: Int32, keys: Int64) -> tuple[Float32, Bool]:
        with self._lock:
            values, rows = _fetched(*self.rows.lookup(*self._pairs(slots, keys)))
            return values, rows >= self.rows.first

    def lookup_train(self, slots: Int32, keys: Int64, now_ms: int, admit: bool = True) -> Float32:
        with self._lock:
            pairs = self._pairs(slots, keys)
            before = self.rows.index.find(*pairs)
            room = self._make_room_for(pairs, before, now_ms) if admit else None
            rows = self.rows.rows_train(*pairs, now_ms, self._cursors.now, admit, room)
            if admit and len(keys):
                self.rows.count_uses(*pairs, before, now_ms)
            self.rows.see(rows, now_ms)
            return _fetched(self.rows.values.gather(rows))[0]

    def _make_room_for(self, pairs: tuple[Tensor, Tensor], kept: Tensor, now_ms: int) -> int | None:
        """Let rows go for those that a call will make, but the call's own; how many it may make, None: all."""
        count, layout = len(pairs[1]), self.layout
        if not layout.spare or not count or self.rows.index.most_rows + count <= worth.target(layout):
            return None
        due = self.rows.due(*pairs, now_ms)
        self._evict(worth.surplus(layout, len(self), due), kept)
        room = layout.capacity - len(self)
        self.refused += max(due - room, 0)
        return room

    def make_room(self, rows: int) -> int:
        with self._lock:
            before = len(self)
            count = worth.surplus(self.layout, before, rows)
            self._evict(count)
            if len(self) + rows > self.layout.capacity:
                self._evict(count, everywhere=True)
            return before - len(self)

    def _evict(self, count: int, kept: Tensor | None = None, everywhere: bool = False) -> None:
        rows = len(self)
        if count <= 0 or not rows:
            return
        of = self._windows.next(rows, rows if everywhere else worth.looks_for(count))
        gone = least_worth(self.rows.index, self._order, of, count, self.rows.worth, kept)
        self.rows.index.drop(*gone)
        self.evicted += self._tombstones(*gone[:2])

    def apply_gradients(self, slots: Int32, keys: Int64, gradients: Float32, now_ms: int) -> None:
        with self._lock:
            pairs = self._pairs(slots, keys, gradients)
            given = self._matrix("gradients", gradients, self.layout.dim)
            if int(self.rows.refused(given)):
                raise ValueError(f"table {self.layout.name!r}: gradients are not finite; nothing was changed")
            ordered = self.rows.order(self.rows.index.find(*pairs), *pairs)
            self.rows.apply_gradients(ordered, given, now_ms, self._cursors.now)

    def expire(self, now_ms: int, max_rows: int | None = None) -> int:
        cutoff = np.full(65536, np.iinfo(np.int64).min)
        for slot, policy in self.layout.slots.items():
            if policy.expiry_s is not None:
                cutoff[slot] = now_ms - int(policy.expiry_s * 1000)
        with self._lock:
            cutoff_ms = self.rows.tensor(cutoff)
            if max_rows is None:
                removed, _ = self._sweep(cutoff_ms, 0, None)
            else:
                removed, left = self._sweep(cutoff_ms, self._swept, max_rows)
                if left:
                    removed += self._sweep(cutoff_ms, 0, left)[0]
            self.rows.admission.expire(cutoff_ms, now_ms)
        return removed

    def _sweep(self, cutoff_ms: Tensor, start: int, most: int | None) -> tuple[int, int]:
        """Remove what is due of up to `most` rows from the entry `start` on; how many went, and were not looked at."""
        removed, left = 0, most or 0
        self._swept = 0
        for slots, keys, rows, end in self.rows.index.scan(start, most):
            due = self.rows.seen_ms(rows) <= cutoff_ms[slots]
            self.rows.index.drop(slots[due], keys[due], rows[due])
            removed += self._tombstones(slots[due], keys[due])
            left -= len(rows)
            self._swept = end if most is not None else 0
        return removed, max(left, 0)

    def touched(self, cursor: str) -> Touched:
        with self._lock:
            version, after, removed_slots, removed_keys = self._cursors.take(cursor)
            index = self.rows.index
            changed: list[tuple[Int32, Int64]] = [(np.zeros(0, np.int32), np.zeros(0, np.int64))]
            for slots, keys, rows, _ in index.scan():
                new = self.rows.changed(rows) > after
                changed.append((_array(slots[new]), _array(keys[new])))
            slots, keys = self._pairs(removed_slots, removed_keys)
            gone = index.group(slots, keys, torch.ones_like(keys, dtype=torch.bool)) == torch.arange(
                len(keys), device=keys.device
            )
            gone &= index.find(slots, keys) < self.rows.first
            chosen = gone.cpu().numpy()
            return Touched(
                version=version,
                slots=np.concatenate([slots for slots, _ in changed]),
                keys=np.concatenate([keys for _, keys in changed]),
                removed_slots=removed_slots[chosen],
                removed_keys=removed_keys[chosen],
            )

    def acknowledge(self, cursor: str, version: int) -> None:
        with self._lock:
            self._cursors.acknowledge(cursor, version)

    def release(self, cursor: str) -> None:
        with self._lock:
            self._cursors.release(cursor)

    def export(self, slots: Int32, keys: Int64) -> Rows:
        with self._lock:
            rows = self.rows.index.find(*self._pairs(slots, keys))
            missing = np.flatnonzero((rows < self.rows.first).cpu().numpy())
            if len(missing):
                at = missing[0]
                raise KeyError(f"table {self.layout.name!r} has no row of slot {slots[at]}, key {keys[at]}")
            return self._copy(slots.copy(), keys.copy(), rows)

    def restore(self, rows: Rows) -> None:
        with self._lock:
            pairs = self._pairs(rows.slots, rows.keys, rows.values, rows.state, rows.last_seen_ms)
            values, state = self._whole(rows)
            uses = self.rows.tensor(np.minimum(rows.levels, worth.MAX_USES))
            last = self.rows.create(*pairs, 0, self._cursors.now)
            self.rows.put(last, values, state)
            self.rows.mark(last, self.rows.tensor(rows.last_seen_ms), self._cursors.now, uses)

    def write(self, slots: Int32, keys: Int64, values: Float32, now_ms: int) -> None:
        with self._lock:
            pairs = self._pairs(slots, keys, values)
            given = self._matrix("values", values, self.layout.dim)
            self.rows.values.scatter(self.rows.create(*pairs, now_ms, self._cursors.now), given)

    def remove(self, slots: Int32, keys: Int64) -> None:
        with self._lock:
            self._tombstones(*self.rows.remove(*self._pairs(slots, keys)))

    def pending(self) -> Pending:
        with self._lock:
            return self.rows.admission.export(self._windows.at)

    def restore_pending(self, pending: Pending) -> None:
        with self._lock:
            pairs = self._pairs(pending.slots, pending.keys, pending.counts, pending.last_seen_ms)
            self.rows.admission.restore(pending, *pairs)
            self._windows.at = int(pending.windows[0])

    def defaults(self) -> Rows:
        with self._lock:
            slots = np.array(sorted(self.layout.slots), np.int32)
            keys = np.zeros(len(slots), np.int64)
            rows = torch.arange(len(slots), dtype=torch.int32, device=self.rows.device)
            return self._copy(slots, keys, rows)

    def restore_defaults(self, rows: Rows) -> None:
        with self._lock:
            slots, _ = self._pairs(rows.slots, rows.keys, rows.values, rows.state)
            values, state = self._whole(rows)
            for at, row in enumerate(
                self.rows.fallback[slots.to(torch.int64)].split(1)
            ):  # the last of duplicates stays
                self.rows.put(row, values[at : at + 1], state[at : at + 1])

    def memory_bytes(self) -> int:
        with self._lock:
            return self.rows.nbytes

    def __len__(self) -> int:
        with self._lock:
            return len(self.rows.index)

    def _pairs(self, slots: Int32, keys: Int64, *others: Float32 | Int64) -> tuple[Tensor, Tensor]:
        """The pairs on the device, all arguments of one length and every slot one of the layout, or ValueError."""
        same = all(array.ndim >= 1 and len(array) == len(keys) for array in (slots, keys, *others))
        if not same or slots.ndim != 1 or keys.ndim != 1 or slots.min(initial=0) < 0 or slots.max(initial=0) > 65535:
            check_pairs(self.layout, slots, keys, *others)
        if not self._known[slots].all():
            check_pairs(self.layout, slots, keys, *others)
        return _sent(slots, keys, self.rows.device)

    def _matrix(self, name: str, array: Float32, *widths: int) -> Tensor:
        check_width(self.layout, name, array, *widths)
        return self.rows.tensor(array.astype(np.float32))

    def _whole(self, rows: Rows) -> tuple[Tensor, Tensor]:
        values = self._matrix("values", rows.values, self.layout.dim)
        state = self._matrix("state", rows.state, len(self.rows.fresh), 0)
        return values, state if state.shape[1] else self.rows.fresh.expand(len(values), -1)

    def _copy(self, slots: Int32, keys: Int64, rows: Tensor) -> Rows:
        return Rows(
            slots=slots,
            keys=keys,
            values=_array(self.rows.values.gather(rows)),
            state=_array(self.rows.state(rows)),
            last_seen_ms=_array(self.rows.seen_ms(rows)),
            uses=_array(self.rows.uses(rows)).astype(np.uint8),
        )

    def _tombstones(self, slots: Tensor, keys: Tensor) -> int:
        if len(keys):
            self._cursors.removed(_array(slots), _array(keys))
        return len(keys)


def _sent(slots: Int32, keys: Int64, device: torch.device) -> tuple[Tensor, Tensor]:
    """Slots and keys on the device, in one copy."""
    count = len(keys)
    start = 8 * count + 15 & ~15  # kernels read from multiples of 16 bytes
    if device.type == "cpu" or start > _PINNED_BYTES:
        given = (slots.astype(np.int32), keys.astype(np.int64))
        return torch.from_numpy(given[0]).to(device), torch.from_numpy(given[1]).to(device)
    buffer = torch.empty(start + 4 * count, dtype=torch.uint8, pin_memory=True)
    array = buffer.numpy()
    array[: 8 * count].view(np.int64)[:] = keys
    array[start:].view(np.int32)[:] = slots
    there = buffer.to(device, non_blocking=True)
    return there[start:].view(torch.int32), there[: 8 * count].view(torch.int64)


def _fetched(*tensors: Tensor) -> list[Any]:
    """Copies on the host; waits for the device once."""
    if tensors[0].device.type == "cpu" or tensors[0].nbytes > _PINNED_BYTES:
        return [_array(tensor) for tensor in tensors]
    copies = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors]
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensors[0].device).synchronize()
    return [copy.numpy() for copy in copies]


def _array(tensor: Tensor) -> Any:
    """A copy on the host. Waits for the device."""
    return tensor.contiguous().cpu().numpy()
