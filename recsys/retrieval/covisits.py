"""Co-visits: which items follow which within a session, as decayed counts of pairs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from recsys.decay import ForwardDecay, counted
from recsys.retrieval import covisit_kernels as kernels
from recsys.retrieval import covisit_pool as pool
from recsys.retrieval.covisit_kernels import Reading
from recsys.retrieval.covisit_pool import END, FREE_BLOCKS, PAIRS, SLOT, SLOTS, Pairs, Rules
from recsys.retrieval.top_counts import half_life_of, mapped
from recsys.types import Bool, Float32, Int32

PAIR_BYTES = 50
"""What a pair takes, and a few more: 30 where most items have ten pairs, 40 where they have four. While the pool grows its copy is there too."""
_AT_ONCE = 2000
"""Items whose pairs are looked through while readers wait: a millisecond or less."""
_EVERY = np.zeros(0, np.bool_)


class CoVisits:
    """Decayed counts of item pairs, one writer beside many readers.

    A pair's count halves with every `half_life_s`, and with every `half_life_visits` counts of the same item: what follows a
    busy item changes within minutes, what follows a quiet one stays known for days. The i-th row before counts `discounts`[i]
    at `add`; the i-th newest of a history counts `history_discount`^i when read.

    Memory is bounded, about `PAIR_BYTES` a pair: of an item with twice as many the `neighbours` largest stay, and beyond `max_pairs` of
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
        self._rules = Rules(np.array(discounts), float(backward), float(half_life_visits), 2 * neighbours, max_pairs)
        self._plain_rules = tuple(self._rules)
        self._history_discount = float(history_discount)
        self.alive: Callable[[], Bool] = lambda: _EVERY
        """Which rows' items are not deleted (those beyond its end are not): of too many neighbours the deleted ones go first."""
        self._pairs = self._empty(1024, 0, 0)
        self._lock = threading.Lock()

    def _empty(self, rows: int, items: int, entries: int) -> Pairs:
        """No pairs, and room for so many rows, items and entries of the pool."""
        head = np.zeros(FREE_BLOCKS + 32, np.int64)
        head[SLOTS] = 1
        return Pairs(
            np.zeros(rows, np.int32), np.zeros(1 + items, SLOT), np.empty(entries, np.int32), np.empty(entries), head
        )

    @property
    def full_ratio(self) -> float:
        """How full it is."""
        return self.num_pairs / self._rules.max_pairs

    @property
    def num_pairs(self) -> int:
        """Pairs kept now."""
        return int(self._pairs.head[PAIRS])

    def add(self, row: int, previous_rows: Sequence[int], now_ms: int) -> None:
        """Count `row` as following the session's earlier rows (distinct, newest first; below 0: not known); beyond `discounts` they do not count."""
        before = np.array(previous_rows[: len(self._rules.discounts)], np.int64)
        with self._lock:
            if (factor := self._decay.rescale(now_ms)) is not None:
                pool.scale(self._pairs, factor)
            weight, alive = self._decay.weight(now_ms), self.alive()
            while not kernels.add(tuple(self._pairs), self._plain_rules, row, before, weight, alive):
                self._make_room(int(before.max(initial=row)) + 1)

    def _make_room(self, rows: int) -> None:
        """Let the next call of `kernels.add` find room: what is full is half as large again, and the pool has no free blocks."""
        pairs, most, counts = self._pairs, self._rules.most, 2 * len(self._rules.discounts)
        if rows > len(pairs.slot_of):
            grown = self._empty(max(rows, len(pairs.slot_of) * 3 // 2), 0, 0).slot_of
            grown[: len(pairs.slot_of)] = pairs.slot_of
            pairs = pairs._replace(slot_of=grown)
        if pairs.head[SLOTS] + counts > len(pairs.slots):
            slots = np.zeros(len(pairs.slots) * 3 // 2 + counts, SLOT)
            slots[: len(pairs.slots)] = pairs.slots
            pairs = pairs._replace(slots=slots)
        if pairs.head[END] + counts * most > len(pairs.targets):
            size = pool.tight(pairs, most) * 3 // 2 + 2 * counts * most
            targets, sums = np.empty(size, np.int32), np.empty(size)
            pool.repack(pairs, targets, sums, most)
            pairs = pairs._replace(targets=targets, sums=sums)
        self._pairs = pairs

    def forget_rows(self, rows: Int32) -> None:
        """These rows, which nobody counts any more, will be other items': their pairs are gone. Time is proportional to all pairs (give many
        at once); readers wait for a few of them."""
        gone = np.zeros(int(rows.max(initial=-1)) + 1, np.bool_)
        gone[rows] = True
        for first in range(1, int(self._pairs.head[SLOTS]), _AT_ONCE):
            with self._lock:
                pool.forget(self._pairs, gone, first, first + _AT_ONCE)

    def error(self, row: int, now_ms: int) -> float:
        """How much too low the count of a pair of `row` may be at most, as of `now_ms`."""
        with self._lock:
            pairs = self._pairs
            slot = pairs.slots[pairs.slot_of[row] if row < len(pairs.slot_of) else 0]
            age = float(slot["clock"]) / self._rules.half_life_visits
            return float(slot["lost"]) * 2.0**-age * self._decay.decay(now_ms)

    def candidates(
        self, history_rows: Sequence[int], k: int, now_ms: int, allowed: Bool | None = None
    ) -> tuple[Int32, Float32]:
        """The k best (allowed) by Σ discount × count over the history (newest first), best first, ties by row; counts as of `now_ms`.

        Rows of the history can be among them. Time is proportional to len(history_rows) × neighbours.
        """
        history = np.array(history_rows, np.int64)
        mask = _EVERY if allowed is None else allowed
        with self._lock:
            found: tuple[Int32, Float32] = kernels.candidates(
                self._pairs, self._reading(now_ms), history, k, mask, allowed is not None
            )
        return found

    def score(self, history_rows: Sequence[int], candidate_rows: Int32, now_ms: int) -> Float32:
        """Σ discount × count over the history (newest first) for each candidate [n]; 0 where they never met."""
        history, wanted = np.array(history_rows, np.int64), np.array(candidate_rows, np.int32)
        with self._lock:
            found: Float32 = kernels.score(self._pairs, self._reading(now_ms), history, wanted)
        return found

    def _reading(self, now_ms: int) -> Reading:
        return Reading(self._history_discount, self._rules.half_life_visits, self._decay.decay(now_ms))

    def state(self) -> dict[str, Any]:
        """Everything, as arrays: item by item, the least recently counted first."""
        with self._lock:
            sources, clocks, lost, sizes, targets, sums = pool.saved(self._pairs)
            return {
                "clock": np.array(self._decay.state(), np.int64),
                "half_life_s": np.array([self._decay.half_life_ms / 1000]),
                "sources": sources,
                "clocks": clocks,
                "lost": lost,
                "sizes": sizes,
                "targets": targets,
                "sums": sums,
            }

    def restore(self, state: Mapping[str, Any], row_map: Int32 | None = None, **times: int) -> None:
        """Load `state`; `row_map[old row]` is today's row, -1 where the item is gone; `times`: see `ForwardDecay.restore`."""
        for name in ("sums", "clocks", "lost"):
            counted(state[name], "co-visits")
        sources, sources_kept = mapped(np.repeat(state["sources"], state["sizes"]), row_map)
        targets, targets_kept = mapped(state["targets"], row_map)
        both = sources_kept & targets_kept
        sources, targets = sources[targets_kept[sources_kept]], targets[sources_kept[targets_kept]]
        clocks, lost = (np.repeat(values, state["sizes"])[both] for values in (state["clocks"], state["lost"][1:]))
        starts = np.flatnonzero(np.diff(sources, prepend=-1))
        sizes, most = np.diff(starts, append=len(sources)), self._rules.most
        entries = int(np.minimum(np.maximum(2 * sizes, 4), most).sum())
        pairs = self._empty(max(1024, int(sources.max(initial=-1)) + 1), len(sizes), entries)
        pairs.slots[0]["lost"] = state["lost"][0]
        columns = sources[starts], clocks[starts], lost[starts], targets, state["sums"][both]
        pool.load(pairs, most, sizes, columns, self.alive())
        with self._lock:
            factor = self._decay.restore(state["clock"].tolist(), half_life_of(state), **times)
            self._pairs = pairs
            if factor != 1.0:
                pool.scale(pairs, factor)


def warm_up() -> None:
    """Compile, or load from the cache: not in the first request."""
    some, rows = CoVisits(1.0), np.zeros(1, np.int32)
    some.add(0, [1], 0)
    some.candidates([0], 1, 0)
    some.score([0], rows, 0)
    some.restore(some.state())
    some.forget_rows(rows)
    pool.scale(some._pairs, 1.0)
