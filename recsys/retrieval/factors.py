"""An online factor model: which item follows, from the last two items and the context, learned from each transition.

The logit of an item is q · v with q the sum of its query's vectors. A step is sampled softmax over the item that followed
and N others drawn from what was clicked of late, so that popularity cancels out; row-wise Adagrad. All in float32.
Legend: Q rows of a query, D dimensions, N negatives.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recsys.compiled import compiled
from recsys.keys import mix
from recsys.types import Float32, Int32, Int64

CAPACITY = 1_000_000
"""Keys of queries that get a vector, the first that come (140 MB): a context with more values than that tells of single requests."""
DIM, NEGATIVES, RECENT = 32, 24, 4096
"""Half of the negatives learns a third slower, double costs twice; the clicks that they are drawn from span minutes to an hour."""
RATE, START = 0.1, 0.1
"""Adagrad's step and its starting sum of squares."""
_SCALE = 0.1


@compiled
def _learn(vectors: Any, squares: Any, outs: Any, out_squares: Any, query: Any, items: Any, rate: Any) -> float:
    """One step; the first of `items` followed. Its probability before."""
    dim, count = vectors.shape[1], len(items)
    q = np.zeros(dim, np.float32)
    for row in query:
        q += vectors[row]
    logits = np.empty(count, np.float32)
    for n in range(count):
        logits[n] = np.sum(q * outs[items[n]])
    weights = np.exp(logits - logits.max())
    weights /= weights.sum()
    first = weights[0]
    gradient = np.zeros(dim, np.float32)
    for n in range(count):
        gradient += (weights[n] - np.float32(n == 0)) * outs[items[n]]
    for n in range(count):
        out = outs[items[n]]
        step = (weights[n] - np.float32(n == 0)) * q
        out_squares[items[n]] += np.mean(step * step)
        out -= np.float32(rate / np.sqrt(out_squares[items[n]])) * step
    for row in query:
        squares[row] += np.mean(gradient * gradient)
        vectors[row] -= np.float32(rate / np.sqrt(squares[row])) * gradient
    return first


