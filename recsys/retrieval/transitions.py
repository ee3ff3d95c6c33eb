"""Transitions: what followed an item of late, weighed by recency and by the context that both times share.

Legend: S context slots (the item before and the place in the session among them), F features of a candidate, L length.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from recsys.compiled import compiled
from recsys.retrieval.select import among, best
from recsys.retrieval.top_counts import mapped
from recsys.types import Bool, Float32, Int32, Int64

_PLACES = 2048
"""Places of the table of one reading, at least twice its targets."""
RANK_HALF_LIVES = (20.0, 200.0)
"""Transitions after which the weight of one halves: the first follows what breaks now, the second knows the usual."""

_LONGEST_WALK = 8
"""Lengths of a walk that skips targets which are not allowed: half starves sooner after a sale, double takes longer then."""
_ALL: Bool = np.zeros(0, np.bool_)
_LEAST = 0.05
"""Added to a weight before its logarithm: a twentieth of one transition."""


@compiled
def _place(table: Any, target: Any) -> int:
    place = (target * 0x9E3779B1) % _PLACES
    while table[place] >= 0 and table[place] != target:
        place = (place + 1) % _PLACES
    return int(place)


class Ring(NamedTuple):
    """Transitions by number modulo the capacity: number of the source's one before, target, context [S]."""

    links: Int64
    targets: Int64
    contexts: Int64


@compiled
def _walk(ring: Any, count: Any, newest: Any, length: Any, context: Any, allowed: Any, out: Any) -> Any:
    """Walk a source's transitions to allowed targets (an empty mask: to all), newest first: the table of targets, and their features in
    `out` [places, F]."""
    links, targets, contexts = ring.links, ring.targets, ring.contexts
    halves = np.array(RANK_HALF_LIVES)
    table = np.full(_PLACES, -1, np.int64)
    at, rank = newest, 0
    decay = np.exp2(-1.0 / halves)
    weight = np.ones(len(halves))
    steps = _LONGEST_WALK * length
    while at >= 0 and at >= count - len(targets) and rank < length and steps > 0:
        entry = at % len(targets)
        at = links[entry]
        steps -= 1
        target = targets[entry]
        if target < 0 or (len(allowed) > 0 and not (target < len(allowed) and allowed[target])):
            continue
        place = _place(table, targets[entry])
        table[place] = targets[entry]
        shared = 0
        for slot in range(len(context)):
            if context[slot] != 0 and contexts[entry, slot] == context[slot]:
                out[place, len(halves) + 1 + slot] += weight[-1]
                shared += 1
        for h in range(len(halves)):
            out[place, h] += weight[h]
        out[place, len(halves)] += weight[-1] * 2.0**shared
        weight *= decay
        rank += 1
    return table


@compiled
def _gather(table: Any, sums: Any, rows: Any, out: Any) -> None:
    for candidate in range(len(rows)):
        place = _place(table, rows[candidate])
        if table[place] >= 0:
            out[candidate] = sums[place]


class Transitions:
    """The last `capacity` transitions of all items, linked by source. One writer beside many readers."""

    def __init__(self, num_slots: int, length: int = 400, capacity: int = 1_000_000) -> None:
        if not 1 <= length <= _PLACES // 2:
            raise ValueError(f"length = {length} must be between 1 and {_PLACES // 2}")
        self._length, self._num_slots = length, num_slots
        self._newest: dict[int, int] = {}
        self._count = 0
        self._sources = np.zeros(capacity, np.int32)
        contexts = np.zeros((capacity, num_slots), np.int64)
        self._ring = Ring(np.full(capacity, -1, np.int64), np.zeros(capacity, np.int64), contexts)
        self._lock = threading.Lock()
        self.score(0, np.zeros(num_slots, np.int64), np.zeros(1, np.int32))  # compiles

    @property
    def num_features(self) -> int:
        """Weights by each half-life; by context shared; by each slot that is shared."""
        return len(RANK_HALF_LIVES) + 1 + self._num_slots

    def add(self, source: int, target: int, context: Int64) -> None:
        """Count `target` as clicked after `source` in this context [S] (0: not known)."""
        with self._lock:
            entry = self._count % len(self._sources)
            if self._count >= len(self._sources) and self._newest.get(old := int(self._sources[entry])) == (
                self._count - len(self._sources)
            ):
                del self._newest[old]
            self._ring.links[entry] = self._newest.get(source, -1)
            self._sources[entry], self._ring.targets[entry], self._ring.contexts[entry] = source, target, context
            self._newest[source] = self._count
            self._count += 1

    def forget_rows(self, rows: Int32) -> None:
        """These rows will be other items': transitions from and to them are gone."""
        with self._lock:
            for row in rows.tolist():
                self._newest.pop(row, None)
            size = min(self._count, len(self._sources))
            self._ring.targets[:size][np.isin(self._ring.targets[:size], rows)] = -1
            self._sources[:size][np.isin(self._sources[:size], rows)] = -1

    def _sums(self, source: int, context: Int64, allowed: Bool = _ALL) -> tuple[Int64, Any]:
        out = np.zeros((_PLACES, self.num_features), np.float64)
        with self._lock:
            table = _walk(self._ring, self._count, self._newest.get(source, -1), self._length, context, allowed, out)
        return table, out

    def score(self, source: int, context: Int64, rows: Int32) -> Float32:
        """log(features + .05) of each candidate [n, F] after `source` (none: -1) in this context [S]."""
        out = np.zeros((len(rows), self.num_features))
        if source >= 0:
            _gather(*self._sums(source, context), rows.astype(np.int64), out)
        return np.log(out + _LEAST).astype(np.float32)

    def candidates(self, source: int, context: Int64, k: int, allowed: Bool | None = None) -> tuple[Int32, Float32]:
        """The k best (allowed) after `source` by the weight that counts shared context, best first, ties by row."""
        table, sums = self._sums(source, context, _ALL if allowed is None else allowed)
        places = among(table, allowed)
        rows, scores = table[places].astype(np.int32), sums[places, len(RANK_HALF_LIVES)]
        first = best(rows, scores, k)
        return rows[first], scores[first].astype(np.float32)

    def state(self) -> dict[str, Any]:
        """Everything that is still linked, as arrays, oldest first."""
        with self._lock:
            size = min(self._count, len(self._sources))
            order = np.arange(self._count - size, self._count) % len(self._sources)
            return {
                "sources": self._sources[order],
                "targets": self._ring.targets[order].astype(np.int32),
                "contexts": self._ring.contexts[order],
            }

    def restore(self, state: Mapping[str, Any], row_map: Int32 | None = None) -> None:
        """Load `state`; `row_map[old row]` is today's row, -1 where the item is gone. The item before is context: mapped, too."""
        sources, sources_kept = mapped(state["sources"], row_map)
        targets, targets_kept = mapped(state["targets"], row_map)
        both = sources_kept & targets_kept
        rows = zip(
            sources[targets_kept[sources_kept]].tolist(),
            targets[sources_kept[targets_kept]].tolist(),
            state["contexts"][both],
            strict=True,
        )
        for source, target, context in rows:
            self.add(source, target, context)
