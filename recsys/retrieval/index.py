"""Nearest items of a user vector: a FAISS index of one generation, and an exact buffer of what changed since.

D width of a vector, N items in the index, B rows in the buffer. Vectors are brought to unit length here: scores are cosines.
"""

from __future__ import annotations

import os
import struct
import threading
import zlib
from collections import OrderedDict
from collections.abc import Collection
from pathlib import Path
from typing import Any, BinaryIO

import faiss
import numpy as np

from recsys.errors import SnapshotCorrupt
from recsys.files import replace
from recsys.types import Float32, Int32

faiss.omp_set_num_threads(1)  # two thread pools in one process fight for the same cores

_FLAT_LIMIT = 50_000
"""Up to here every vector is compared: 50,000 × 32 takes 0.9 ms on one core, and nothing is missed."""
_PROBES = 48
"""Lists searched of 4 √N. On a clustered million × 32, top 100: 32 misses 6.9% in 0.28 ms, 48 5.2% in 0.37, 96 2.4% in 0.64."""
_TRAIN_PER_LIST = 40
"""Vectors a list that k-means sees: fewer make worse lists, more make building slower."""
_MAGIC = b"recsys-index-1"
_CHUNK = 2**22


def unit(vectors: Float32, rows: Int32) -> Float32:
    """Vectors [n, D] at length 1, as a new array. ValueError names the row whose vector has no direction."""
    vectors = np.asarray(vectors, np.float32)
    if vectors.ndim != 2 or len(vectors) != len(rows):
        raise ValueError(f"vectors have shape {vectors.shape} for {len(rows)} rows: give one vector per row")
    norms = np.linalg.norm(vectors, axis=1)
    bad = ~(np.isfinite(norms) & (norms > 0))
    if bad.any():
        first = int(np.argmax(bad))
        raise ValueError(
            f"row {rows[first]}: the item vector has norm {norms[first]}; leave items without a direction out"
        )
    return np.ascontiguousarray(vectors / norms[:, None])