class Factors:
    """Vectors by key (queries) and by catalogue row (items). One writer beside many readers."""

    def __init__(self, seed: int = 0, capacity: int = CAPACITY) -> None:
        self._seed, self._capacity = seed, capacity
        self._rows: dict[tuple[int, int], int] = {}
        """(place in the query, key) → row of `_vectors`"""
        self._vectors, self._squares = np.zeros((1024, DIM), np.float32), np.full(1024, START, np.float32)
        self._outs, self._out_squares = np.zeros((0, DIM), np.float32), np.zeros(0, np.float32)
        self._recent = np.zeros(RECENT, np.int64)
        self._steps = 0
        self._lock = threading.Lock()
        self._reach(1)
        _learn(self._vectors[:2], self._squares[:2], self._outs[:2].copy(), self._out_squares[:2].copy(), *_NOTHING)

    def _start(self, rows: Int64, salt: int) -> Float32:
        """Vectors of new rows, uniform in ±0.1, by a hash."""
        cells = rows[:, None] * DIM + np.arange(DIM) + (self._seed * 2 + salt) * 2**40
        units = (mix(cells) >> np.uint64(40)).astype(np.float32) / np.float32(2**23)
        return (units - np.float32(1)) * np.float32(_SCALE)

    def _reach(self, size: int) -> None:
        """Make room for items up to this row."""
        old = len(self._outs)
        if size <= old:
            return
        new = max(size, 2 * old, 1024)
        self._outs = np.concatenate([self._outs, self._start(np.arange(old, new), 1)])
        self._out_squares = np.concatenate([self._out_squares, np.full(new - old, START, np.float32)])

    def _query(self, keys: Sequence[int], grow: bool) -> Int64:
        found = []
        for place, key in enumerate(keys):
            if key == 0:
                continue
            row = self._rows.get((place, key))
            if row is None and grow and len(self._rows) < self._capacity:
                row = self._rows[place, key] = len(self._rows)
                if row >= len(self._vectors):
                    self._vectors = np.concatenate([self._vectors, np.zeros_like(self._vectors)])
                    self._squares = np.concatenate([self._squares, np.full_like(self._squares, START)])
                self._vectors[row] = self._start(np.array([row]), 0)[0]
            if row is not None:
                found.append(row)
        return np.array(found, np.int64)

    def learn(self, keys: Sequence[int], target: int) -> None:
        """`target` (a catalogue row) followed, by the keys of the query (0: not known); the place of a key is its kind."""
        with self._lock:
            self._reach(target + 1)
            known = min(self._steps, RECENT)
            if known >= NEGATIVES:
                draws = mix(np.arange(NEGATIVES) + self._steps * NEGATIVES + self._seed * 2**40) % np.uint64(known)
                others = self._recent[draws.astype(np.int64)]
                items = np.concatenate([[target], others[(others != target) & (others >= 0)]])
                query = self._query(keys, grow=True)
                _learn(self._vectors, self._squares, self._outs, self._out_squares, query, items, RATE)
            self._recent[self._steps % RECENT] = target
            self._steps += 1

    def forget_rows(self, rows: Int32) -> None:
        """These rows will be other items', which begin like any other."""
        with self._lock:
            self._recent[np.isin(self._recent, rows)] = -1
            rows = rows[rows < len(self._outs)]
            self._outs[rows], self._out_squares[rows] = self._start(rows.astype(np.int64), 1), START

    def score(self, keys: Sequence[int], rows: Int32) -> Float32:
        """The logit of each item at `rows` [n]; 0 for one never seen."""
        with self._lock:
            q = self._vectors[self._query(keys, grow=False)].sum(0)
            known = rows < len(self._outs)
            return np.where(known, self._outs[np.where(known, rows, 0)] @ q, 0).astype(np.float32)

    def state(self) -> dict[str, Any]:
        """Everything, as arrays."""
        with self._lock:
            size = len(self._rows)
            return {
                "kinds": np.array([kind for kind, _ in self._rows], np.int64),
                "keys": np.array([key for _, key in self._rows], np.int64),
                "vectors": self._vectors[:size].copy(),
                "squares": self._squares[:size].copy(),
                "outs": self._outs.copy(),
                "out_squares": self._out_squares.copy(),
                "recent": self._recent.copy(),
                "steps": np.array([self._steps], np.int64),
            }

    def restore(self, state: Mapping[str, Any], row_map: Int32) -> None:
        """Load `state`; `row_map[old row]` is today's row, -1 where the item is gone."""
        with self._lock:
            names = zip(state["kinds"].tolist(), state["keys"].tolist(), strict=True)
            self._rows = {name: row for row, name in enumerate(names)}
            size = max(1024, 1 << len(self._rows).bit_length())
            self._vectors, self._squares = np.zeros((size, DIM), np.float32), np.full(size, START, np.float32)
            self._vectors[: len(self._rows)], self._squares[: len(self._rows)] = state["vectors"], state["squares"]
            old = np.arange(min(len(row_map), len(state["outs"])))
            kept = old[row_map[old] >= 0]
            self._outs, self._out_squares = np.zeros((0, DIM), np.float32), np.zeros(0, np.float32)
            self._reach(int(row_map.max(initial=0)) + 1)
            self._outs[row_map[kept]], self._out_squares[row_map[kept]] = (
                state["outs"][kept],
                state["out_squares"][kept],
            )
            known = (state["recent"] >= 0) & (state["recent"] < len(row_map))
            self._recent = np.full(len(known), -1, np.int64)
            self._recent[known] = row_map[state["recent"][known]]
            self._steps = int(state["steps"][0])


_NOTHING = (np.zeros(0, np.int64), np.zeros(1, np.int64), 0.0)
