"""The CUDA table's rows as they are served and saved: the contract in numpy arrays, the rows on a device."""

from __future__ import annotations

import threading

import numpy as np
import torch
from torch import Tensor

from recsys.table import worth
from recsys.table.base import Layout, Rows, Touched
from recsys.table.cuda_rows import CHUNK_ROWS, DeviceRows
from recsys.table.cuda_transfer import fetched, pairs_to_device, to_device, to_host
from recsys.table.cursors import Cursors
from recsys.table.rows import check_pairs, check_width
from recsys.types import Bool, Float32, Int32, Int64


class CudaServingTable:
    """See `recsys.table.base.ServingTable`. Thread-safe with one lock; all kernels run on the device's default stream.

    `rows` has the same verbs on tensors of the device, for callers that live there: they take turns by themselves.
    """

    def __init__(self, layout: Layout, device: str | torch.device = "cuda", chunk_rows: int = CHUNK_ROWS) -> None:
        if chunk_rows < 2 or chunk_rows & (chunk_rows - 1):
            raise ValueError(f"table {layout.name!r}: chunk_rows must be a power of two >= 2, got {chunk_rows}")
        self.layout = layout
        self.rows = DeviceRows(layout, torch.device(device), chunk_rows)
        self._known = np.zeros(65536, np.bool_)
        self._known[list(layout.slots)] = True
        self._cursors = Cursors()
        self._lock = threading.RLock()

    def lookup(self, slots: Int32, keys: Int64) -> tuple[Float32, Bool]:
        with self._lock:
            values, rows = fetched(*self.rows.lookup(*self._pairs(slots, keys)))
            return values, rows >= self.rows.first

    def touched(self, cursor: str) -> Touched:
        with self._lock:
            version, after, removed_slots, removed_keys = self._cursors.take(cursor)
            index = self.rows.index
            changed: list[tuple[Int32, Int64]] = [(np.zeros(0, np.int32), np.zeros(0, np.int64))]
            for slots, keys, rows, _ in index.scan():
                new = self.rows.records.changed(rows) > after
                changed.append((to_host(slots[new]), to_host(keys[new])))
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
            return _copied(self.rows, slots.copy(), keys.copy(), rows)

    def restore(self, rows: Rows) -> None:
        with self._lock:
            pairs = self._pairs(rows.slots, rows.keys, rows.values, rows.state, rows.last_seen_ms)
            values, state = self._whole(rows)
            uses = to_device(np.minimum(rows.levels, worth.MAX_USES), self.rows.device)
            last = self.rows.create(*pairs, 0, self._cursors.now)
            self.rows.put(last, values, state)
            self.rows.records.mark(last, to_device(rows.last_seen_ms, self.rows.device), self._cursors.now, uses)

    def write(self, slots: Int32, keys: Int64, values: Float32, now_ms: int) -> None:
        with self._lock:
            pairs = self._pairs(slots, keys, values)
            given = self._matrix("values", values, self.layout.dim)
            self.rows.values.scatter(self.rows.create(*pairs, now_ms, self._cursors.now), given)

    def remove(self, slots: Int32, keys: Int64) -> None:
        with self._lock:
            self._tombstones(*self.rows.remove(*self._pairs(slots, keys)))

    def defaults(self) -> Rows:
        with self._lock:
            slots = np.array(sorted(self.layout.slots), np.int32)
            keys = np.zeros(len(slots), np.int64)
            rows = torch.arange(len(slots), dtype=torch.int32, device=self.rows.device)
            return _copied(self.rows, slots, keys, rows)

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
        return pairs_to_device(slots, keys, self.rows.device)

    def _matrix(self, name: str, array: Float32, *widths: int) -> Tensor:
        check_width(self.layout, name, array, *widths)
        return to_device(array.astype(np.float32), self.rows.device)

    def _whole(self, rows: Rows) -> tuple[Tensor, Tensor]:
        values = self._matrix("values", rows.values, self.layout.dim)
        state = self._matrix("state", rows.state, len(self.rows.fresh), 0)
        return values, state if state.shape[1] else self.rows.fresh.expand(len(values), -1)

    def _tombstones(self, slots: Tensor, keys: Tensor) -> int:
        if len(keys):
            self._cursors.removed(to_host(slots), to_host(keys))
        return len(keys)


def _copied(of: DeviceRows, slots: Int32, keys: Int64, rows: Tensor) -> Rows:
    return Rows(
        slots=slots,
        keys=keys,
        values=to_host(of.values.gather(rows)),
        state=to_host(of.records.state(rows)),
        last_seen_ms=to_host(of.records.seen_ms(rows)),
        uses=to_host(of.records.uses(rows)).astype(np.uint8),
    )
