"""Which keys get a row on a device: those seen often enough, counted exactly or by a filter of bounded memory."""

from __future__ import annotations

import secrets

import numpy as np
import torch
from torch import Tensor

from recsys.table import triton_index as kernels
from recsys.table import worth
from recsys.table.base import Layout, Pending
from recsys.table.cuda_index import KINDS, Chunks, DeviceIndex, lanes, launch
from recsys.table.cuda_room import least_worth
from recsys.table.rows import (
    FILTER_SEED,
    LAST_SEEN_STEP_MS,
    check_sketch,
    filter_period_ms,
    last_seen,
    seed_head,
    table_full,
)
from recsys.table.triton_kernels import BLOCK, settle

SEEN_MS, COUNT = 0, 1
"""Columns of a key that is counted exactly."""
Counted = tuple[Tensor, Tensor, Tensor]


class DeviceAdmission:
    """Counts of keys without a row; or a filter of int32 counters (4 bytes each), which are read as at most 255.

    Tensors as in `DeviceIndex`. Nothing waits for the device unless it says so.
    """

    def __init__(self, layout: Layout, fallback: Tensor) -> None:
        self._layout, self._fallback, self._device = layout, fallback, fallback.device
        threshold = np.ones(65536, np.int64)
        for slot, policy in layout.slots.items():
            threshold[slot] = policy.admission
        self.at_once = bool((threshold == 1).all())
        """Whether every key gets a row when it is first seen."""
        self._threshold = torch.from_numpy(threshold).to(self._device)
        self._seed = torch.from_numpy(seed_head(layout.seed ^ FILTER_SEED).view(np.int64)).to(self._device)
        self._each = -(-layout.filter_counters // 4)
        self._order = secrets.randbits(63) if layout.order is None else layout.order
        self._first_slot = min(layout.slots)
        self._windows = worth.Windows()
        self.clear()

    def clear(self) -> None:
        """Forget all counts."""
        no_row = torch.where(self._fallback >= 0, 0, -1).to(torch.int32)
        most = 2**31 - 2**20
        self.counts = Chunks(most, 2, torch.int64, self._device, 2**14)
        self.waiting = DeviceIndex(most, 1, no_row, (self.counts,))
        self._sketch = torch.zeros(4 * self._each, dtype=torch.int32, device=self._device)
        self._sketch_ms = torch.zeros(1, dtype=torch.int64, device=self._device)

    @property
    def nbytes(self) -> int:
        return self.counts.nbytes + self.waiting.nbytes + self._sketch.nbytes

    def due(self, slots: Tensor, keys: Tensor, missing: Tensor, now_ms: int) -> tuple[Tensor, Counted]:
        """Which missing lanes [N] are to get a row; and what `count` has to know, for nothing is counted yet."""
        threshold = self._threshold[slots.to(torch.int64) & 65535]
        if self._each:
            wanted = missing & (threshold > 1)
            sketch = self._sketch.clamp(max=255)
            least = torch.ones(len(keys), dtype=torch.int32, device=self._device)
            if len(keys):
                size, programs = lanes(len(keys))
                shape = (self._each, size)
                launch(kernels.tally, programs, sketch, (slots, keys), wanted, self._seed, len(keys), shape=shape)
                given = (sketch, (slots, keys), wanted, least, self._seed, len(keys))
                launch(kernels.least, programs, *given, shape=shape)
            begun = torch.where((self._sketch_ms == 0) & wanted.any(), now_ms, self._sketch_ms)
            return missing & (least >= threshold), (sketch, begun, least)
        where = self.waiting.group(slots, keys, missing)
        at = torch.arange(len(keys), device=self._device)
        where = torch.where(missing, where, at)
        counts = torch.zeros_like(at).scatter_add_(0, where, missing.to(torch.int64))
        counted = self.waiting.find(slots, keys)
        counts += torch.where(counted > 0, self.counts.gather(counted.clamp(min=0))[:, COUNT], 0)
        return missing & (counts >= threshold)[where], (missing & (where == at), counts, torch.full_like(keys, now_ms))

    def count(self, slots: Tensor, keys: Tensor, due: Tensor, counted: Counted) -> None:
        """Count what `due` counted."""
        if self._each:
            self._sketch, self._sketch_ms = counted[:2]
            return
        chosen, counts, now_ms = counted
        self.forget(torch.where(chosen & due, slots, -1), keys)
        waits = chosen & ~due & (self._threshold[slots.to(torch.int64) & 65535] > 1)  # not what found no room at once
        self.put(torch.where(waits, slots, -1), keys, counts, now_ms)

    def forget(self, slots: Tensor, keys: Tensor) -> None:
        """They have a row now; slots below 0 are left out, and equal pairs count as one."""
        if self.waiting.maybe_rows and len(keys):
            where = self.waiting.group(slots, keys, slots >= 0)
            first = where == torch.arange(len(keys), device=self._device)
            self.waiting.drop(slots, keys, torch.where(first, self.waiting.find(slots, keys), 0))

    def put(self, slots: Tensor, keys: Tensor, counts: Tensor, seen_ms: Tensor) -> None:
        """Set the exact counts of unique pairs, those of slots below 0 left out; last-seen never goes back."""
        if not len(keys):
            return
        if self._layout.spare and self.waiting.most_rows + len(keys) > self._layout.capacity:
            slots = self._within(slots, keys)
        self.waiting.reserve(len(keys), lambda: len(keys), lambda held, more: table_full(self._layout, held, more))
        held = self.waiting.find(slots, keys)
        known = torch.where(held > 0, self.counts.gather(held.clamp(min=0))[:, SEEN_MS], seen_ms)
        claims = self.waiting.enter(slots, keys)
        shape = (2, 0, 1, KINDS[torch.int64], 2, 0, 1, 1, lanes(len(keys))[0], False)
        none = (self._seed, self._seed, self._seed, self._seed, self._seed)
        given = (self.waiting.index, (slots, keys), claims, none, 1 << 32, len(keys))
        launch(settle, -(-len(keys) // BLOCK), *given, shape=shape)
        self.counts.scatter(claims[0], torch.stack([torch.maximum(seen_ms, known), counts], 1))

    def _within(self, slots: Tensor, keys: Tensor) -> Tensor:
        """Forget counts of least worth to make room for these; slots with -1 for what still has none. Waits for the device."""
        layout, wanted = self._layout, slots >= 0
        over = len(self.waiting) + int(wanted.sum()) - layout.capacity
        if over <= 0:
            return slots
        count = worth.with_slack(layout, over)
        of = self._windows.next(len(self.waiting), worth.looks_for(count))
        self.waiting.drop(*least_worth(self.waiting, self._order, of, count, self._worth, None))
        new = wanted & (self.waiting.find(torch.where(wanted, slots, self._first_slot), keys) <= 0)
        return torch.where(new & (torch.cumsum(new, 0) > layout.capacity - len(self.waiting)), -1, slots)

    def _worth(self, rows: Tensor) -> Tensor:
        counts = self.counts.gather(rows).cpu().numpy()
        steps = last_seen(counts[:, SEEN_MS]) // LAST_SEEN_STEP_MS
        return torch.from_numpy(steps + worth.HALF_LIFE * worth.level_of(counts[:, COUNT]))

    def expire(self, cutoff_ms: Tensor, now_ms: int) -> None:
        """Forget exact counts not seen since their slot's cutoff [65536]; halve the filter when due. Waits for the device."""
        if self.waiting.maybe_rows:
            for slots, keys, rows, _ in self.waiting.scan():
                gone = self.counts.gather(rows)[:, SEEN_MS] <= cutoff_ms[slots]
                self.waiting.drop(slots[gone], keys[gone], rows[gone])
        period = filter_period_ms(self._layout) if self._each else None
        begun = int(self._sketch_ms) if period else 0
        if begun and period and now_ms - begun >= period:
            times = (now_ms - begun) // period
            self._sketch = self._sketch.clamp(max=255) >> min(times, 8)
            self._sketch_ms = torch.full_like(self._sketch_ms, begun + times * period)

    def export(self, window: int) -> Pending:
        """All counts, and where the next windows begin; that of rows is the table's. Waits for the device."""
        parts = [[np.zeros(0, np.int32), *[np.zeros(0, np.int64)] * 3]]
        for slots, keys, rows, _ in self.waiting.scan():
            counts = self.counts.gather(rows)
            parts.append([part.cpu().numpy() for part in (slots, keys, counts[:, COUNT], counts[:, SEEN_MS])])
        whole = [np.concatenate(part) for part in zip(*parts, strict=True)]
        return Pending(
            slots=whole[0],
            keys=whole[1],
            counts=whole[2],
            last_seen_ms=whole[3],
            sketch=self._sketch.clamp(max=255).to(torch.uint8).cpu().numpy(),
            sketch_ms=int(self._sketch_ms),
            windows=np.array([window, self._windows.at]),
        )

    def restore(self, pending: Pending, slots: Tensor, keys: Tensor) -> None:
        """Replace all counts. ValueError for a filter of another size."""
        check_sketch(self._layout, pending)
        counts, seen_ms = (
            torch.from_numpy(part.copy()).to(self._device) for part in (pending.counts, pending.last_seen_ms)
        )
        self.clear()
        self._sketch.copy_(torch.from_numpy(pending.sketch.astype(np.int32)))
        self._sketch_ms.fill_(pending.sketch_ms)
        self._windows.at = int(pending.windows[1])
        self.put(slots, keys, counts, seen_ms)
