"""The CUDA table, trained: rows are counted, admitted, stepped, let go and expired."""

from __future__ import annotations

import secrets

import numpy as np
import torch
from torch import Tensor

from recsys.table import worth
from recsys.table.base import Layout, Pending
from recsys.table.cuda_room import least_worth
from recsys.table.cuda_rows import CHUNK_ROWS
from recsys.table.cuda_serving import CudaServingTable
from recsys.table.cuda_transfer import fetched, to_device
from recsys.types import Float32, Int32, Int64


def available() -> bool:
    """Whether there is a CUDA device."""
    return torch.cuda.is_available()


class CudaTable(CudaServingTable):
    """See `recsys.table.base.Table`.

    Sums are float64 in a fixed order: a batch gives the same bits every time, and those of the CPU table up to rounding.
    Gradients beyond 3.4e38 / N are refused as not finite.
    """

    def __init__(self, layout: Layout, device: str | torch.device = "cuda", chunk_rows: int = CHUNK_ROWS) -> None:
        super().__init__(layout, device, chunk_rows)
        self.evicted = self.refused = 0
        self._order = secrets.randbits(63) if layout.order is None else layout.order
        self._windows = worth.Windows()
        self._swept = 0

    def lookup_train(self, slots: Int32, keys: Int64, now_ms: int, admit: bool = True) -> Float32:
        with self._lock:
            pairs = self._pairs(slots, keys)
            before = self.rows.index.find(*pairs)
            room = self._make_room_for(pairs, before, now_ms) if admit else None
            rows = self.rows.rows_train(*pairs, now_ms, self._cursors.now, admit, room)
            if admit and len(keys):
                self.rows.count_uses(*pairs, before, now_ms)
            self.rows.see(rows, now_ms)
            return fetched(self.rows.values.gather(rows))[0]

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
        gone = least_worth(self.rows.index, self._order, of, count, self.rows.records.worth, kept)
        self.rows.index.drop(*gone)
        self.evicted += self._tombstones(*gone[:2])

    def apply_gradients(self, slots: Int32, keys: Int64, gradients: Float32, now_ms: int) -> None:
        with self._lock:
            pairs = self._pairs(slots, keys, gradients)
            given = self._matrix("gradients", gradients, self.layout.dim)
            if int(self.rows.steps.refused(given)):
                raise ValueError(f"table {self.layout.name!r}: gradients are not finite; nothing was changed")
            ordered = self.rows.steps.order(self.rows.index.find(*pairs), *pairs)
            self.rows.steps.apply_gradients(ordered, given, now_ms, self._cursors.now)

    def expire(self, now_ms: int, max_rows: int | None = None) -> int:
        cutoff = np.full(65536, np.iinfo(np.int64).min)
        for slot, policy in self.layout.slots.items():
            if policy.expiry_s is not None:
                cutoff[slot] = now_ms - int(policy.expiry_s * 1000)
        with self._lock:
            cutoff_ms = to_device(cutoff, self.rows.device)
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
            due = self.rows.records.seen_ms(rows) <= cutoff_ms[slots]
            self.rows.index.drop(slots[due], keys[due], rows[due])
            removed += self._tombstones(slots[due], keys[due])
            left -= len(rows)
            self._swept = end if most is not None else 0
        return removed, max(left, 0)

    def pending(self) -> Pending:
        with self._lock:
            return self.rows.admission.export(self._windows.at)

    def restore_pending(self, pending: Pending) -> None:
        with self._lock:
            pairs = self._pairs(pending.slots, pending.keys, pending.counts, pending.last_seen_ms)
            self.rows.admission.restore(pending, *pairs)
            self._windows.at = int(pending.windows[0])
