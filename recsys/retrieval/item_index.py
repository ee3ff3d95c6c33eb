"""Nearest items of a vector: one immutable FAISS index, a file that several processes can map.

D width of a vector, N items in the index; a position counts the index's items, list after list. Vectors are brought to unit
length here: scores are cosines.
"""

from __future__ import annotations

import os
import shutil
import struct
import tempfile
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import faiss
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from recsys.errors import SnapshotCorrupt
from recsys.files import replace
from recsys.types import Bool, Float32, Int32, Int64, UInt8

faiss.omp_set_num_threads(1)  # two thread pools in one process fight for the same cores

FLAT_LIMIT = 50_000
"""Up to here every vector is compared: docs/retrieval.md has the measurements behind the choice of type."""
_PROBES = (8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""Lists that a search may look into; 512 of 2,000 take 1.7 ms on a million × 32, the most that fits the budget of a request."""
_RECALL = 0.97
"""The first number of probes that reaches this at building is used: at .95 users, who are no items, would fall below .95."""
_SAMPLE, _TOP, _NOISE = 128, 100, 0.1
"""Recall is measured on this many items moved by this much noise, of the top so many."""
_TRAIN_PER_LIST = 40
"""Vectors a list that k-means sees: fewer make worse lists, more make building slower."""
_EXACT_LIMIT = 20_000
"""Up to here a filter's items are compared one by one, about 1.5 ms; beyond it enough of them lie in the lists near the user."""
_BANK, _CORRECTED_AT_ONCE = 1000, 10_000
"""Items that hubs are measured against; half measures them less well, double takes a second longer per million items."""
_MAGIC = b"recsys-index-3"
_TAIL = struct.Struct("<ddQQ")
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


class Hubs:
    """Items that are near to everything, corrected for (inverted softmax, Wang et al. 2023, over a bank of items).

    An item's score is less by log(mean over the bank of exp(beta × cosine)) / beta: what it has from whatever is asked for. It is one
    more coordinate of its vector, where a query has 1. Items that look the same as one of the bank are not compared with it.
    """

    def __init__(self, bank: Float32, beta: float) -> None:
        self.bank, self.beta = bank, beta

    @classmethod
    def of(cls, vectors: Float32, beta: float) -> Hubs:
        """A bank of up to 1,000 of the unit vectors [N, D]."""
        chosen = np.random.default_rng(0).permutation(len(vectors))[:_BANK]
        return cls(np.ascontiguousarray(vectors[np.sort(chosen)]), beta)

    def corrected(self, vectors: Float32) -> Float32:
        """Unit vectors [n, D] with their correction [n, D + 1]."""
        less = np.zeros(len(vectors), np.float32)
        for start in range(0, len(vectors), _CORRECTED_AT_ONCE):
            cosines = vectors[start : start + _CORRECTED_AT_ONCE] @ self.bank.T
            other = cosines < 1.0 - 1e-5
            sums = np.where(other, np.exp(self.beta * (cosines - 1.0)), 0.0).sum(1)
            counts = other.sum(1)
            found = counts > 0  # looks the same as all of the bank: no correction is as good as any
            mean = np.log(sums[found] / counts[found]) / self.beta + 1.0
            less[start : start + _CORRECTED_AT_ONCE][found] = mean
        return np.concatenate([vectors, -less[:, None]], 1)


class ItemIndex:
    """An immutable index over item vectors. Safe for any number of readers."""

    def __init__(
        self,
        index: Any,
        rows: Int32,
        recall: float,
        hubs: Hubs | None = None,
        built: tempfile.TemporaryDirectory[str] | None = None,
    ) -> None:
        self._index, self.rows, self.recall, self.hubs = index, rows, recall, hubs
        """The row at each position [N]; the recall@100 that was measured when it was built; what each score is corrected by."""
        self._built = built
        """Where the lists of an index just built lie: in memory FAISS would not let them be looked into."""
        self._inverted = isinstance(index, faiss.IndexIVF)
        if self._inverted:
            self._map_lists()
        else:
            size = index.ntotal * index.d
            self._vectors = faiss.rev_swig_ptr(index.get_xb(), size).reshape(-1, index.d) if size else None

    def _map_lists(self) -> None:
        """Where each position's half-precision vector, less its list's centroid, lies in the file: list by list, each before its ids."""
        lists: Any = faiss.downcast_InvertedLists(self._index.invlists)
        lists.prefetch_nthread = 0  # 32 threads a search, to read pages that are in memory: eight times its cost
        parts = [lists.lists.at(i) for i in range(self._index.nlist)]
        sizes = np.array([part.size for part in parts], np.int64)
        self._starts: Int64 = np.concatenate([[0], np.cumsum(sizes)])
        self._offsets = np.array([part.offset for part in parts], np.int64)
        odd = int(self._offsets.min()) % 2
        memory = faiss.rev_swig_ptr(lists.ptr, lists.totsize)
        halves = np.frombuffer(memory, np.float16, (lists.totsize - odd) // 2, odd)
        self._offsets = (self._offsets - odd) // 2 - self._starts[:-1] * self._index.d
        self._vectors = sliding_window_view(halves, self._index.d)
        self._centroids = faiss.downcast_index(self._index.quantizer).reconstruct_n(0, self._index.nlist)

    @classmethod
    def build(cls, rows: Int32, vectors: Float32, hubness: float = 0.0) -> ItemIndex:
        """Index distinct rows [N] and vectors [N, D]: exact up to 50,000, else inverted lists, 2 √N of them.

        A list keeps its vectors in half precision, less its centroid: towers that are hardly trained place all items close together.
        `hubness`: see Hubs; 0 corrects nothing.
        """
        rows = np.array(rows, np.int32)
        vectors = unit(vectors, rows)
        if len(np.unique(rows)) != len(rows):
            raise ValueError("rows to index must be distinct")
        hubs = Hubs.of(vectors, hubness) if hubness and len(rows) else None
        if hubs is not None:
            vectors = hubs.corrected(vectors)
        if len(rows) <= FLAT_LIMIT:
            flat: Any = faiss.IndexFlatIP(vectors.shape[1])
            flat.add(vectors)
            return cls(flat, rows, 1.0, hubs)
        index, order = _inverted(vectors)
        recall = _choose_probes(index, vectors, order, hubs is not None)
        folder = tempfile.TemporaryDirectory(prefix="recsys-index-")
        path = str(Path(folder.name) / "index")
        faiss.write_index(index, path)
        return cls(faiss.read_index(path, faiss.IO_FLAG_MMAP), rows[order], recall, hubs, folder)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def dim(self) -> int:
        return int(self._index.d) - (self.hubs is not None)

    def query(self, vector: Float32) -> Float32:
        """What to search with for a unit vector [D]."""
        return vector if self.hubs is None else np.append(vector, np.float32(1.0))

    def search(self, vector: Float32, k: int, searchable: UInt8) -> tuple[Int32, Float32]:
        """The k best positions for a `query` among those whose bit is set in `searchable` (little bit order)."""
        k = min(k, len(self))
        if k == 0:
            return np.zeros(0, np.int32), np.zeros(0, np.float32)
        parameters: Any = faiss.SearchParametersIVF() if self._inverted else faiss.SearchParameters()
        selector = parameters.sel = faiss.IDSelectorBitmap(len(self), faiss.swig_ptr(searchable))
        if self._inverted:
            parameters.nprobe = self._index.nprobe
        scores, positions = self._index.search(vector[None, :], k, params=parameters)
        del selector  # held until here: FAISS keeps a pointer only
        found = positions[0] >= 0
        return positions[0][found].astype(np.int32), scores[0][found]

    def search_among(self, vector: Float32, k: int, wanted: Bool) -> tuple[Int32, Float32]:
        """The k best for a `query` of the `wanted` positions [N]: all of them are compared when they are few, else those of enough lists.

        Lists without wanted items are passed over, so that a filter far from the user is answered as well as one near them.
        """
        if self._inverted and np.count_nonzero(wanted) > _EXACT_LIMIT:
            return self._search_lists(vector, k, wanted)
        positions = np.flatnonzero(wanted)
        if not len(positions) or self._vectors is None or k == 0:
            return np.zeros(0, np.int32), np.zeros(0, np.float32)
        if self._inverted:
            lists = np.searchsorted(self._starts, positions, "right") - 1
            places = positions * self._index.d + self._offsets[lists]
            scores = self._vectors[places].astype(np.float32) @ vector + (self._centroids @ vector)[lists]
        else:
            scores = self._vectors[positions] @ vector
        if len(scores) > k:
            best = np.argpartition(scores, len(scores) - k)[-k:]
            positions, scores = positions[best], scores[best]
        return positions.astype(np.int32), scores

    def _search_lists(self, vector: Float32, k: int, wanted: Bool) -> tuple[Int32, Float32]:
        """Look into the nearest lists that hold as many wanted items as an unfiltered search compares."""
        sizes = np.diff(self._starts)
        filled = np.flatnonzero(sizes)
        counts = np.zeros(len(sizes), np.int64)
        counts[filled] = np.add.reduceat(wanted, self._starts[:-1][filled], dtype=np.int32)
        near = self._centroids @ vector
        lists = np.argsort(-near, kind="stable")
        lists = lists[counts[lists] > 0]
        enough = int(np.searchsorted(np.cumsum(counts[lists]), self._index.nprobe * len(self) / len(sizes)))
        lists = np.ascontiguousarray(lists[: max(enough + 1, self._index.nprobe)])
        distances = near[lists]
        bits = np.packbits(wanted, bitorder="little")
        selector = faiss.IDSelectorBitmap(len(self), faiss.swig_ptr(bits))
        parameters: Any = faiss.SearchParametersIVF()
        parameters.nprobe, parameters.sel = len(lists), selector
        scores, positions = np.empty(k, np.float32), np.empty(k, np.int64)
        pointers = [faiss.swig_ptr(array) for array in (lists, distances, scores, positions)]
        query = faiss.swig_ptr(vector)
        self._index.search_preassigned_c(1, query, k, *pointers, False, parameters)
        found = positions >= 0
        return positions[found].astype(np.int32), scores[found]

    def save(self, path: Path) -> None:
        """Write one file of what was built: index, rows, recall, checksum; durable and complete, or not there."""
        temporary = path.with_name(path.name + ".tmp")
        if self._built is not None:
            shutil.copyfile(Path(self._built.name) / "index", temporary)
        else:
            assert not self._inverted, "an index that was loaded is in its file already"
            faiss.write_index(self._index, str(temporary))
        with temporary.open("r+b") as file:
            file.seek(0, os.SEEK_END)
            if self.hubs is not None:
                file.write(self.hubs.bank.astype("<f4").tobytes())
            file.write(self.rows.astype("<i4").tobytes())
            bank, beta = (0, 0.0) if self.hubs is None else (len(self.hubs.bank), self.hubs.beta)
            file.write(_TAIL.pack(self.recall, beta, bank, len(self)))
            file.flush()
            file.seek(0)
            checksum = _checksum(file, temporary.stat().st_size)
            file.seek(0, os.SEEK_END)
            file.write(struct.pack("<I", checksum) + _MAGIC)
        replace(temporary, path)

    @classmethod
    def load(cls, path: Path) -> ItemIndex:
        """Map what `save` wrote; the file may be deleted then. SnapshotCorrupt when it was cut short or flipped."""
        corrupt = SnapshotCorrupt(f"{path}: not a complete index file; delete it, the builder makes a new one")
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END) - 4 - len(_MAGIC)
            file.seek(max(size, 0))
            footer = file.read()
            file.seek(0)
            if (
                size < _TAIL.size
                or footer[4:] != _MAGIC
                or _checksum(file, size) != int.from_bytes(footer[:4], "little")
            ):
                raise corrupt
            file.seek(size - _TAIL.size)
            recall, beta, num_bank, num_rows = _TAIL.unpack(file.read(_TAIL.size))
            # FAISS reads from the front and stops where the index ends.
            index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
            width = index.d - 1
            file.seek(size - _TAIL.size - 4 * num_rows - 4 * num_bank * width)
            bank = np.frombuffer(file.read(4 * num_bank * width), "<f4").reshape(num_bank, width)
            rows = np.frombuffer(file.read(4 * num_rows), "<i4").astype(np.int32)
        return cls(index, rows, recall, Hubs(bank, beta) if num_bank else None)


def _inverted(vectors: Float32) -> tuple[Any, Int64]:
    """Inverted lists over vectors [N, D], and which vector each position holds [N]: positions run through list after list."""
    count, dim = vectors.shape
    lists = int(2 * np.sqrt(count))
    means = faiss.Clustering(dim, lists)
    means.niter, means.spherical = 10, True
    means.min_points_per_centroid, means.max_points_per_centroid = 1, 2 * _TRAIN_PER_LIST
    comparing = _comparing(dim)
    means.train(vectors[:: max(1, count // (_TRAIN_PER_LIST * lists))], comparing)
    used, nearest = np.unique(comparing.search(vectors, 1)[1][:, 0], return_inverse=True)
    # Items that look the same leave lists empty, whose centroids would be probed in vain.
    centroids: Any = faiss.IndexFlatIP(dim)
    centroids.add(faiss.vector_to_array(means.centroids).reshape(lists, dim)[used])
    half = faiss.ScalarQuantizer.QT_fp16
    index: Any = faiss.IndexIVFScalarQuantizer(centroids, dim, len(used), half, faiss.METRIC_INNER_PRODUCT, True)
    index.own_fields = False  # Python owns the centroids
    index.referenced_objects = [centroids]
    order = np.argsort(nearest, kind="stable")
    ordered, where = np.ascontiguousarray(vectors[order]), np.ascontiguousarray(nearest[order])
    index.train(ordered[:1])
    index.add_core(count, faiss.swig_ptr(ordered), None, faiss.swig_ptr(where))
    return index, order


def _comparing(dim: int) -> Any:
    """An empty index that compares everything: on the GPU, where there is one with memory to spare."""
    flat: Any = faiss.IndexFlatIP(dim)
    if faiss.get_num_gpus():
        with suppress(RuntimeError):
            return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, flat)
    return flat


def _choose_probes(index: Any, vectors: Float32, order: Int64, corrected: bool) -> float:
    """Set the least number of probes that finds nearly all of what comparing everything finds; returns the recall."""
    generator = np.random.default_rng(0)
    queries = vectors[generator.choice(len(vectors), _SAMPLE, replace=False)]
    queries = queries + _NOISE * generator.standard_normal(queries.shape, np.float32)
    asked = queries[:, :-1] if corrected else queries
    asked /= np.linalg.norm(asked, axis=1, keepdims=True)
    if corrected:
        queries[:, -1] = 1.0
    least = faiss.knn(queries, vectors, _TOP, metric=faiss.METRIC_INNER_PRODUCT)[0][:, -1:]
    recall = 0.0
    for probes in _PROBES:
        index.nprobe = min(probes, index.nlist)
        found = index.search(queries, _TOP)[1]
        scores = np.einsum("qkd,qd->qk", vectors[order[found]], queries)
        recall = float(((scores >= least - 1e-6) & (found >= 0)).mean())
        if recall >= _RECALL or probes >= index.nlist:
            break
    return recall


def _checksum(file: BinaryIO, size: int) -> int:
    checksum = 0
    while size > 0 and (chunk := file.read(min(_CHUNK, size))):
        checksum = zlib.crc32(chunk, checksum)
        size -= len(chunk)
    return checksum
