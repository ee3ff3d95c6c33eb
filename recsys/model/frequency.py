"""How often an item is in a batch, from the gaps between its appearances (Yi et al. 2019, algorithm 2), one entry a key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from recsys.types import Bool, Int64

_LEAST = 1e-8


class Frequency:
    """Streaming estimate of P(item in batch) = 1 / mean gap in steps. Not thread-safe; exact per key, nothing is hashed.

    The first real gap of a key is taken whole, the n-th with weight max(rate, 1/n). A key seen once has the gap
    max(initial_gap, its step): rare, but not infinitely so. Beyond `capacity` keys, the half longest unseen is forgotten.
    """

    def __init__(self, *, rate: float = 0.01, initial_gap: float = 100.0, capacity: int = 1_000_000) -> None:
        self._rate, self._initial_gap, self._capacity = rate, initial_gap, capacity
        self._row: dict[int, int] = {}
        self._last, self._count, self._gap = np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)
        self._step = 0

    def __len__(self) -> int:
        return len(self._row)

    def update(self, step: int, keys: Int64) -> None:
        """Count each distinct key of the batch of this step once. Steps start at 1 and rise; ValueError otherwise."""
        if step <= self._step:
            raise ValueError(f"step {step} must be above the last one, {self._step}")
        self._step = step
        distinct = np.unique(keys)
        known = self._rows(distinct)
        new, rows = distinct[known < 0], known[known >= 0]
        self._count[rows] += 1
        rate = np.maximum(self._rate, 1.0 / self._count[rows])
        self._gap[rows] += rate * (step - self._last[rows] - self._gap[rows])
        self._last[rows] = step
        self._add(new)
        if len(self._row) > self._capacity:
            self._shrink()

    def probability(self, keys: Int64) -> npt.NDArray[np.float64]:
        """Estimated chance that a batch contains each key, in [1e-8, 1]; duplicates allowed."""
        rows = self._rows(keys)
        gap = np.full(len(keys), max(self._initial_gap, self._step), np.float64)
        gap[rows >= 0] = self._gap[rows[rows >= 0]]
        return np.clip(1.0 / gap, _LEAST, 1.0)

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Everything, as arrays owned by the caller; `restore` takes it back."""
        size = len(self._row)
        return {
            "step": np.array(self._step, np.int64),
            "keys": np.fromiter(self._row, np.int64, size),
            "last": self._last[:size].copy(),
            "count": self._count[:size].copy(),
            "gap": self._gap[:size].copy(),
        }

    def restore(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Replace everything by what `state` returned."""
        self._step = int(state["step"])
        self._row = {key: row for row, key in enumerate(state["keys"].tolist())}
        self._last, self._count = state["last"].astype(np.int64), state["count"].astype(np.int64)
        self._gap = state["gap"].astype(np.float64)

    def keep(self, kept: Bool) -> None:
        """Forget the keys, in the order of `state`, that are not `kept`."""
        self.restore({name: array if name == "step" else array[kept] for name, array in self.state().items()})

    def keys(self) -> Int64:
        """Every key known, in the order of `state`."""
        return np.fromiter(self._row, np.int64, len(self._row))

    def _rows(self, keys: Int64) -> npt.NDArray[np.intp]:
        """Row of each key, -1 where unknown."""
        return np.fromiter((self._row.get(key, -1) for key in keys.tolist()), np.intp, len(keys))

    def _add(self, keys: Int64) -> None:
        size = len(self._row)
        need = size + len(keys)
        if need > len(self._gap):
            extra = max(need, 2 * len(self._gap)) - len(self._gap)
            self._last, self._count = np.pad(self._last, (0, extra)), np.pad(self._count, (0, extra))
            self._gap = np.pad(self._gap, (0, extra))
        self._row.update(zip(keys.tolist(), range(size, need), strict=True))
        self._last[size:need], self._count[size:need] = self._step, 0
        self._gap[size:need] = max(self._initial_gap, self._step)

    def _shrink(self) -> None:
        """Keep the half last seen most recently; ties by row, which is order of arrival."""
        state = self.state()
        kept = np.sort(np.argsort(-state["last"], kind="stable")[: self._capacity // 2])
        self.restore({name: array if name == "step" else array[kept] for name, array in state.items()})
