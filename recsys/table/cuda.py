"""The CUDA table: the contract in numpy arrays, the rows on a device."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recsys.table.base import Layout, Pending, Rows, Touched
from recsys.table.cuda_index import CHANGED, KEY, SEEN, SLOT
from recsys.table.cuda_rows import CHUNK_ROWS, DeviceRows
from recsys.table.cursors import Cursors
from recsys.table.rows import check_pairs, check_width, last_seen
from recsys.types import Bool, Float32, Int32, Int64


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
        self.rows = DeviceRows(layout, torch.device(device), chunk_rows)
        self._known = np.zeros(65536, np.bool_)
        self._known[list(layout.slots)] = True
        self._cursors = Cursors()
        self._swept = 0
        self._lock = threading.RLock()

    def lookup(self, slots: Int32, keys: Int64) -> tuple[Float32, Bool]:
        with self._lock:
            values, found = self.rows.lookup(*self._pairs(slots, keys))
            return values.cpu().numpy(), found.cpu().numpy()

    def lookup_train(self, slots: Int32, keys: Int64, now_ms: int, admit: bool = True) -> Float32:
        with self._lock:
            return self.rows.lookup_train(*self._pairs(slots, keys), now_ms, self._cursors.now, admit).cpu().numpy()

    def apply_gradients(self, slots: Int32, keys: Int64, gradients: Float32, now_ms: int) -> None:
        with self._lock:
            pairs = self._pairs(slots, keys, gradients)
            given = self._matrix("gradients", gradients, self.layout.dim)
            if int(self.rows.apply_gradients(*pairs, given, now_ms, self._cursors.now)):
                raise ValueError(f"table {self.layout.name!r}: gradients are not finite; nothing was changed")

    def expire(self, now_ms: int, max_rows: int | None = None) -> int:
        cutoff = np.full(65536, np.iinfo(np.int64).min)
        for slot, policy in self.layout.slots.items():
            if policy.expiry_s is not None:
                cutoff[slot] = now_ms - int(policy.expiry_s * 1000)
        removed = 0
        with self._lock:
            cutoff_ms = self.rows.tensor(cutoff)
            first = self.rows.first
            end = self.rows.index.counts()[0]
            todo = end - first if max_rows is None else min(max_rows, end - first)
            if max_rows is None:
                self._swept = 0
            while todo > 0:
                start = first + self._swept if first + self._swept < end else first
                stop = min(start + todo, end)
                removed += self._tombstones(*self.rows.expired(self.rows.index, cutoff_ms, (start, stop)))
                todo -= stop - start
                self._swept = stop - first
            waiting = self.rows.waiting
            if waiting.maybe_rows:
                self.rows.expired(waiting, cutoff_ms, (waiting.first, waiting.counts()[0]))
        return removed

    def touched(self, cursor: str) -> Touched:
        with self._lock:
            version, after, removed_slots, removed_keys = self._cursors.take(cursor)
            index = self.rows.index
            _, meta = index.live(lambda meta: meta[:, CHANGED] > after, index.first, index.counts()[0])
            slots, keys = self._pairs(removed_slots, removed_keys)
            every = torch.ones(len(keys), dtype=torch.bool, device=keys.device)
            gone = index.group(slots, keys, every) == torch.arange(len(keys), device=keys.device)
            gone &= index.find(slots, keys, self.rows.fallback) < self.rows.first
            chosen = gone.cpu().numpy()
            return Touched(
                version=version,
                slots=_array(meta[:, SLOT], torch.int32),
                keys=_array(meta[:, KEY]),
                removed_slots=removed_slots[chosen],
                removed_keys=removed_keys[chosen],
            )

    def acknowledge(self, cursor: str, version: int) -> None:
        with self._lock:
            self._cursors.acknowledge(cursor, version)

    def export(self, slots: Int32, keys: Int64) -> Rows:
        with self._lock:
            rows = self.rows.index.find(*self._pairs(slots, keys), self.rows.fallback)
            missing = np.flatnonzero((rows < self.rows.first).cpu().numpy())
            if len(missing):
                at = missing[0]
                raise KeyError(f"table {self.layout.name!r} has no row of slot {slots[at]}, key {keys[at]}")
            return self._copy(slots.copy(), keys.copy(), rows)

    def restore(self, rows: Rows) -> None:
        with self._lock:
            slots, keys = self._pairs(rows.slots, rows.keys, rows.values, rows.state, rows.last_seen_ms)
            values, state = self._whole(rows)
            seen = self.rows.tensor(last_seen(rows.last_seen_ms))
            _, last = self.rows.create(slots, keys, self._cursors.now)
            self.rows.values.scatter(last, values)
            self.rows.state.scatter(last, state)
            version = torch.full_like(keys, self._cursors.now)
            self.rows.index.meta.scatter(last, torch.stack([keys, slots.to(torch.int64), seen, version], 1))

    def write(self, slots: Int32, keys: Int64, values: Float32, now_ms: int) -> None:
        with self._lock:
            pairs = self._pairs(slots, keys, values)
            given = self._matrix("values", values, self.layout.dim)
            rows, last = self.rows.create(*pairs, self._cursors.now)
            self.rows.values.scatter(last, given)
            self.rows.see(rows, now_ms, self._cursors.now)

    def remove(self, slots: Int32, keys: Int64) -> None:
        with self._lock:
            self._tombstones(*self.rows.remove(*self._pairs(slots, keys)))

    def pending(self) -> Pending:
        with self._lock:
            waiting = self.rows.waiting
            _, meta = waiting.live(lambda meta: meta[:, SLOT] >= 0, waiting.first, waiting.counts()[0])
            return Pending(
                slots=_array(meta[:, SLOT], torch.int32),
                keys=_array(meta[:, KEY]),
                counts=_array(meta[:, CHANGED]),
                last_seen_ms=_array(meta[:, SEEN]),
            )

    def restore_pending(self, pending: Pending) -> None:
        with self._lock:
            slots, keys = self._pairs(pending.slots, pending.keys, pending.counts, pending.last_seen_ms)
            counts, seen = self.rows.tensor(pending.counts), self.rows.tensor(pending.last_seen_ms)
            self.rows.forget_counts()
            self.rows.put_counts(slots, keys, counts, seen, torch.ones_like(keys, dtype=torch.bool))

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
                self.rows.values.scatter(row, values[at : at + 1])
                self.rows.state.scatter(row, state[at : at + 1])

    def memory_bytes(self) -> int:
        with self._lock:
            return self.rows.nbytes

    def __len__(self) -> int:
        with self._lock:
            return self.rows.index.counts()[1]

    def _pairs(self, slots: Int32, keys: Int64, *others: Float32 | Int64) -> tuple[Tensor, Tensor]:
        """The pairs on the device, all arguments of one length and every slot one of the layout, or ValueError."""
        same = all(array.ndim >= 1 and len(array) == len(keys) for array in (slots, keys, *others))
        if not same or slots.ndim != 1 or keys.ndim != 1 or slots.min(initial=0) < 0 or slots.max(initial=0) > 65535:
            check_pairs(self.layout, slots, keys, *others)
        if not self._known[slots].all():
            check_pairs(self.layout, slots, keys, *others)
        return self.rows.tensor(slots.astype(np.int32)), self.rows.tensor(keys.astype(np.int64))

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
            state=_array(self.rows.state.gather(rows)),
            last_seen_ms=_array(self.rows.index.meta.gather(rows)[:, SEEN]),
        )

    def _tombstones(self, slots: Tensor, keys: Tensor) -> int:
        if len(keys):
            self._cursors.removed(_array(slots), _array(keys))
        return len(keys)


def _array(tensor: Tensor, dtype: torch.dtype | None = None) -> Any:
    """A copy on the host, of `dtype` or the tensor's own. Waits for the device."""
    return tensor.to(dtype or tensor.dtype).contiguous().cpu().numpy()
