"""From (slot, key) to a row number on a device: open addressing, entered by 64-bit compare-and-swap, and rows in chunks
that never move.

Nothing here waits for the device unless it says so. How many rows a batch makes is known on the device alone; the host
keeps upper bounds, and asks for the counts (and grows, or refuses) only when a bound no longer fits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import triton
from torch import Tensor

from recsys.table import triton_kernels as kernels

_MAX_LOAD = 0.6
"""Probes of a missing key: 4 at 0.6 and 13 at 0.8 (Knuth 6.4), each a memory access; an entry is 16 bytes."""
_AHEAD = 4
"""Batches of this size that fit after growing, so that not every batch asks for counts."""
KEY, SLOT, SEEN, CHANGED = 0, 1, 2, 3
"""Columns of a row's meta data, one 32-byte sector: its key, slot (-1: free), last-seen, and when it changed."""


def interpreted() -> bool:
    """Whether the kernels were made for the interpreter."""
    return not isinstance(kernels.find, triton.JITFunction)


def lanes(count: int, width: int = 1, most: int = 128) -> tuple[int, int]:
    """Lanes of a program and programs, for `count` keys of `width` values each.

    About 2,048 values a program of 128 threads: two 16-byte accesses of each are under way at a time. The interpreter
    pays by the program, not by the lane.
    """
    size = triton.next_power_of_2(min(count, 4096)) if interpreted() else min(most, 2048 // width)
    size = max(2, size)
    return size, triton.cdiv(count, size)


class Chunks:
    """Rows [rows, width] of one column, in chunks of equal size that never move."""

    def __init__(self, rows: int, width: int, dtype: torch.dtype, device: torch.device, chunk_rows: int) -> None:
        self.width, self.dtype, self.chunk_rows = width, dtype, chunk_rows
        self.addresses = torch.zeros(triton.cdiv(rows, chunk_rows), dtype=torch.int64, device=device)
        self.chunks: list[Tensor] = []

    def __len__(self) -> int:
        return len(self.chunks) * self.chunk_rows

    @property
    def nbytes(self) -> int:
        return sum(chunk.nbytes for chunk in self.chunks) + self.addresses.nbytes

    def grow(self, rows: int, fill: int = 0) -> None:
        """Make room for `rows` rows in all, new ones filled with `fill`."""
        while len(self) < rows:
            shape = (self.chunk_rows, self.width)
            chunk = torch.full(shape, fill, dtype=self.dtype, device=self.addresses.device)
            self.addresses[len(self.chunks)] = chunk.data_ptr()
            self.chunks.append(chunk)

    def shape(self, count: int) -> tuple[tuple[int, int, int, int], int]:
        """SHAPE of the kernels, and the number of programs."""
        padded = triton.next_power_of_2(self.width)
        size, programs = lanes(count, padded)
        return (self.chunk_rows, self.width, padded, size), programs

    def gather(self, rows: Tensor) -> Tensor:
        """The rows [N, width], which must be >= 0."""
        out = torch.empty((len(rows), self.width), dtype=self.dtype, device=rows.device)
        if out.numel():
            shape, programs = self.shape(len(rows))
            kernels.gather[(programs,)](self.addresses, rows, out, len(rows), SHAPE=shape)
        return out

    def scatter(self, rows: Tensor, values: Tensor) -> None:
        """Set unique rows; those below 0 are skipped."""
        if values.numel():
            shape, programs = self.shape(len(rows))
            kernels.scatter[(programs,)](self.addresses, rows, values.contiguous(), len(rows), SHAPE=shape)


class DeviceIndex:
    """Rows `first`, `first + 1`, … of unique (slot, key) pairs, at most `capacity`; freed rows serve later keys.

    Tensors are on its device: slots int32, keys int64, rows int32. One stream.
    """

    def __init__(self, capacity: int, first: int, device: torch.device, chunk_rows: int) -> None:
        self.capacity, self.first, self.device = capacity, first, device
        self.meta = Chunks(first + capacity, 4, torch.int64, device, chunk_rows)
        self._counts = torch.tensor([first, 0, 0], device=device)  # next unused row, freed rows, deleted entries
        self._most = [0, 0]  # live rows, deleted entries: at most
        self._nothing = torch.tensor([0, -1, 0, 0], device=device)
        self._entries = self._empty(1024)
        self._free = torch.zeros(1, dtype=torch.int32, device=device)
        self._grow_rows(first)

    @property
    def nbytes(self) -> int:
        return self.meta.nbytes + self._entries.nbytes + self._free.nbytes

    @property
    def maybe_rows(self) -> bool:
        """False if there is certainly no row. Waits for nothing."""
        return self._most[0] > 0

    @property
    def index(self) -> tuple[Tensor, int]:
        """Entries and mask, as the kernels take them."""
        return self._entries, len(self._entries) - 1

    def counts(self) -> tuple[int, int]:
        """One past the highest row ever used, and live rows. Waits for the device."""
        end, free, deleted = self._counts.tolist()
        self._most = [end - free - self.first, deleted]
        return end, self._most[0]

    def find(self, slots: Tensor, keys: Tensor, fallback: Tensor) -> Tensor:
        """Rows [N]; `fallback[slot]` where missing, -1 for a slot that has none."""
        rows = torch.empty(len(keys), dtype=torch.int32, device=self.device)
        if len(keys):
            size, programs = lanes(len(keys))
            kernels.find[(programs,)](self.index, (slots, keys), fallback, rows, len(keys), LANES=size)
        return rows

    def group(self, slots: Tensor, keys: Tensor, active: Tensor) -> Tensor:
        """Position [N] of the first active lane with the same pair; meaningless where not active."""
        cells = torch.full((max(2, triton.next_power_of_2(2 * len(keys))),), -1, device=self.device)
        places = torch.zeros(len(keys), dtype=torch.int64, device=self.device)
        if len(keys):
            size, programs = lanes(len(keys))
            scratch = (cells, len(cells) - 1)
            kernels.group[(programs,)](scratch, (slots, keys), active, places, len(keys), LANES=size)
        return cells[places]

    def reserve(self, wanted: Tensor, full: Callable[[int, int], Exception]) -> None:
        """Make room for a row of each wanted lane, or raise `full(rows, more)`. Waits only if the bounds do not fit."""
        batch = len(wanted)
        room = min(self.capacity, len(self.meta) - self.first)
        if self._most[0] + batch > room or sum(self._most) + batch > _MAX_LOAD * len(self._entries):
            end, live = self.counts()
            more = int(wanted.sum())
            if live + more > self.capacity:
                raise full(live, more)
            # Freed rows come first, so no row beyond this is used.
            self._grow_rows(self.first + min(self.capacity, live + more + _AHEAD * batch))
            self._grow_entries(end, live + more, _AHEAD * batch)
        self._most[0] = min(self._most[0] + batch, self.capacity)

    def make(self, slots: Tensor, keys: Tensor, wanted: Tensor) -> Tensor:
        """Rows [N] of the wanted lanes (unique pairs, not in the index), in order; -1 for others. `reserve` comes first."""
        if not len(keys):
            return torch.empty(0, dtype=torch.int32, device=self.device)
        rank = torch.cumsum(wanted, 0) - 1
        free = self._counts[1]
        recycled = self._free[torch.clamp(free - 1 - rank, min=0)]
        rows = torch.where(rank < free, recycled, self._counts[0] + rank - free)
        rows = torch.where(wanted, rows, -1).to(torch.int32)
        made = rank[-1] + 1
        used = torch.minimum(made, free)
        self._counts[:2] += torch.stack([made - used, -used])
        self._claim(slots, keys, rows)
        zero = torch.zeros_like(keys)
        self.meta.scatter(rows, torch.stack([keys, slots.to(torch.int64), zero, zero], 1))
        return rows

    def drop(self, slots: Tensor, keys: Tensor, rows: Tensor) -> None:
        """Forget unique pairs and free their rows; lanes whose row is below `first` are skipped."""
        if not len(keys):
            return
        gone = rows >= self.first
        rows = torch.where(gone, rows, -1)
        size, programs = lanes(len(keys))
        kernels.erase[(programs,)](self.index, (slots, keys), rows, len(keys), LANES=size)
        self.meta.scatter(rows, self._nothing.expand(len(keys), 4))
        count = torch.cumsum(gone, 0)
        # Skipped lanes all write to the last cell, which no row uses.
        self._free[torch.where(gone, self._counts[1] + count - 1, len(self._free) - 1)] = rows
        self._counts[1:] += count[-1]
        self._most[1] += len(keys)

    def scan(self, start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
        """Meta data [M, 4] of the rows [start, stop), chunk by chunk, each with its first row."""
        size = self.meta.chunk_rows
        for number in range(start // size, triton.cdiv(stop, size)):
            begin = max(start, number * size)
            yield begin, self.meta.chunks[number][begin - number * size : stop - number * size]

    def live(self, chosen: Callable[[Tensor], Tensor], start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Rows [M] in [start, stop) that are in use and chosen by their meta data, and that data. Waits for the device."""
        rows = [torch.zeros(0, dtype=torch.int32, device=self.device)]
        metas = [torch.zeros((0, 4), dtype=torch.int64, device=self.device)]
        for begin, meta in self.scan(start, stop):
            at = torch.nonzero((meta[:, SLOT] >= 0) & chosen(meta))[:, 0]
            rows.append((at + begin).to(torch.int32))
            metas.append(meta[at])
        return torch.cat(rows), torch.cat(metas)

    def _claim(self, slots: Tensor, keys: Tensor, rows: Tensor) -> None:
        size, programs = lanes(len(keys))
        kernels.claim[(programs,)](self.index, (slots, keys), rows, len(keys), LANES=size)

    def _grow_rows(self, rows: int) -> None:
        if rows > len(self.meta):
            self.meta.grow(rows)
            for chunk in self.meta.chunks[len(self._free) // self.meta.chunk_rows :]:
                chunk[:, SLOT] = -1
            cells = torch.zeros(len(self.meta) + 1, dtype=torch.int32, device=self.device)
            cells[: len(self._free) - 1] = self._free[:-1]
            self._free = cells

    def _grow_entries(self, end: int, needed: int, ahead: int) -> None:
        """Build the index anew, bigger or without deleted entries, if it would be too full."""
        size = len(self._entries)
        if needed + self._most[1] + ahead <= _MAX_LOAD * size:
            return
        while needed + ahead > _MAX_LOAD * size:
            size *= 2
        self._entries = self._empty(size)
        for begin, meta in self.scan(self.first, end):
            rows = torch.arange(begin, begin + len(meta), device=self.device)
            rows = torch.where(meta[:, SLOT] >= 0, rows, -1).to(torch.int32)
            self._claim(meta[:, SLOT].to(torch.int32), meta[:, KEY].contiguous(), rows)
        self._counts[2] = self._most[1] = 0

    def _empty(self, size: int) -> Tensor:
        return torch.full((size, 2), kernels.EMPTY, device=self.device)
