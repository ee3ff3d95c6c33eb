"""From (slot, key) to a row number on a device: open addressing, entered by 64-bit compare-and-swap, and rows in chunks
that never move.

Nothing here waits for the device unless it says so. How many rows a batch makes is known on the device alone; the host
keeps upper bounds, and asks for the counts (and grows, or refuses) only when a bound no longer fits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from recsys.table import triton_index as kernels
from recsys.table import triton_kernels as rows_kernels
from recsys.table.triton_kernels import BFLOAT16, BLOCK, FLOAT16, FLOAT32, INT32, INT64

_MAX_LOAD = 0.6
"""Entries in use before the index doubles: 1 key in 16 lies outside its line then, 1 in 8 at 0.8; an entry is 16 bytes."""
_AHEAD = 4
"""Batches of this size that fit after growing, so that not every batch asks for counts."""
_SCAN = 2**24
"""Entries looked at together: 256 MB."""
KINDS = {
    torch.float32: FLOAT32,
    torch.float16: FLOAT16,
    torch.bfloat16: BFLOAT16,
    torch.int32: INT32,
    torch.int64: INT64,
}


INTERPRETED = not isinstance(kernels.find, triton.JITFunction)
"""Whether the kernels were made for the interpreter."""


def lanes(count: int, width: int = 1, most: int = 128, values: int = 2048) -> tuple[int, int]:
    """Lanes of a program and programs, for `count` keys of `width` values each.

    About 2,048 values a program of 128 threads: four 16-byte accesses of each are under way at a time. Fewer where a thread
    would need so many registers that few fit. The interpreter pays by the program, not by the lane.
    """
    size = power(min(count, BLOCK)) if INTERPRETED else min(most, values // width)
    size = max(2, size)
    return size, -(-count // size)


def power(number: int) -> int:
    """The next power of two."""
    return 1 << max(0, number - 1).bit_length()


_compiled: dict[tuple[Any, ...], Any] = {}


def launch(kernel: Any, programs: int, *given: Any, shape: tuple[int, ...], warps: int = 4) -> None:
    """Start a kernel; its last argument is the number of keys, or of whatever its programs share out.

    Triton finds the compiled kernel by looking at each argument again, which takes longer than a small batch does: here its
    shape suffices, if pointers are aligned as usual. No other whole number may be 1, which Triton compiles in.
    """
    if INTERPRETED:
        kernel[(programs,)](*given, shape)
        return
    key = (kernel.__name__, shape, warps, given[-1] >> 31)
    compiled = _compiled.get(key)
    found = [0]
    plain = _addresses(given, found)
    if compiled is None or found[0] & 15:
        _compiled[key] = kernel[(programs,)](*given, shape, num_warps=warps, enable_fp_fusion=False)
    else:
        compiled[(programs, 1, 1)](*plain, shape)


def _addresses(given: Sequence[Any], found: list[int]) -> tuple[Any, ...]:
    """The same with the address of each tensor in its place, whose bits are also added to `found`."""
    plain: list[Any] = []
    for each in given:
        kind = type(each)
        if kind is Tensor:
            address = each.data_ptr()
            found[0] |= address
            plain.append(address)
        else:
            plain.append(_addresses(each, found) if kind is tuple else each)
    return tuple(plain)


class Chunks:
    """Rows [rows, width] of one column, in chunks of equal size that never move."""

    def __init__(self, rows: int, width: int, dtype: torch.dtype, device: torch.device, chunk_rows: int) -> None:
        self.width, self.dtype, self.chunk_rows = width, dtype, chunk_rows
        self.addresses = torch.zeros(-(-rows // chunk_rows), dtype=torch.int64, device=device)
        self.chunks: list[Tensor] = []

    def __len__(self) -> int:
        return len(self.chunks) * self.chunk_rows

    @property
    def nbytes(self) -> int:
        return sum(chunk.nbytes for chunk in self.chunks) + self.addresses.nbytes

    def grow(self, rows: int) -> None:
        """Make room for `rows` rows in all."""
        while len(self) < rows:
            shape = (self.chunk_rows, self.width)
            chunk = torch.empty(shape, dtype=self.dtype, device=self.addresses.device)
            self.addresses[len(self.chunks)] = chunk.data_ptr()
            self.chunks.append(chunk)

    def gather(self, rows: Tensor, start: int = 0, count: int | None = None) -> Tensor:
        """Numbers [N, count] of rows, from `start` on; NaN, or 0 if they are whole, for rows below 0."""
        count = self.width - start if count is None else count
        dtype = torch.float32 if self.dtype.is_floating_point else self.dtype
        out = torch.empty((len(rows), count), dtype=dtype, device=rows.device)
        if out.numel():
            shape, programs = self._shape(len(rows), start, count)
            launch(rows_kernels.gather, programs, self.addresses, rows, out, len(rows), shape=shape)
        return out

    def scatter(self, rows: Tensor, numbers: Tensor, start: int = 0) -> None:
        """Set `numbers` [N, M] of unique rows, from `start` on; rows below 0 are skipped."""
        if numbers.numel():
            shape, programs = self._shape(len(rows), start, numbers.shape[1])
            launch(rows_kernels.scatter, programs, self.addresses, rows, numbers.contiguous(), len(rows), shape=shape)

    def _shape(self, rows: int, start: int, count: int) -> tuple[tuple[int, ...], int]:
        padded = power(count)
        size, programs = lanes(rows, padded)
        return (self.chunk_rows, self.width, start, count, padded, KINDS[self.dtype], size), programs


class DeviceIndex:
    """Rows `first`, `first + 1`, … of unique (slot, key) pairs, at most `capacity`; freed rows serve later keys.

    `fallback` [65536]: each slot's row for missing keys, below `first`; -1 for a slot there is not. `columns` grow with the
    rows. Tensors are on its device: slots int32, keys int64, rows int32. One stream.
    """

    def __init__(self, capacity: int, first: int, fallback: Tensor, columns: Sequence[Chunks]) -> None:
        self.capacity, self.first, self.fallback, self.device = capacity, first, fallback, fallback.device
        self._columns = columns
        self._counts = torch.tensor([first, 0, 0, 0], device=self.device)
        """Next unused row, freed rows, deleted entries, rows made in this call."""
        self._most = [0, 0]  # live rows, deleted entries: at most
        self._since = [0, 0]  # of both, since the counts were asked for
        self._answer: tuple[Tensor, torch.cuda.Event] | None = None
        self._entries = self._empty(1024)
        self._free = torch.zeros(1, dtype=torch.int32, device=self.device)
        self._grow_rows(first)

    @property
    def nbytes(self) -> int:
        return self._entries.nbytes + self._free.nbytes

    @property
    def maybe_rows(self) -> bool:
        """False if there is certainly no row. Waits for nothing."""
        return self._most[0] > 0

    @property
    def most_rows(self) -> int:
        """Live rows, at most. Waits for nothing."""
        return self._most[0]

    @property
    def index(self) -> tuple[Tensor, int, Tensor]:
        """As the kernels take it."""
        return self._entries, len(self._entries) // kernels.LINE - 1, self.fallback

    def __len__(self) -> int:
        """Live rows. Waits for the device."""
        end, free, deleted, _ = self._counts.tolist()
        self._most, self._answer = [end - free - self.first, deleted], None
        return self._most[0]

    def find(self, slots: Tensor, keys: Tensor) -> Tensor:
        """Rows [N]; its slot's `fallback` where missing."""
        rows = torch.empty(len(keys), dtype=torch.int32, device=self.device)
        if len(keys):
            size, programs = lanes(len(keys), kernels.LINE, values=128)
            launch(kernels.find, programs, self.index, (slots, keys), rows, len(keys), shape=(size,))
        return rows

    def group(self, slots: Tensor, keys: Tensor, active: Tensor) -> Tensor:
        """Position [N] of the first active lane with the same pair; meaningless where not active."""
        cells = torch.full((max(4, power(2 * len(keys))),), -1, device=self.device)
        places = torch.zeros(len(keys), dtype=torch.int64, device=self.device)
        if len(keys):
            size, programs = lanes(len(keys))
            scratch = (cells, len(cells) - 1)
            launch(kernels.group, programs, scratch, (slots, keys), active, places, len(keys), shape=(size,))
        return cells[places]

    def reserve(self, batch: int, wanted: Callable[[], int], full: Callable[[int, int], Exception]) -> None:
        """Make room for a row of each of `batch` lanes. Waits only if the bounds do not fit, then also asks how many new rows
        are `wanted` if the table may be full: and if those do not fit, `full(rows, more)` is raised."""
        self._refresh(batch)
        if not self._fits(batch):
            live = len(self)
            if not self._fits(batch):
                more = wanted() if live + batch > self.capacity else batch
                if live + more > self.capacity:
                    raise full(live, more)
                # Freed rows come first, so no row beyond this is used.
                self._grow_rows(self.first + min(self.capacity, live + more + _AHEAD * batch))
                self._grow_entries(live + more, _AHEAD * batch)
        self._most[0] = min(self._most[0] + batch, self.capacity)
        self._since[0] += batch

    def _refresh(self, batch: int) -> None:
        """Take the counts that were asked for, if they are here; ask for them before the bounds are used up."""
        if self._fits(_AHEAD * batch) or self.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            return
        if self._answer is not None and self._answer[1].query():
            end, free, deleted, _ = self._answer[0].tolist()
            self._most = [min(end - free - self.first + self._since[0], self.capacity), deleted + self._since[1]]
            self._answer = None
        if self._answer is None:
            counts = torch.empty(4, dtype=torch.int64, pin_memory=True).copy_(self._counts, non_blocking=True)
            self._answer = counts, torch.cuda.current_stream(self.device).record_event()
            self._since = [0, 0]

    def _fits(self, batch: int) -> bool:
        rows = min(self.capacity, len(self._free) - 1 - self.first)
        return self._most[0] + batch <= rows and sum(self._most) + batch <= _MAX_LOAD * len(self._entries)

    def enter(self, slots: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rows [N], claimed where missing, and what else the kernel `settle` has to know next; `reserve` comes first."""
        rows = torch.empty(len(keys), dtype=torch.int32, device=self.device)
        claims = (rows, torch.empty(len(keys), dtype=torch.int64, device=self.device), self._counts, self._free)
        if len(keys):
            size, programs = lanes(len(keys), kernels.LINE, values=128)
            launch(kernels.enter, programs, self.index, (slots, keys), claims, len(keys), shape=(self.first, size))
        return claims

    def drop(self, slots: Tensor, keys: Tensor, rows: Tensor) -> None:
        """Forget unique pairs and free their rows; lanes whose row is below `first` are skipped."""
        if not len(keys):
            return
        gone = rows >= self.first
        rows = torch.where(gone, rows, -1)
        size, programs = lanes(len(keys))
        launch(kernels.erase, programs, self.index, (slots, keys), rows, len(keys), shape=(size,))
        count = torch.cumsum(gone, 0)
        # Skipped lanes all write to the last cell, which no row uses.
        self._free[torch.where(gone, self._counts[1] + count - 1, len(self._free) - 1)] = rows
        self._counts[1:3] += count[-1]
        self._most[1] += len(keys)
        self._since[1] += len(keys)

    def scan(self, start: int = 0, rows: int | None = None) -> Iterator[tuple[Tensor, Tensor, Tensor, int]]:
        """Slots, keys, rows [M] of entries in use, and where the next begin: all from the entry `start` on, or as many as
        have `rows` rows. Waits for the device."""
        left = len(self._entries) if rows is None else rows
        while start < len(self._entries) and left > 0:
            step = min(_SCAN, len(self._entries) if rows is None else max(1024, 4 * left))
            entries = self._entries[start : start + step]
            at = torch.nonzero(entries[:, 1] >= 0)[:left, 0]
            left -= len(at)
            start = start + step if left > 0 else start + int(at[-1]) + 1
            keys, words = entries[at].unbind(1)
            yield (words >> 32).to(torch.int32), keys.contiguous(), (words & 0xFFFFFFFF).to(torch.int32), start

    def _grow_rows(self, rows: int) -> None:
        for column in self._columns:
            column.grow(rows)
        rows = len(self._columns[0])
        if rows >= len(self._free):
            cells = torch.zeros(rows + 1, dtype=torch.int32, device=self.device)
            cells[: len(self._free) - 1] = self._free[:-1]
            self._free = cells

    def _grow_entries(self, needed: int, ahead: int) -> None:
        """Build the index anew, bigger or without deleted entries, if it would be too full."""
        old, size = self._entries, len(self._entries)
        if needed + self._most[1] + ahead <= _MAX_LOAD * size:
            return
        while needed + ahead > _MAX_LOAD * size:
            size *= 2
        self._entries = self._empty(size)
        width, programs = lanes(len(old))
        launch(kernels.rehash, programs, old, self.index, len(old), shape=(width,))
        self._counts[2] = self._most[1] = 0
        self._answer = None

    def _empty(self, size: int) -> Tensor:
        return torch.full((size, 2), kernels.EMPTY, device=self.device)
