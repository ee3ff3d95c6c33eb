"""Strings by row, side by side in one buffer: 12 bytes each beside their UTF-8, where Python's own objects take 57."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from recsys.types import Int64, UInt8

_LENGTH = 4
"""Bytes before each text that say how long it is: start and length change in one assignment, so that a reader sees both or neither."""
_WORTH_PACKING = 2**20
"""Bytes of replaced texts from which on a buffer that is half holes is packed."""

_ROWS_AT_ONCE = 4096
"""Texts packed at once: 8 bytes of memory for each of their own."""


class Texts:
    """One writer beside many readers. Replaced texts are holes until they are half of the buffer."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._buffer, self._starts, self._size, self._holes = bytearray(), np.zeros(16, np.int64), 0, 0
        self._parts = self._buffer, self._starts
        for text in texts:
            self.append(text)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, row: int) -> str:
        return self.bytes_of(row).decode()

    def bytes_of(self, row: int) -> bytes:
        """The text's UTF-8."""
        if not 0 <= row < self._size:
            raise IndexError(f"row {row} is not among {self._size}")
        buffer, starts = self._parts
        begin = int(starts[row]) + _LENGTH
        return bytes(buffer[begin : begin + int.from_bytes(buffer[begin - _LENGTH : begin], "little")])

    @property
    def num_bytes(self) -> int:
        """Of the texts and where they begin, without holes."""
        return len(self._buffer) - self._holes + 8 * self._size

    def append(self, text: str | bytes) -> None:
        """One more row."""
        if self._size == len(self._starts):
            starts = np.zeros(2 * len(self._starts), np.int64)  # its second half takes no memory yet
            starts[: self._size] = self._starts
            self._starts = starts
            self._parts = self._buffer, self._starts
        self._starts[self._size] = self._written(text)
        self._size += 1

    def __setitem__(self, row: int, text: str | bytes) -> None:
        old = self.bytes_of(row)
        new = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
        if new == old:
            return
        self._starts[row] = self._written(new)
        self._holes += len(old) + _LENGTH
        if self._holes > max(_WORTH_PACKING, len(self._buffer) // 2):
            self._pack()

    def _written(self, text: str | bytes) -> int:
        data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
        start = len(self._buffer)
        self._buffer += len(data).to_bytes(_LENGTH, "little") + data
        return start

    def _pack(self) -> None:
        buffer, starts, self._holes = bytearray(), np.zeros_like(self._starts), 0
        for row in range(self._size):
            data = self.bytes_of(row)
            starts[row] = len(buffer)
            buffer += len(data).to_bytes(_LENGTH, "little") + data
        self._buffer, self._starts = self._parts = buffer, starts

    def state(self, size: int, rows: Int64 | slice = slice(None)) -> tuple[Int64, UInt8]:
        """`rows` of the first `size` as starts and buffer, copied in pieces beside the writer: a row that it replaces meanwhile is either
        version."""
        buffer, starts = self._parts
        first, end = starts[:size][rows].copy(), len(buffer)
        pieces = [buffer[at : min(at + 2**20, end)] for at in range(0, end, 2**20)]
        data = np.frombuffer(b"".join(pieces), np.uint8)
        sizes = _lengths(first, data) + _LENGTH
        return (first, data) if sizes.sum() > 0.8 * len(data) else _packed(first, sizes, data)

    def restore(self, starts: Int64, buffer: UInt8) -> None:
        """Load what `state` returned."""
        self._buffer, self._size = bytearray(buffer.tobytes()), len(starts)
        self._starts = np.zeros(max(16, len(starts)), np.int64)
        self._starts[: len(starts)] = starts
        self._parts = self._buffer, self._starts
        self._holes = len(self._buffer) - int(_lengths(starts, buffer).sum()) - _LENGTH * self._size


def _lengths(starts: Int64, buffer: UInt8) -> Int64:
    """Of the texts that begin at `starts`, without what says it."""
    cells: Int64 = buffer[starts[:, None] + np.arange(_LENGTH)].astype(np.int64)
    return cells @ (1 << 8 * np.arange(_LENGTH))


def _packed(starts: Int64, sizes: Int64, buffer: UInt8) -> tuple[Int64, UInt8]:
    """The same texts one after another."""
    ends = np.cumsum(sizes)
    packed = np.empty(int(ends[-1]) if len(ends) else 0, np.uint8)
    for first in range(0, len(starts), _ROWS_AT_ONCE):
        part = slice(first, first + _ROWS_AT_ONCE)
        begin, places = int(ends[first] - sizes[first]), starts[part] - (ends[part] - sizes[part])
        length = int(sizes[part].sum())
        packed[begin : begin + length] = buffer[np.repeat(places, sizes[part]) + np.arange(begin, begin + length)]
    return ends - sizes, packed
