"""Co-visits against a plain model of them: dicts of floats, in the words of the class."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.decay import ForwardDecay
from recsys.retrieval.covisits import PAIR_BYTES, CoVisits
from recsys.types import Int32

ROWS = 12
EVERY = np.arange(ROWS, dtype=np.int32)
DISCOUNTS = (1.0, 0.5, 0.25)
HALF_LIFE_S, VISITS, HISTORY_DISCOUNT = 3600.0, 2.0, 0.25
NOTHING = np.ones(0, np.bool_)


@dataclass
class Item:
    """Sums by neighbour, the clock, and what was lost."""

    sums: dict[int, float] = field(default_factory=dict)
    clock: float = 0.0
    lost: float = 0.0


class Plain:
    """What `CoVisits` says it is: `items` in order of their last count."""

    def __init__(self, neighbours: int, max_pairs: int, backward: float) -> None:
        self.decay = ForwardDecay(HALF_LIFE_S)
        self.neighbours, self.max_pairs, self.backward = neighbours, max_pairs, backward
        self.items: dict[int, Item] = {}
        self.forgotten, self.alive = 0.0, NOTHING

    @property
    def num_pairs(self) -> int:
        return sum(len(item.sums) for item in self.items.values())

    def add(self, row: int, before: list[int], now_ms: int) -> None:
        if (factor := self.decay.rescale(now_ms)) is not None:
            self.forgotten *= factor
            for source in list(self.items):
                self.scale(source, factor)
        for earlier, discount in zip(before, DISCOUNTS, strict=False):
            if earlier != row and earlier >= 0:
                self.count(earlier, row, discount, now_ms)
                if self.backward:
                    self.count(row, earlier, discount * self.backward, now_ms)
        while self.num_pairs > self.max_pairs:
            gone = self.items.pop(next(iter(self.items)))
            most = (max(gone.sums.values()) + gone.lost) * math.exp2(-gone.clock / VISITS)
            self.forgotten = max(self.forgotten, most)

    def count(self, source: int, target: int, amount: float, now_ms: int) -> None:
        item = self.items.pop(source, None) or Item(lost=self.forgotten)
        self.items[source] = item
        item.clock += amount
        if item.clock / VISITS > 400:
            item.clock -= 400 * VISITS
            self.scale(source, 2.0**-400)
            self.items[source] = item
        added = self.decay.weight(now_ms) * (amount * math.exp2(item.clock / VISITS))
        item.sums[target] = item.sums.get(target, 0.0) + added
        if len(item.sums) >= 2 * self.neighbours:
            order = sorted(item.sums, key=lambda row: (self.is_dead(row), -item.sums[row], row))
            item.lost += max(item.sums[row] for row in order[self.neighbours :])
            item.sums = {row: item.sums[row] for row in order[: self.neighbours]}

    def is_dead(self, row: int) -> bool:
        return row < len(self.alive) and not self.alive[row]

    def scale(self, source: int, factor: float) -> None:
        item = self.items[source]
        item.sums = {row: total * factor for row, total in item.sums.items() if total * factor > 0.0}
        item.lost *= factor
        if not item.sums:
            del self.items[source]

    def forget(self, gone: list[int]) -> None:
        self.move({row: row for row in range(ROWS) if row not in gone})

    def move(self, places: dict[int, int]) -> None:
        """Rows are others now; those that have no place are gone."""
        moved = {
            places[source]: Item({places[r]: s for r, s in item.sums.items() if r in places}, item.clock, item.lost)
            for source, item in self.items.items()
            if source in places
        }
        self.items = {source: item for source, item in moved.items() if item.sums}

    def blend(self, history: list[int]) -> dict[int, float]:
        totals: dict[int, float] = {}
        share = 1.0
        for row in history:
            item = self.items.get(row, Item())
            for target, total in item.sums.items():
                totals[target] = totals.get(target, 0.0) + share * math.exp2(-item.clock / VISITS) * total
            share *= HISTORY_DISCOUNT
        return totals


def same(ours: CoVisits, plain: Plain, now_ms: int) -> None:
    """Counts are equal bit by bit, whoever reads them."""
    state, decay = ours.state(), plain.decay.decay(now_ms)
    assert state["sources"].tolist() == list(plain.items) and ours.num_pairs == plain.num_pairs
    assert state["lost"].tolist() == [plain.forgotten, *(item.lost for item in plain.items.values())]
    assert state["clocks"].tolist() == [item.clock for item in plain.items.values()]
    start = 0
    for size, item in zip(state["sizes"].tolist(), plain.items.values(), strict=True):
        pairs = zip(state["targets"][start : start + size], state["sums"][start : start + size], strict=True)
        assert dict(pairs) == item.sums
        start += size
    for history in ([0], [1, 2, 40], [3, 0, 1]):
        totals = plain.blend(history)
        scores = np.array([totals.get(row, 0.0) for row in EVERY.tolist()] * 2) * decay
        assert ours.score(history, np.tile(EVERY, 2), now_ms).tolist() == scores.astype(np.float32).tolist()
        for allowed in (None, EVERY % 3 != 1):
            rows, found = ours.candidates(history, 4, now_ms, allowed)
            shown = [row for row in totals if allowed is None or allowed[row]]
            order = sorted(shown, key=lambda row: (-totals[row], row))[:4]
            assert rows.tolist() == order
            assert found.tolist() == [float(np.float32(totals[row] * decay)) for row in order]
    for row in range(ROWS):
        item = plain.items.get(row, Item(lost=plain.forgotten))
        assert ours.error(row, now_ms) == item.lost * 2.0 ** (-item.clock / VISITS) * decay


STEPS = st.one_of(
    st.tuples(
        st.just("add"), st.lists(st.integers(-1, ROWS - 1), min_size=1, max_size=5), st.sampled_from([0, 1, 700])
    ),
    st.tuples(st.just("busy"), st.lists(st.integers(0, ROWS - 1), min_size=2, max_size=2), st.just(0)),
    st.tuples(st.just("forget"), st.lists(st.integers(0, ROWS - 1), max_size=3), st.just(0)),
    st.tuples(st.just("restore"), st.permutations(range(ROWS)), st.integers(0, ROWS)),
    st.tuples(st.just("alive"), st.lists(st.booleans(), max_size=ROWS), st.just(0)),
)


def moved(places: list[int], kept: int) -> tuple[Int32, dict[int, int]]:
    """Of the old rows the first `kept` have a place; as a map, and as a dict."""
    row_map = np.full(ROWS, -1, np.int32)
    row_map[:kept] = places[:kept]
    return row_map, dict(enumerate(places[:kept]))


@settings(max_examples=150, deadline=None)
@given(st.lists(STEPS, max_size=80), st.integers(1, 6), st.integers(0, 20), st.sampled_from([0.0, 0.2]))
def test_they_are_what_plain_dicts_would_be(steps: list[Any], neighbours: int, more: int, backward: float) -> None:
    def empty() -> CoVisits:
        return CoVisits(
            HALF_LIFE_S,
            backward,
            neighbours,
            half_life_visits=VISITS,
            discounts=DISCOUNTS,
            history_discount=HISTORY_DISCOUNT,
            max_pairs=max_pairs,
        )

    max_pairs, now_ms, alive = 4 * neighbours + more, 0, NOTHING
    ours, plain = empty(), Plain(neighbours, max_pairs, backward)
    for kind, values, number in steps:
        if kind == "add":
            now_ms += number * 3_600_000
            ours.add(abs(values[0]), values[1:], now_ms)
            plain.add(abs(values[0]), values[1:], now_ms)
        elif kind == "busy":  # an item's own clock goes round
            for _ in range(900):
                ours.add(values[0], values[1:], now_ms)
                plain.add(values[0], values[1:], now_ms)
        elif kind == "forget":
            ours.forget_rows(np.array(values, np.int32))
            plain.forget(values)
        elif kind == "alive":
            alive = plain.alive = np.array(values, np.bool_)
        else:
            row_map, places = moved(values, number)
            state, ours = ours.state(), empty()
            ours.restore(state, row_map)
            plain.move(places)
        ours.alive = lambda alive=alive: alive  # type: ignore[misc]
    same(ours, plain, now_ms)


def test_with_fewer_neighbours_than_were_saved_the_best_stay() -> None:
    wide, narrow = CoVisits(3600.0, neighbours=50), CoVisits(3600.0, neighbours=2)
    for row in range(1, 41):
        wide.add(row, [0], 0)
    narrow.restore(wide.state())
    assert narrow.candidates([0], 9, 0)[0].tolist() == [40, 39]
    missed = wide.score([0], np.array([38], np.int32), 0)[0]
    assert narrow.error(0, 0) >= missed * 0.999


def test_a_pair_takes_no_more_memory_than_is_reckoned_with() -> None:
    rng, covisits = np.random.default_rng(3), CoVisits(86_400.0, neighbours=20, max_pairs=20_000)
    taken: list[float] = []
    for turn, few in enumerate((3000, 300, 5000)):  # items of few pairs, of many, and of few again
        for step in range(6000):
            row, *before = rng.integers(few, size=4).tolist()
            covisits.add(row + 100 * turn, list(dict.fromkeys(before)), step * 1000)
        taken.append(sum(array.nbytes for array in covisits._pairs) / covisits.num_pairs)
    assert max(taken) < PAIR_BYTES, taken
