"""The oracle: one dictionary, plain loops, float64 arithmetic, float32 storage. Slow and obviously right."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Iterable

import numpy as np

from recsys.table import worth
from recsys.table.base import Layout, Pending
from recsys.table.reference_serving import Pair, ReferenceServingTable, Row, arrays
from recsys.table.reference_steps import moved
from recsys.table.rows import (
    LAST_SEEN_STEP_MS,
    check_sketch,
    check_width,
    draws,
    filter_period_ms,
    filter_places,
    last_seen,
    round_nearest,
    round_stochastic,
    state_width,
)
from recsys.types import Float32, Int32, Int64


class ReferenceTable(ReferenceServingTable):
    """See `recsys.table.base.Table`. One lock a call."""

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        self.evicted = self.refused = 0
        self._order = secrets.randbits(63) if layout.order is None else layout.order
        self._pending: dict[Pair, tuple[int, int]] = {}  # occurrences, last seen
        self._sketch = [0] * (-(-layout.filter_counters // 4) * 4)
        self._sketch_ms = 0
        self._windows, self._waiting_windows = worth.Windows(), worth.Windows()
        self._swept: list[Pair] = []

    def _get_or_create(self, pair: Pair) -> Row:
        if pair not in self._rows:
            self._pending.pop(pair, None)
        return super()._get_or_create(pair)

    def lookup_train(self, slots: Int32, keys: Int64, now_ms: int, admit: bool = True) -> Float32:
        with self._lock:
            pairs = self._pairs(slots, keys)
            if admit:
                self._admit(pairs, now_ms)
            self._see(pairs, now_ms)
            return self.lookup(slots, keys)[0]

    def _see(self, pairs: Iterable[Pair], now_ms: int) -> None:
        for row in (self._rows[pair] for pair in pairs if pair in self._rows):
            row.last_seen_ms = max(row.last_seen_ms, last_seen(now_ms))

    def _count_uses(self, pairs: Iterable[Pair], now_ms: int) -> None:
        """Count the rows that are there, each once."""
        of = worth.tick(now_ms)
        for row in (self._rows[pair] for pair in set(pairs) if pair in self._rows):
            gap = (last_seen(now_ms) - row.last_seen_ms) // LAST_SEEN_STEP_MS
            row.uses = worth.counted(row.uses, gap, row.pair[1], of)

    def _admit(self, pairs: list[Pair], now_ms: int) -> None:
        """Count the missing pairs and make the rows that are due, in order of first occurrence."""
        missing = Counter(p for p in pairs if p not in self._rows)
        counts, sketch = self._counted(missing)
        due = [p for p in missing if counts.get(p, 1) >= self.layout.slots[p[0]].admission]
        if not self.layout.spare:
            self._require_room(due)
        self._count_uses(pairs, now_ms)
        self._see(pairs, now_ms)
        if self.layout.spare and pairs:
            self._evict(worth.surplus(self.layout, len(self._rows), len(due)), pairs)
        admitted = due[: self.layout.capacity - len(self._rows)]
        self.refused += len(due) - len(admitted)
        if self._sketch:
            self._sketch, counted = sketch, any(self.layout.slots[p[0]].admission > 1 for p in missing)
            self._sketch_ms = self._sketch_ms or now_ms * counted
        else:
            left = {p: n for p, n in counts.items() if p not in admitted and self.layout.slots[p[0]].admission > 1}
            self._wait(left, now_ms)
        for pair in admitted:
            self._get_or_create(pair).last_seen_ms = last_seen(now_ms)

    def _counted(self, missing: Counter[Pair]) -> tuple[dict[Pair, int], list[int]]:
        """Counts of missing pairs with these occurrences, and the sketch then (of a filter, pairs with a threshold alone)."""
        if not self._sketch:
            return {p: self._pending.get(p, (0, 0))[0] + n for p, n in missing.items()}, []
        counted = [pair for pair in missing if self.layout.slots[pair[0]].admission > 1]
        places = filter_places(self.layout, *arrays(counted)).T.tolist()
        sketch = self._sketch.copy()
        for pair, four in zip(counted, places, strict=True):
            for place in four:
                sketch[place] = min(sketch[place] + missing[pair], 255)
        return {pair: min(sketch[p] for p in four) for pair, four in zip(counted, places, strict=True)}, sketch

    def _wait(self, counts: dict[Pair, int], now_ms: int) -> None:
        """Keep the counts of pairs without a row; with `spare`, of as many as there may be rows."""
        pairs = list(counts)
        if self.layout.spare:
            over = len(self._pending) + len(pairs) - self.layout.capacity
            if over > 0:
                counted = worth.level_of(np.array([count for count, _ in self._pending.values()], np.int64)).tolist()
                ranks = {p: (seen, n) for (p, (_, seen)), n in zip(self._pending.items(), counted, strict=True)}
                count = worth.with_slack(self.layout, over)
                of = self._waiting_windows.next(len(ranks), worth.looks_for(count))
                for pair in _least(self.layout, self._order, ranks, count, of):
                    del self._pending[pair]
            new = [p for p in pairs if p not in self._pending][self.layout.capacity - len(self._pending) :]
            pairs = [p for p in pairs if p not in set(new)]
        for pair in pairs:
            self._pending[pair] = (counts[pair], max(self._pending.get(pair, (0, now_ms))[1], now_ms))

    def make_room(self, rows: int) -> int:
        with self._lock:
            before = len(self._rows)
            count = worth.surplus(self.layout, before, rows)
            self._evict(count, ())
            if len(self._rows) + rows > self.layout.capacity:
                self._evict(count, (), everywhere=True)
            return before - len(self._rows)

    def _evict(self, count: int, kept: Iterable[Pair], everywhere: bool = False) -> None:
        size, spared = len(self._rows), set(kept)
        if count <= 0 or not size:
            return
        of = self._windows.next(size, size if everywhere else worth.looks_for(count))
        ranks = {p: (row.last_seen_ms, row.uses) for p, row in self._rows.items() if p not in spared}
        for pair in _least(self.layout, self._order, ranks, count, of):
            self._remove(pair)
            self.evicted += 1

    def _halve_filter(self, now_ms: int) -> None:
        period = filter_period_ms(self.layout)
        while self._sketch_ms and period and now_ms - self._sketch_ms >= period:
            self._sketch = [count // 2 for count in self._sketch]
            self._sketch_ms += period

    def apply_gradients(self, slots: Int32, keys: Int64, gradients: Float32, now_ms: int) -> None:
        with self._lock:
            check_width(self.layout, "gradients", gradients, self.layout.dim)
            pairs = self._pairs(slots, keys, gradients)
            sums: dict[int, np.ndarray[tuple[int], np.dtype[np.float64]]] = {}
            chosen: dict[int, Row] = {}
            for pair, gradient in zip(pairs, gradients, strict=True):
                row = self._rows.get(pair) or self._defaults[pair[0]]
                chosen[id(row)] = row
                sums[id(row)] = sums.get(id(row), np.zeros(self.layout.dim)) + gradient.astype(np.float64)
            combined = {name: total.astype(np.float32).astype(np.float64) for name, total in sums.items()}
            if not all(np.isfinite(total).all() for total in combined.values()):
                raise ValueError(f"table {self.layout.name!r}: gradients are not finite; nothing was changed")
            for name, row in chosen.items():
                _step(self.layout, row, combined[name].tolist())
            for pair in pairs:
                if pair in self._rows:
                    self._rows[pair].changed = self._clock
                    self._rows[pair].last_seen_ms = max(self._rows[pair].last_seen_ms, last_seen(now_ms))

    def expire(self, now_ms: int, max_rows: int | None = None) -> int:
        with self._lock:
            if max_rows is None:
                looked = list(self._rows)
            else:
                if not self._swept:
                    self._swept = list(reversed(self._rows))
                looked = [self._swept.pop() for _ in range(min(max_rows, len(self._swept)))]
            gone = [
                p for p in looked if p in self._rows and _expired(self.layout, p, self._rows[p].last_seen_ms, now_ms)
            ]
            for pair in gone:
                self._remove(pair)
            for pair in [p for p, (_, seen) in self._pending.items() if _expired(self.layout, p, seen, now_ms)]:
                del self._pending[pair]
            self._halve_filter(now_ms)
            return len(gone)

    def pending(self) -> Pending:
        with self._lock:
            slots, keys = arrays(self._pending)
            counts = np.array([count for count, _ in self._pending.values()], np.int64)
            seen = np.array([seen for _, seen in self._pending.values()], np.int64)
            sketch = np.array(self._sketch, np.uint8)
            return Pending(
                slots=slots,
                keys=keys,
                counts=counts,
                last_seen_ms=seen,
                sketch=sketch,
                sketch_ms=self._sketch_ms,
                windows=np.array([self._windows.at, self._waiting_windows.at]),
            )

    def restore_pending(self, pending: Pending) -> None:
        with self._lock:
            check_sketch(self.layout, pending)
            self._sketch, self._sketch_ms = pending.sketch.tolist(), pending.sketch_ms
            pairs = self._pairs(pending.slots, pending.keys)
            counted = zip(pending.counts.tolist(), pending.last_seen_ms.tolist(), strict=True)
            most = self.layout.capacity if self.layout.spare else len(pairs)
            self._pending = dict(list(zip(pairs, counted, strict=True))[:most])
            self._windows.at, self._waiting_windows.at = pending.windows.tolist()

    def memory_bytes(self) -> int:
        return super().memory_bytes() + 200 * len(self._pending)


def _least(
    layout: Layout, order: int, ranks: dict[Pair, tuple[int, int]], count: int, of: tuple[int, int]
) -> list[Pair]:
    """Of pairs last seen then and as often as these levels, the `count` of least worth in a window."""
    pairs = list(ranks)
    slots, keys = arrays(pairs)
    hashed = worth.hashes(order, np.searchsorted(sorted(layout.slots), slots), keys)
    value = [last_seen(ms) // LAST_SEEN_STEP_MS + worth.HALF_LIFE * level for ms, level in ranks.values()]
    inside = np.flatnonzero(worth.within(hashed, of))
    chosen = inside[worth.least(np.array(value, np.int64)[inside], hashed[inside], count)]
    return [pairs[n] for n in chosen.tolist()]


def _step(layout: Layout, row: Row, gradient: list[float]) -> None:
    after = row.values.copy()
    start = state = 0
    for segment in layout.segments:
        stop, end = start + segment.dim, state + state_width(segment)
        after[start:stop] = moved(segment, row.values[start:stop], row.state[state:end], gradient[start:stop])
        start, state = stop, end
    if layout.rounding == "stochastic":
        steps = int(row.state[-1])
        row.values[:] = round_stochastic(after, layout.precision, draws(layout, *row.pair, steps))
        row.state[-1] = steps + 1
    else:
        row.values[:] = round_nearest(after, layout.precision)


def _expired(layout: Layout, pair: Pair, last_seen_ms: int, now_ms: int) -> bool:
    expiry_s = layout.slots[pair[0]].expiry_s
    return expiry_s is not None and last_seen_ms <= now_ms - int(expiry_s * 1000)