class ItemIndex:
    """An immutable index over item vectors. Safe for any number of readers."""

    def __init__(self, index: Any, rows: Int32) -> None:
        self._index = index
        self.rows = rows
        """The row at each position [N]."""

    @classmethod
    def build(cls, rows: Int32, vectors: Float32) -> ItemIndex:
        """Index distinct rows [N] and vectors [N, D]: exact up to 50,000, else inverted lists (4 √N of them)."""
        rows = np.array(rows, np.int32)
        vectors = unit(vectors, rows)
        if len(np.unique(rows)) != len(rows):
            raise ValueError("rows to index must be distinct")
        dim = vectors.shape[1]
        index: Any = faiss.IndexFlatIP(dim)
        if len(rows) > _FLAT_LIMIT:
            lists = int(4 * np.sqrt(len(rows)))
            index = faiss.IndexIVFFlat(index, dim, lists, faiss.METRIC_INNER_PRODUCT)
            index.cp.niter = 10
            index.cp.min_points_per_centroid = 1
            index.train(vectors[:: max(1, len(rows) // (_TRAIN_PER_LIST * lists))])
            index.nprobe = min(_PROBES, lists)
        index.add(vectors)
        return cls(index, rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def dim(self) -> int:
        return int(self._index.d)

    def search(self, vector: Float32, k: int, searchable: Any) -> tuple[Int32, Float32]:
        """The k best positions for a unit vector [D] among those whose bit is set in `searchable` (uint8, little bit order)."""
        k = min(k, len(self.rows))
        if k == 0:
            return np.zeros(0, np.int32), np.zeros(0, np.float32)
        selector = faiss.IDSelectorBitmap(len(self.rows), faiss.swig_ptr(searchable))
        inverted = isinstance(self._index, faiss.IndexIVF)
        parameters: Any = faiss.SearchParametersIVF() if inverted else faiss.SearchParameters()
        parameters.sel = selector
        if inverted:
            parameters.nprobe = self._index.nprobe
        scores, positions = self._index.search(vector[None, :], k, params=parameters)
        found = positions[0] >= 0
        return positions[0][found].astype(np.int32), scores[0][found]

    def save(self, path: Path) -> None:
        """Write one file: index, rows, checksum; durable and complete, or not there."""
        temporary = path.with_name(path.name + ".tmp")
        faiss.write_index(self._index, str(temporary))
        with temporary.open("r+b") as file:
            file.seek(0, os.SEEK_END)
            file.write(self.rows.astype("<i4").tobytes() + struct.pack("<Q", len(self.rows)))
            file.flush()
            file.seek(0)
            checksum = _checksum(file, temporary.stat().st_size)
            file.seek(0, os.SEEK_END)
            file.write(struct.pack("<I", checksum) + _MAGIC)
        replace(temporary, path)

    @classmethod
    def load(cls, path: Path) -> ItemIndex:
        """Read what `save` wrote. SnapshotCorrupt when it was cut short or flipped."""
        corrupt = SnapshotCorrupt(f"{path}: not a complete index file; delete it, the builder makes a new one")
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END) - 4 - len(_MAGIC)
            file.seek(max(size, 0))
            footer = file.read()
            file.seek(0)
            if size < 8 or footer[4:] != _MAGIC or _checksum(file, size) != int.from_bytes(footer[:4], "little"):
                raise corrupt
            file.seek(size - 8)
            (num_rows,) = struct.unpack("<Q", file.read(8))
            file.seek(size - 8 - 4 * num_rows)
            rows = np.frombuffer(file.read(4 * num_rows), "<i4").astype(np.int32)
        return cls(faiss.read_index(str(path)), rows)  # reads from the front and stops where the index ends


def _checksum(file: BinaryIO, size: int) -> int:
    checksum = 0
    while size > 0 and (chunk := file.read(min(_CHUNK, size))):
        checksum = zlib.crc32(chunk, checksum)
        size -= len(chunk)
    return checksum


class Searcher:
    """One generation's index, and what changed since: new, changed and recently touched rows are compared exactly.

    One writer beside many readers. What was put is found by the next search; what was deleted is not. Beyond `limit` the
    rows longest untouched leave the buffer: the index serves its own version of them, and `dropped` counts those it lacks.
    """

    def __init__(self, index: ItemIndex, limit: int = 50_000) -> None:
        if limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}")
        self._index = index
        self._limit = limit
        self._positions = np.full(int(index.rows.max(initial=-1)) + 1, -1, np.int32)
        self._positions[index.rows] = np.arange(len(index), dtype=np.int32)
        self._searchable = np.packbits(np.ones(len(index), np.bool_), bitorder="little")
        self._slots: OrderedDict[int, int] = OrderedDict()
        self._buffer_rows = np.full(16, -1, np.int32)
        self._buffer = np.zeros((16, index.dim), np.float32)
        self._free: list[int] = []
        self._lock = threading.Lock()
        self.dropped = 0
        """Rows that left the full buffer and are not in the index: build a new generation."""

    @property
    def num_buffered(self) -> int:
        return len(self._slots)

    def put(self, rows: Int32, vectors: Float32) -> None:
        """Insert or replace vectors [n, D]; a deleted row lives again."""
        vectors = unit(vectors, rows)
        if vectors.shape[1] != self._index.dim:
            raise ValueError(
                f"vectors are {vectors.shape[1]} wide, the index {self._index.dim}: one generation, one tower"
            )
        with self._lock:
            for row, vector in zip(np.asarray(rows).tolist(), vectors, strict=True):
                self._mask(row, searchable=False)
                slot = self._slots.pop(row, -1)
                if slot < 0:
                    slot = self._slot()
                self._slots[row] = slot
                self._buffer[slot] = vector
                self._buffer_rows[slot] = row

    def _slot(self) -> int:
        if self._free:
            return self._free.pop()
        used = len(self._slots)
        if used >= self._limit:
            row, slot = self._slots.popitem(last=False)
            self.dropped += not self._mask(row, searchable=True)
            return slot
        if used == len(self._buffer_rows):
            self._buffer_rows = np.concatenate([self._buffer_rows, np.full(used, -1, np.int32)])
            self._buffer = np.concatenate([self._buffer, np.zeros_like(self._buffer)])
        return used

    def _mask(self, row: int, *, searchable: bool) -> bool:
        """Show or hide the index's version of a row; False when it has none."""
        position = int(self._positions[row]) if row < len(self._positions) else -1
        if position < 0:
            return False
        bit = np.uint8(1 << (position & 7))
        if searchable:
            self._searchable[position >> 3] |= bit
        else:
            self._searchable[position >> 3] &= ~bit
        return True

    def delete(self, row: int) -> None:
        """Take `row` out of every later search, until it is put again."""
        with self._lock:
            self._mask(row, searchable=False)
            slot = self._slots.pop(row, -1)
            if slot >= 0:
                self._buffer_rows[slot] = -1
                self._free.append(slot)

    def search(self, vector: Float32, k: int, exclude: Collection[int] = ()) -> tuple[Int32, Float32]:
        """The k best rows for a user vector [D] and their cosines, best first, ties by row; `exclude` never among them.

        Fewer when there are no more; none for an all-zero vector (an untrained user). ValueError for NaN or another width.
        """
        vector = np.asarray(vector, np.float32)
        norm = float(np.linalg.norm(vector))
        if vector.shape != (self._index.dim,) or not np.isfinite(norm):
            raise ValueError(
                f"user vector has shape {vector.shape} and norm {norm}: give {self._index.dim} finite numbers"
            )
        if norm == 0.0 or k <= 0:
            return np.zeros(0, np.int32), np.zeros(0, np.float32)
        vector = vector / np.float32(norm)
        wanted = k + len(exclude)
        positions, scores = self._index.search(vector, wanted, self._searchable)
        with self._lock:
            # A row may have moved between index and buffer since: look again.
            shown = (self._searchable[positions >> 3] >> (positions & 7).astype(np.uint8)) & 1 == 1
            used = len(self._slots) + len(self._free)
            near = self._buffer[:used] @ vector
            buffered = self._buffer_rows[:used].copy()
        rows = np.concatenate([self._index.rows[positions[shown]], buffered[buffered >= 0]])
        scores = np.concatenate([scores[shown], near[buffered >= 0]])
        if exclude:
            kept = ~np.isin(rows, np.fromiter(exclude, np.int32, len(exclude)))
            rows, scores = rows[kept], scores[kept]
        if len(rows) > 4 * k:
            kept = scores >= np.partition(scores, len(scores) - k)[len(scores) - k]
            rows, scores = rows[kept], scores[kept]
        best = np.lexsort((rows, -scores))[:k]
        return rows[best], scores[best]
