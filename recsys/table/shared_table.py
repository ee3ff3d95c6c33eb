"""A CPU table read by another process: the same memory, mapped read-only, and no lock that a stopped writer could hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from recsys.table import kernels
from recsys.table.cpu_arrays import new_values, ready
from recsys.table.kernels import Index
from recsys.types import Bool, Float32, Int32, Int64

NAMES = ("entries", "meta", "values", "writes")
"""The arrays that a reader needs, of `CpuTable.shared`."""


class SharedTable:
    """Rows of a table with these slots whose arrays, those of `NAMES`, somebody else writes. Thread-safe."""

    def __init__(self, slots: Sequence[int], dim: int, arrays: dict[str, npt.NDArray[Any]]) -> None:
        self.dim = dim
        self._values, self._writes = arrays["values"], arrays["writes"]
        self._place_of = np.full(max(slots) + 1, -1, np.int32)
        self._place_of[sorted(slots)] = np.arange(len(slots))
        none = np.zeros(1, np.uint8)
        self._index = Index(arrays["entries"], none, arrays["meta"], self._place_of, np.zeros((1, 1), np.int32))

    def lookup(self, slots: Int32, keys: Int64) -> tuple[Float32, Bool] | None:
        """Values [N, D] and found [N]; None when the writer was amid what was read: once more, then. ValueError for unknown slots."""
        slots, keys = ready(slots, np.int32), ready(keys, np.int64)
        if kernels.unknown(self._place_of, slots):
            raise ValueError(f"slots {sorted(set(slots.tolist()))} are not all in the table that is read")
        out, found = new_values(len(keys), self.dim), np.empty(len(keys), np.uint8)
        batch = slots, keys, np.empty((3, len(keys)), np.int32)
        torn = kernels.read_shared(self._index, self._values, self._writes, batch, out, found)
        return None if torn else (out, found.view(np.bool_))
