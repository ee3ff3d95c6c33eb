"""Co-visits: which items follow which within a session, as decayed counts of pairs."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from recsys.decay import ForwardDecay, counted
from recsys.retrieval.select import among, best, looked_up, tally
from recsys.retrieval.top_counts import half_life_of, mapped
from recsys.types import Bool, Float32, Int32

PAIR_BYTES = 100
_MAX_EXPONENT = 400
"""Half-lives of an item's own clock after which its sums are rescaled; with the time's 512 it stays below float64's 1,023."""

_AT_ONCE = 200
"""Items whose pairs are looked through while readers wait: a millisecond or two."""


_Flat = tuple[Int32, npt.NDArray[np.float64]]


class _Neighbours:
    """The pairs of one item: forward-decayed sums by neighbour, the clock that counts what was added, and what was lost.

    `lost`, in the units of the sums: no pair, kept or not, was counted more often than its sum and this together.
    """

    __slots__ = ("clock", "flat", "lost", "sums")

    def __init__(self, sums: dict[int, float], clock: float, lost: float) -> None:
        self.sums, self.clock, self.lost = sums, clock, lost
        self.flat: _Flat | None = None
        """`sums` as arrays, for readers; None since it changed."""

    def arrays(self) -> _Flat:
        """Neighbours and their sums."""
        if self.flat is None:
            size = len(self.sums)
            self.flat = np.fromiter(self.sums, np.int32, size), np.fromiter(self.sums.values(), np.float64, size)
        return self.flat

    def most(self) -> float:
        """The most that a pair, kept or not, was counted, in units of the sums."""
        return max(self.sums.values(), default=0.0) + self.lost

    def scale(self, factor: float) -> None:
        """Count in other units; what is nothing in these is dropped."""
        self.sums, self.flat = (
            {target: kept for target, total in self.sums.items() if (kept := total * factor) > 0.0},
            None,
        )
        self.lost *= factor

    def forget(self, gone: set[int]) -> None:
        """Drop these neighbours."""
        if not gone.isdisjoint(self.sums):
            self.sums, self.flat = {target: total for target, total in self.sums.items() if target not in gone}, None

    def keep_largest(self, count: int, is_dead: Callable[[int], bool]) -> None:
        """Drop all but so many, deleted items first."""
        ranked = sorted(self.sums.items(), key=lambda pair: (is_dead(pair[0]), -pair[1], pair[0]))
        self.sums, self.flat = dict(ranked[:count]), None
        self.lost += max(total for _, total in ranked[count:])


