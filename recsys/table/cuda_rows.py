"""Rows on a device: what the CUDA table does with tensors. Nothing waits for the device unless it says so.

Rows 0 … slots-1 are the slots' shared default rows, so a missing key is a row like any other. Tensors: slots int32, keys
int64, gradients float32, all on the device and contiguous; a slot that the layout has not gives NaN, and trains nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from recsys.table import triton_kernels as kernels
from recsys.table.base import Layout
from recsys.table.cuda_admission import DeviceAdmission
from recsys.table.cuda_index import INTERPRETED, KINDS, Chunks, DeviceIndex, lanes, launch, power
from recsys.table.cuda_records import RowRecords, stamp
from recsys.table.cuda_steps import DeviceSteps, Ordered
from recsys.table.cuda_transfer import to_device
from recsys.table.rows import (
    LAST_SEEN_STEP_MS,
    check_layout,
    default_values,
    initial_state,
    last_seen,
    scales,
    seed_head,
    table_full,
)
from recsys.table.worth import counted, tick

CHUNK_ROWS = 2**18
"""Rows that are allocated together, a power of two: 67 MB at 64 values. Half doubles the list of addresses, which should
stay in a cache; double leaves more memory unused."""


class DeviceRows:
    """Index, values, records (optimiser state, last-seen, version) and admission counts of one layout.

    One stream, one thread at a time.
    """

    def __init__(self, layout: Layout, device: torch.device, chunk_rows: int = CHUNK_ROWS) -> None:
        check_layout(layout)
        if device.type != "cuda" and not INTERPRETED:
            raise ValueError(
                f"table {layout.name!r} needs a CUDA device, not {device}: or TRITON_INTERPRET=1, for tests"
            )
        self.layout, self.device = layout, device
        slots = sorted(layout.slots)
        self.first = len(slots)
        default_row = np.full(65536, -1, np.int32)
        default_row[slots] = np.arange(len(slots))
        self.fallback = to_device(default_row, device)
        self.fresh = to_device(initial_state(layout), device)
        total = len(slots) + layout.capacity
        self.values = Chunks(total, layout.dim, getattr(torch, layout.precision), device, chunk_rows)
        self.records = RowRecords(total, len(self.fresh), device, chunk_rows)
        self.index = DeviceIndex(layout.capacity, len(slots), self.fallback, (self.values, self.records.chunks))
        self.admission = DeviceAdmission(layout, self.fallback)
        defaults = torch.arange(len(slots), dtype=torch.int32, device=device)
        self.put(defaults, to_device(default_values(layout), device), self.fresh.expand(len(slots), -1))
        start = (
            to_device(seed_head(layout.seed).view(np.int64), device),
            to_device(scales(layout), device),
            self.fresh,
        )
        self._new = (self.values.addresses, self.records.chunks.addresses, *start)
        self._padded, width = power(layout.dim), self.records.width
        values_shape = (chunk_rows, layout.dim, self._padded, KINDS[self.values.dtype])
        shape = (*values_shape, self.records.chunks.width, width, power(max(1, width)), self.first)
        self._layout_shape = shape
        self.steps = DeviceSteps(layout, self.values, self.records, shape)

    @property
    def nbytes(self) -> int:
        parts = (self.values, self.records.chunks, self.index, self.admission, self.fallback)
        return sum(part.nbytes for part in parts)

    def lookup(self, slots: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Values [N, D] and rows [N]; a missing key gets its slot's default row, which is below `first`."""
        rows = torch.empty(len(keys), dtype=torch.int32, device=self.device)
        out = torch.empty((len(keys), self.layout.dim), device=self.device)
        if len(keys):
            size, programs = lanes(len(keys), self._padded)
            given = (self.index.index, (slots, keys), self.values.addresses, (rows, out), len(keys))
            launch(kernels.lookup, programs, *given, shape=self._shape(size))
        return out, rows

    def lookup_train(
        self, slots: Tensor, keys: Tensor, now_ms: int, version: int, admit: bool = True
    ) -> tuple[Tensor, Ordered]:
        """Values [N, D], and what `apply_gradients` needs, sorted meanwhile. As `Table.lookup_train`, but last-seen of rows
        that were there moves on with `apply_gradients` (or `see`), which saves a pass over them."""
        rows = self.rows_train(slots, keys, now_ms, version, admit)
        ordered = self.steps.order(rows, slots, keys)
        return self.values.gather(rows), ordered

    def rows_train(
        self, slots: Tensor, keys: Tensor, now_ms: int, version: int, admit: bool = True, room: int | None = None
    ) -> Tensor:
        """Rows [N]: counts, admits and creates as `Table.lookup_train`; of the keys that are due the first `room`, if given. New
        rows are seen now and marked as changed. Rows stay what they are until some are removed or expire."""
        if not admit:
            return self.index.find(slots, keys)
        if room is not None or not self.admission.at_once:
            return self._admit(slots, keys, now_ms, version, room)
        return self._make(slots, keys, now_ms, version, lambda: self._missing(slots, keys))

    def count_uses(self, slots: Tensor, keys: Tensor, rows: Tensor, now_ms: int) -> None:
        """Count the rows of a call, each once, before they are seen; lanes below `first` are skipped. Waits for the device."""
        there = rows >= self.first
        where = self.index.group(slots, keys, there)
        chosen = there & (where == torch.arange(len(keys), device=self.device))
        rows, of = rows[chosen], tick(now_ms)
        seen, levels = self.records.seen_and_uses(rows)
        now = int(last_seen(now_ms)) // LAST_SEEN_STEP_MS
        new = [
            counted(level, now - at, key, of)
            for level, at, key in zip(levels, seen, keys[chosen].tolist(), strict=True)
        ]
        self.records.put_uses(rows, to_device(np.array(new, np.int32), self.device))

    def due(self, slots: Tensor, keys: Tensor, now_ms: int) -> int:
        """How many keys of a call are due for a row. Waits for the device."""
        rows = self.index.find(slots, keys)
        due, _ = self.admission.due(slots, keys, (rows >= 0) & (rows < self.first), now_ms)
        return self._different(slots, keys, due)

    def put(self, rows: Tensor, values: Tensor, state: Tensor) -> None:
        """Set unique rows; those below 0 are skipped."""
        self.values.scatter(rows, values)
        self.records.put(rows, state)

    def create(self, slots: Tensor, keys: Tensor, now_ms: int, version: int) -> Tensor:
        """Each lane's row, made where missing, seen now and changed; -1 if a later lane has the same key.

        TableFull before anything changed."""
        rows = self._make(slots, keys, now_ms, version, lambda: self._missing(slots, keys))
        self.admission.forget(slots, keys)
        self.see(rows, now_ms, version)
        where = self.index.group(slots, keys, torch.ones_like(keys, dtype=torch.bool))
        at = torch.arange(len(keys), device=self.device)
        last = torch.full_like(at, -1).scatter_reduce_(0, where, at, "amax")
        return torch.where(last[where] == at, rows, -1)

    def see(self, rows: Tensor, now_ms: int, version: int | None = None) -> None:
        """Move last-seen of rows on; with a version, mark them as changed then."""
        if len(rows):
            size, programs = lanes(len(rows))
            given = (self.records.chunks.addresses, rows, stamp(now_ms, version or 1), len(rows))
            launch(kernels.see, programs, *given, shape=self._shape(size, version is not None))

    def remove(self, slots: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Free the rows of the keys that are there; those slots and keys. Waits for the device."""
        rows = self.index.find(slots, keys)
        there = rows >= self.first
        where = self.index.group(slots, keys, there)
        chosen = there & (where == torch.arange(len(keys), device=self.device))
        slots, keys, rows = slots[chosen], keys[chosen], rows[chosen]
        self.index.drop(slots, keys, rows)
        return slots, keys

    def _shape(self, size: int, change: bool = False) -> tuple[int, ...]:
        """SHAPE of the kernels."""
        return (*self._layout_shape, size, change)

    def _missing(self, slots: Tensor, keys: Tensor) -> int:
        """How many different keys have no row. Waits for the device."""
        rows = self.index.find(slots, keys)
        return self._different(slots, keys, (rows >= 0) & (rows < self.first))

    def _different(self, slots: Tensor, keys: Tensor, chosen: Tensor) -> int:
        where = self.index.group(slots, keys, chosen)
        return int((chosen & (where == torch.arange(len(keys), device=self.device))).sum())

    def _make(self, slots: Tensor, keys: Tensor, now_ms: int, version: int, wanted: Callable[[], int]) -> Tensor:
        """Rows [N], made where missing, as new. TableFull before anything changed."""
        self.index.reserve(len(keys), wanted, lambda held, more: table_full(self.layout, held, more))
        claims = self.index.enter(slots, keys)
        if len(keys):
            size, _ = lanes(len(keys), self._padded)
            given = (self.index.index, (slots, keys), claims, self._new, stamp(now_ms, version), len(keys))
            launch(kernels.settle, -(-len(keys) // kernels.BLOCK), *given, shape=self._shape(size))
        return claims[0]

    def _admit(self, slots: Tensor, keys: Tensor, now_ms: int, version: int, room: int | None) -> Tensor:
        """Count missing keys and make the rows that are due; rows [N] after that."""
        rows = self.index.find(slots, keys)
        due, waiting = self.admission.due(slots, keys, (rows >= 0) & (rows < self.first), now_ms)
        if room is not None:
            at = torch.arange(len(keys), device=self.device)
            where = torch.where(due, self.index.group(slots, keys, due), at)
            number = torch.cumsum(due & (where == at), 0) - 1
            due = due & (number[where] < room)
        made = self._make(torch.where(due, slots, -1), keys, now_ms, version, lambda: self._different(slots, keys, due))
        self.admission.count(slots, keys, due, waiting)
        return torch.where(made >= 0, made, rows)
