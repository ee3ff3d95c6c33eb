"""Rows on a device: what the CUDA table does with tensors. Nothing waits for the device unless it says so.

Rows 0 … slots-1 are the slots' shared default rows, so a missing key is a row like any other. Tensors: slots int32, keys
int64, gradients float32, all on the device and contiguous; a slot that the layout has not gives NaN, and trains nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton
from torch import Tensor

from recsys.keys import mix
from recsys.table import triton_kernels as kernels
from recsys.table.base import Layout
from recsys.table.cuda_index import CHANGED, KEY, SEEN, SLOT, Chunks, DeviceIndex, interpreted, lanes
from recsys.table.rows import check_layout, default_values, initial_state, last_seen, state_width, table_full

CHUNK_ROWS = 2**18
"""Rows that are allocated together, a power of two: 67 MB at 64 values. Half doubles the list of addresses, which should
stay in a cache; double leaves more memory unused."""
_LARGEST = float(np.finfo(np.float32).max)
_OPTIMIZERS = {"sgd": kernels.SGD, "adagrad": kernels.ADAGRAD, "rowwise_adagrad": kernels.ROWWISE_ADAGRAD}


class DeviceRows:
    """Index, values, optimiser state and admission counts of one layout. One stream, one thread at a time."""

    def __init__(self, layout: Layout, device: torch.device, chunk_rows: int = CHUNK_ROWS) -> None:
        check_layout(layout)
        if device.type != "cuda" and not interpreted():
            raise ValueError(
                f"table {layout.name!r} needs a CUDA device, not {device}: or TRITON_INTERPRET=1, for tests"
            )
        self.layout, self.device = layout, device
        slots = sorted(layout.slots)
        self.first = len(slots)
        default_row = np.full(65536, -1, np.int32)
        default_row[slots] = np.arange(len(slots))
        admission = np.ones(65536, np.int64)
        admission[slots] = [layout.slots[slot].admission for slot in slots]
        fresh = initial_state(layout)
        self.fallback, self._admission, self.fresh = (self.tensor(a) for a in (default_row, admission, fresh))
        self._counts_rows = bool(admission.max() > 1)
        total = len(slots) + layout.capacity
        self.values = Chunks(total, layout.dim, torch.float32, device, chunk_rows)
        self.state = Chunks(total, len(fresh), torch.float32, device, chunk_rows)
        self.index = DeviceIndex(layout.capacity, len(slots), device, chunk_rows)
        self._chunk_rows = chunk_rows
        self.forget_counts()
        self._grow()
        defaults = torch.arange(len(slots), dtype=torch.int32, device=device)
        self.values.scatter(defaults, self.tensor(default_values(layout)))
        self.state.scatter(defaults, self.fresh.expand(len(slots), -1))
        seed = mix(np.array([layout.seed % 2**64], np.uint64)).view(np.int64)
        scale = np.concatenate([np.full(s.dim, s.init_scale, np.float32) for s in layout.segments])
        self._start = (self.tensor(seed), self.tensor(scale), self.fresh)
        rates = np.array([(s.learning_rate, s.epsilon) for s in layout.segments], np.float64)
        self._rates = list(self.tensor(rates))

    def tensor(self, array: npt.NDArray[Any]) -> Tensor:
        """A copy on the device; on the CPU it may be the array itself."""
        return torch.from_numpy(np.require(array, None, ["C", "A", "W"])).to(self.device)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.values, self.state, self.index, self.waiting, self.fallback))

    def forget_counts(self) -> None:
        """Start the counts of unadmitted keys anew. In meta data, a count stands in CHANGED."""
        self._no_row = torch.where(self.fallback >= 0, 0, -1).to(torch.int32)
        self.waiting = DeviceIndex(2**31 - 2**20, 1, self.device, 2**14)

    def lookup(self, slots: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Values [N, D] and found [N]; a missing key gets its slot's default row."""
        rows = torch.empty(len(keys), dtype=torch.int32, device=self.device)
        out = torch.empty((len(keys), self.layout.dim), device=self.device)
        if len(keys):
            shape, programs = self.values.shape(len(keys))
            given = (self.index.index, (slots, keys), self.fallback, self.values.addresses, (rows, out))
            kernels.lookup[(programs,)](*given, len(keys), SHAPE=shape)
        return out, rows >= self.first

    def lookup_train(self, slots: Tensor, keys: Tensor, now_ms: int, version: int, admit: bool = True) -> Tensor:
        """Values [N, D]; counts, admits and creates as `Table.lookup_train`. New rows are marked as changed."""
        rows = self.index.find(slots, keys, self.fallback)
        if admit:
            rows = self._admit(slots, keys, rows, now_ms, version)
        self.see(rows, now_ms)
        return self.gather(rows)

    def gather(self, rows: Tensor) -> Tensor:
        """Values [N, D]; NaN for rows below 0."""
        out = torch.full((len(rows), self.layout.dim), torch.nan, device=self.device)
        if len(rows):
            shape, programs = self.values.shape(len(rows))
            kernels.gather[(programs,)](self.values.addresses, rows, out, len(rows), SHAPE=shape)
        return out

    def create(self, slots: Tensor, keys: Tensor, version: int) -> tuple[Tensor, Tensor]:
        """Rows [N] of the keys, made where missing, marked as changed; and each lane's row, or -1 if a later lane has
        the same key. TableFull before anything changed."""
        rows = self.index.find(slots, keys, self.fallback)
        where = self.index.group(slots, keys, torch.ones(len(keys), dtype=torch.bool, device=self.device))
        at = torch.arange(len(keys), device=self.device)
        missing = rows < self.first
        rows = self._make(slots, keys, missing & (where == at), version)[where].where(missing, rows)
        last = torch.full_like(at, -1).scatter_reduce_(0, where, at, "amax")
        return rows, torch.where(last[where] == at, rows, -1)

    def apply_gradients(self, slots: Tensor, keys: Tensor, gradients: Tensor, now_ms: int, version: int) -> Tensor:
        """One optimiser step; a tensor [1] that is not 0 if gradients were refused and nothing was changed.

        Refused is also what is finite but so large (3.4e38 / N) that a sum of duplicates might not be.
        """
        refused = torch.zeros(1, dtype=torch.int32, device=self.device)
        count = len(keys)
        if not count:
            return refused
        size, programs = lanes(gradients.numel(), 1, 2048)
        kernels.refuse[(programs,)](gradients, refused, _LARGEST / count, gradients.numel(), LANES=size)
        rows = self.index.find(slots, keys, self.fallback)
        ordered = torch.sort(rows, stable=True)
        sums = self._presum(ordered, gradients)
        start = state = 0
        for number, segment in enumerate(self.layout.segments):
            padded = triton.next_power_of_2(segment.dim)
            size, programs = lanes(count, padded)
            span = (start, segment.dim, padded, state, _OPTIMIZERS[segment.optimizer])
            kernels.step[(programs,)](
                (ordered.values, ordered.indices),
                (gradients, sums, refused),
                (self.values.addresses, self.state.addresses),
                self._rates[number],
                count,
                SHAPE=(self._chunk_rows, self.layout.dim, len(self.fresh), *span, size),
                enable_fp_fusion=False,
            )
            start, state = start + segment.dim, state + state_width(segment)
        self.see(torch.where(refused > 0, -1, rows), now_ms, version)
        return refused

    def see(self, rows: Tensor, now_ms: int, version: int = 0) -> None:
        """Move last-seen of rows on; with a version > 0, mark them as changed then."""
        if len(rows):
            size, programs = lanes(len(rows))
            given = (self.index.meta.addresses, rows, self.first, last_seen(now_ms), version, len(rows))
            kernels.see[(programs,)](*given, SHAPE=(self._chunk_rows, size))

    def remove(self, slots: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Free the rows of the keys that are there; those slots and keys. Waits for the device."""
        rows = self.index.find(slots, keys, self.fallback)
        there = rows >= self.first
        where = self.index.group(slots, keys, there)
        chosen = there & (where == torch.arange(len(keys), device=self.device))
        slots, keys, rows = slots[chosen], keys[chosen], rows[chosen]
        self.index.drop(slots, keys, rows)
        return slots, keys

    def put_counts(self, slots: Tensor, keys: Tensor, counts: Tensor, seen: Tensor, wanted: Tensor) -> None:
        """Set the counts of the wanted lanes, which are unique pairs; last-seen never goes back."""
        rows = self.waiting.find(slots, keys, self._no_row)
        new = wanted & (rows == 0)
        self.waiting.reserve(new, lambda held, more: table_full(self.layout, held, more))
        made = self.waiting.make(slots, keys, new)
        known = self.waiting.meta.gather(torch.clamp(rows, min=0))
        seen = torch.where(rows > 0, torch.maximum(seen, known[:, SEEN]), seen)
        rows = torch.where(wanted, torch.where(new, made, rows), -1)
        self.waiting.meta.scatter(rows, torch.stack([keys, slots.to(torch.int64), seen, counts], 1))

    def expired(self, index: DeviceIndex, cutoff_ms: Tensor, span: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Slots and keys of rows in `span` not seen since their slot's cutoff, freed. Waits for the device."""
        rows, meta = index.live(lambda meta: meta[:, SEEN] <= cutoff_ms[meta[:, SLOT].clamp(min=0)], *span)
        slots, keys = meta[:, SLOT].to(torch.int32), meta[:, KEY].contiguous()
        index.drop(slots, keys, rows)
        return slots, keys

    def _admit(self, slots: Tensor, keys: Tensor, rows: Tensor, now_ms: int, version: int) -> Tensor:
        """Count missing keys and make the rows that are due; rows [N] after that."""
        missing = (rows >= 0) & (rows < self.first)
        where = self.index.group(slots, keys, missing)
        at = torch.arange(len(keys), device=self.device)
        where = torch.where(missing, where, at)
        chosen = missing & (where == at)
        due = chosen
        if self._counts_rows:
            counts = torch.zeros_like(at).scatter_add_(0, where, missing.to(torch.int64))
            known = self.waiting.find(slots, keys, self._no_row).clamp(min=0)
            counts += self.waiting.meta.gather(known)[:, CHANGED]
            due = chosen & (counts >= self._admission[slots.to(torch.int64) & 65535])
        made = self._make(slots, keys, due, version)
        if self._counts_rows:
            self.put_counts(slots, keys, counts, torch.full_like(keys, now_ms), chosen & ~due)
        made = made[where]
        return torch.where(missing & (made >= 0), made, rows)

    def _make(self, slots: Tensor, keys: Tensor, wanted: Tensor, version: int) -> Tensor:
        """Rows [N] of the wanted lanes, as new, -1 for others. TableFull before anything changed."""
        self.index.reserve(wanted, lambda held, more: table_full(self.layout, held, more))
        self._grow()
        rows = self.index.make(slots, keys, wanted)
        if len(keys):
            padded, state = (triton.next_power_of_2(max(1, width)) for width in (self.layout.dim, len(self.fresh)))
            size, programs = lanes(len(keys), padded)
            shape = (self._chunk_rows, self.layout.dim, padded, size, len(self.fresh), state)
            columns = (self.values.addresses, self.state.addresses)
            kernels.initialise[(programs,)](columns, (slots, keys), rows, self._start, len(keys), SHAPE=shape)
            self.see(rows, 0, version)
            if self.waiting.maybe_rows:
                counted = self.waiting.find(slots, keys, self._no_row)
                self.waiting.drop(slots, keys, torch.where(wanted, counted, 0))
        return rows

    def _presum(self, ordered: Sequence[Tensor], gradients: Tensor) -> Tensor:
        count, dim = gradients.shape
        tiles = triton.cdiv(count, kernels.TILE)
        sums = torch.empty((tiles, dim), dtype=torch.float64, device=self.device)
        if tiles > 1:
            padded = triton.next_power_of_2(dim)
            size, programs = lanes(tiles, padded, 4)  # few lanes: each goes a long way alone
            kernels.presum[(programs,)](tuple(ordered), gradients, sums, count, SHAPE=(dim, padded, size))
        return sums

    def _grow(self) -> None:
        rows = len(self.index.meta)
        self.values.grow(rows)
        self.state.grow(rows)