class CoVisits:
    """Decayed counts of item pairs, one writer beside many readers.

    A pair's count halves with every `half_life_s`, and with every `half_life_visits` counts of the same item: what follows a
    busy item changes within minutes, what follows a quiet one stays known for days. The i-th row before counts `discounts`[i]
    at `add`; the i-th newest of a history counts `history_discount`^i when read.

    Memory is bounded, about 100 bytes a pair: of an item with twice as many the `neighbours` largest stay, and beyond `max_pairs` of
    all together the items least recently counted go. A count is never too high, and too low by at most `error`, which is 0 as
    long as neither happened: each time it grows by the largest sum that was dropped.
    """

    def __init__(
        self,
        half_life_s: float,
        backward: float = 0.2,
        neighbours: int = 100,
        *,
        half_life_visits: float = 150.0,
        discounts: tuple[float, ...] = (1.0, 0.5, 0.25),
        history_discount: float = 0.2,
        max_pairs: int = 5_000_000,
    ) -> None:
        if neighbours < 1 or max_pairs < 4 * neighbours or half_life_visits <= 0:
            raise ValueError(
                f"need neighbours ≥ 1, max_pairs ≥ 4 neighbours, half_life_visits > 0, got {neighbours}, {max_pairs}, {half_life_visits}"
            )
        self._decay = ForwardDecay(half_life_s)
        self._backward = backward
        self._neighbours = neighbours
        self._half_life_visits = half_life_visits
        self._discounts = discounts
        self._history_discount = history_discount
        self._max_pairs = max_pairs
        self.is_dead: Callable[[int], bool] = lambda row: False
        """Whether a row's item is deleted: of too many neighbours those go first."""
        self._items: OrderedDict[int, _Neighbours] = OrderedDict()
        self._num_pairs = 0
        self._forgotten = 0.0
        """The most that a pair of an item that went may have counted, in units of `_decay`: what `lost` starts from."""
        self._lock = threading.Lock()

    @property
    def full_ratio(self) -> float:
        """How full it is."""
        return self._num_pairs / self._max_pairs

    @property
    def num_pairs(self) -> int:
        """Pairs kept now."""
        return self._num_pairs

    def add(self, row: int, previous_rows: Sequence[int], now_ms: int) -> None:
        """Count `row` as following the session's earlier rows (distinct, newest first; below 0: not known); beyond `discounts` they do not count."""
        with self._lock:
            if (factor := self._decay.rescale(now_ms)) is not None:
                self._rescale(factor)
            weight = self._decay.weight(now_ms)
            for previous, discount in zip(previous_rows, self._discounts, strict=False):
                if previous != row and previous >= 0:
                    self._count(previous, row, discount, weight)
                    if self._backward:
                        self._count(row, previous, discount * self._backward, weight)
            while self._num_pairs > self._max_pairs:
                gone = self._items.popitem(last=False)[1]
                self._num_pairs -= len(gone.sums)
                self._forgotten = max(self._forgotten, gone.most() * 2.0 ** (-gone.clock / self._half_life_visits))

    def _count(self, source: int, target: int, amount: float, weight: float) -> None:
        item = self._items.get(source)
        if item is None:
            item = self._items[source] = _Neighbours({}, 0.0, self._forgotten)
        else:
            self._items.move_to_end(source)
        item.clock += amount
        exponent = item.clock / self._half_life_visits
        if exponent > _MAX_EXPONENT:
            item.clock -= _MAX_EXPONENT * self._half_life_visits
            exponent -= _MAX_EXPONENT
            self._change(source, lambda item: item.scale(2.0**-_MAX_EXPONENT))
            self._items[source] = item  # even when nothing large enough was left
        sums, item.flat = item.sums, None
        weight *= amount * 2.0**exponent
        if target in sums:
            sums[target] += weight
            return
        sums[target] = weight
        self._num_pairs += 1
        if len(sums) >= 2 * self._neighbours:
            item.keep_largest(self._neighbours, self.is_dead)
            self._num_pairs -= len(sums) - len(item.sums)

    def _rescale(self, factor: float) -> None:
        self._forgotten *= factor
        for source in list(self._items):
            self._change(source, lambda item: item.scale(factor))

    def _change(self, source: int, change: Callable[[_Neighbours], object]) -> None:
        """Some of an item's pairs may go by this; without any it is not kept."""
        item = self._items[source]
        before = len(item.sums)
        change(item)
        self._num_pairs -= before - len(item.sums)
        if not item.sums:
            del self._items[source]

    def forget_rows(self, rows: Int32) -> None:
        """These rows, which nobody counts any more, will be other items': their pairs are gone. Time is proportional to all pairs (give many
        at once); readers wait for a few of them."""
        gone = set(rows.tolist())
        with self._lock:
            for row in gone & self._items.keys():
                self._num_pairs -= len(self._items.pop(row).sums)
            sources = list(self._items)
        for start in range(0, len(sources), _AT_ONCE):
            with self._lock:
                for source in sources[start : start + _AT_ONCE]:
                    if source in self._items:
                        self._change(source, lambda item: item.forget(gone))

    def error(self, row: int, now_ms: int) -> float:
        """How much too low the count of a pair of `row` may be at most, as of `now_ms`."""
        with self._lock:
            item = self._items.get(row)
            lost = self._forgotten if item is None else item.lost * 2.0 ** (-item.clock / self._half_life_visits)
            return lost * self._decay.decay(now_ms)

    def candidates(
        self, history_rows: Sequence[int], k: int, now_ms: int, allowed: Bool | None = None
    ) -> tuple[Int32, Float32]:
        """The k best (allowed) by Σ discount × count over the history (newest first), best first, ties by row; counts as of `now_ms`.

        Rows of the history can be among them. Time is proportional to len(history_rows) × neighbours.
        """
        found, totals, decay = self._blend(history_rows, now_ms)
        if allowed is not None:
            kept = among(found, allowed)
            found, totals = found[kept], totals[kept]
        first = best(found, totals, k)
        return found[first], (totals[first] * decay).astype(np.float32)

    def score(self, history_rows: Sequence[int], candidate_rows: Int32, now_ms: int) -> Float32:
        """Σ discount × count over the history (newest first) for each candidate [n]; 0 where they never met."""
        found, totals, decay = self._blend(history_rows, now_ms)
        return (looked_up(found, totals, candidate_rows) * decay).astype(np.float32)

    def _blend(self, history_rows: Sequence[int], now_ms: int) -> tuple[Int32, npt.NDArray[np.float64], float]:
        """Neighbours of the history's items, each one's Σ discount × sum, and what a sum is worth now."""
        rows, totals = [np.zeros(0, np.int32)], [np.zeros(0)]
        discount = 1.0
        with self._lock:
            for history_row in history_rows:
                item = self._items.get(int(history_row))
                if item is not None and discount > 0.0:
                    neighbours, sums = item.arrays()
                    rows.append(neighbours)
                    totals.append(discount * 2.0 ** (-item.clock / self._half_life_visits) * sums)
                discount *= self._history_discount
            decay = self._decay.decay(now_ms)
        return *tally(np.concatenate(rows), np.concatenate(totals)), decay

    def state(self) -> dict[str, Any]:
        """Everything, as arrays: item by item, the least recently counted first."""
        with self._lock:
            items = list(self._items.values())
            return {
                "clock": np.array(self._decay.state(), np.int64),
                "half_life_s": np.array([self._decay.half_life_ms / 1000]),
                "sources": np.fromiter(self._items, np.int32, len(items)),
                "clocks": np.array([item.clock for item in items], np.float64),
                "lost": np.array([self._forgotten, *(item.lost for item in items)], np.float64),
                "sizes": np.array([len(item.sums) for item in items], np.int64),
                "targets": np.array([target for item in items for target in item.sums], np.int32),
                "sums": np.array([total for item in items for total in item.sums.values()], np.float64),
            }

    def restore(self, state: Mapping[str, Any], row_map: Int32 | None = None, **times: int) -> None:
        """Load `state`; `row_map[old row]` is today's row, -1 where the item is gone; `times`: see `ForwardDecay.restore`."""
        for name in ("sums", "clocks", "lost"):
            counted(state[name], "co-visits")
        sources, sources_kept = mapped(np.repeat(state["sources"], state["sizes"]), row_map)
        targets, targets_kept = mapped(state["targets"], row_map)
        both = sources_kept & targets_kept
        clocks, lost = (
            np.repeat(values, state["sizes"])[both].tolist() for values in (state["clocks"], state["lost"][1:])
        )
        items: OrderedDict[int, _Neighbours] = OrderedDict()
        columns = sources[targets_kept[sources_kept]], targets[sources_kept[targets_kept]], state["sums"][both]
        for source, target, total, clock, gone in zip(*(c.tolist() for c in columns), clocks, lost, strict=True):
            if source not in items:
                items[source] = _Neighbours({}, clock, gone)
            items[source].sums[target] = total
        with self._lock:
            factor = self._decay.restore(state["clock"].tolist(), half_life_of(state), **times)
            self._items, self._forgotten = items, float(state["lost"][0])
            self._num_pairs = len(clocks)
            if factor != 1.0:
                self._rescale(factor)
