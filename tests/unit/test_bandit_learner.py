"""The bandit's learner: sums as by hand, each reward once, in any order; clusters split and dropped with their edges."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.bandit.clusters import Drop, Split
from recsys.bandit.served import Served, decode
from recsys.config import Config, parse
from recsys.errors import BadInput
from recsys.keys import key_of
from recsys.model.layouts import edges
from recsys.table.base import Layout, Table
from recsys.table.cpu import CpuTable
from recsys.table.cuda import CudaTable
from recsys.table.reference import ReferenceTable
from recsys.table.segments import shard_of
from recsys.training.bandit_learner import BanditLearner
from recsys.types import Feedback, Float32, Impression, Int32, Int64, ShownItem
from tests.table_cuda import COMPILED, cuda_table

DIM = 4
T0 = 1_000_000_000


def config(**bandit: Any) -> Config:
    return parse(
        {
            "model": {"tower_dim": DIM},
            "retrieval": {"sources": {"bandit": 10}},
            "table": {"capacity": 5000},
            "bandit": {"clusters": 8, "half_life_s": 0, "reward_window_s": 60} | bandit,
        }
    )


Make = Callable[..., BanditLearner]
"""A learner with these options of the bandit."""


def made_with(table: Callable[[Layout], Table]) -> Make:
    def make(**bandit: Any) -> BanditLearner:
        settings = config(**bandit)
        return BanditLearner(settings, {"edge": table(edges(settings.bandit, 5000))})

    return make


@pytest.fixture(params=[CpuTable, ReferenceTable, cuda_table], scope="module")
def learner(request: pytest.FixtureRequest) -> Make:
    return made_with(request.param)


def shown(
    request: str, items: Sequence[str], clusters: Sequence[int], weights: Sequence[float], bits: Sequence[int]
) -> Impression:
    served = Served(
        generation="g1",
        clusters=np.array(clusters, np.int64),
        weights=np.array(weights, np.float32),
        vector=np.ones(DIM, np.float32),
        edges=np.array(bits, np.uint64),
    )
    return Impression(
        request_id=request,
        user_id="u",
        time_ms=0,
        items=tuple(ShownItem(item_id=i, position=n) for n, i in enumerate(items, start=1)),
        bandit=served.encode(),
    )


def show(
    bandit: BanditLearner, impression: Impression, now_ms: int = T0, early: Sequence[tuple[int, Feedback]] = ()
) -> None:
    """`early`: feedback read before it, with its log times."""
    served = bandit.served(impression)
    assert served is not None
    bandit.impression(impression, served, now_ms, early)


def act(request: str | None, item: str, kind: str = "click") -> Feedback:
    return Feedback(event_id="e", user_id="u", item_id=item, type=kind, time_ms=0, request_id=request)


def sums(bandit: BanditLearner, place: int, item: str) -> list[float]:
    """d, n, b of an edge."""
    values, _ = bandit.edges.table.lookup(np.array([place], np.int32), np.array([key_of(item)]))
    return [float(v) for v in values[0]]


def three_clusters(bandit: BanditLearner) -> None:
    """Clusters 0, 1, 2 at places 0, 1, 2."""
    state = bandit.clusters.state()
    for name in ("sums", "weights", "mass"):
        state[name] = np.repeat(state[name], 3, 0)
    state |= {"ids": np.arange(3), "places": np.arange(3, dtype=np.int32), "counts": np.array([3, 0, 0])}
    bandit.clusters.restore(state)


def test_an_impression_adds_squares_and_weights_and_a_reward_adds_its_weight(learner: Make) -> None:
    bandit = learner()
    three_clusters(bandit)
    show(bandit, shown("r", ["a", "b", "c"], [2, 0, 1], [0.5, 0.3, 0.2], [0b111, 0b010, 0]))
    bandit.feedback(act("r", "a"), T0 + 5)
    bandit.step(T0 + 10, learn=True)
    assert sums(bandit, 2, "a") == pytest.approx([0.25, 0.5, 0.5])
    assert sums(bandit, 0, "a") == pytest.approx([0.09, 0.3, 0.3])
    assert sums(bandit, 1, "a") == pytest.approx([0.04, 0.2, 0.2])
    assert sums(bandit, 0, "b") == pytest.approx([0.09, 0.3, 0.0])
    assert sums(bandit, 1, "b") == [0, 0, 0], "no edge, no sums"
    assert len(bandit.edges.table) == 4 and bandit.take_outcomes() == ["rewarded"]


def test_each_item_of_a_request_is_rewarded_once_and_only_where_it_was_shown_in_time(learner: Make) -> None:
    bandit = learner()
    show(bandit, shown("r", ["a", "b", "c"], [0], [1.0], [1, 1, 0]))
    show(bandit, shown("r", ["a", "b", "c"], [0], [1.0], [1, 1, 0]))  # a duplicate
    for request, item, kind, after_ms in [
        ("r", "a", "click", 1),
        ("r", "a", "like", 2),  # duplicate
        ("r", "b", "rating", 3),  # no reward
        ("r", "c", "click", 4),  # no edge
        (None, "a", "click", 5),  # of no request
        ("r", "b", "click", 60_001),  # too late
        ("other", "b", "click", 60_002),  # never shown
    ]:
        bandit.feedback(act(request, item, kind), T0 + after_ms)
    bandit.step(T0 + 60_003, learn=True)
    assert sums(bandit, 0, "a") == [1, 1, 1] and sums(bandit, 0, "b") == [1, 1, 0]
    bandit.feedback(act("r", "b"), T0 + 60_004)
    bandit.step(T0 + 200_000, learn=True)
    outcomes = ["rewarded", "duplicate", "no_edge", "too_late", "no_impression", "too_late"]
    assert bandit.take_outcomes() == outcomes
    assert sums(bandit, 0, "b") == [1, 1, 0]


def test_a_reward_ahead_of_its_impression_waits_for_it(learner: Make) -> None:
    bandit = learner()
    show(bandit, shown("r", ["a"], [0], [1.0], [1]), T0 + 2, [(T0, act("r", "a"))])
    bandit.step(T0 + 3, learn=True)
    assert sums(bandit, 0, "a") == [1, 1, 1] and bandit.take_outcomes() == ["rewarded"]


def test_a_reward_read_before_its_impression_is_late_by_its_own_time(learner: Make) -> None:
    bandit = learner()
    early = [(T0 + 60_000, act("r", "a")), (T0 + 60_001, act("r", "b"))]
    show(bandit, shown("r", ["a", "b"], [0], [1.0], [1, 1]), T0, early)
    assert bandit.take_outcomes() == ["rewarded", "too_late"]


def test_deferred_items_count_once_viewed(learner: Make) -> None:
    bandit = learner()
    show(bandit, replace(shown("r", ["a", "b"], [0], [0.5], [1, 1]), activation="deferred"))
    bandit.feedback(act("r", "a"), T0 + 1)
    bandit.step(T0 + 2, learn=True)
    assert len(bandit.edges.table) == 0, "rewarded, but it does not count as shown yet"
    bandit.feedback(act("r", "a", "view"), T0 + 3)
    bandit.feedback(act("r", "a", "view"), T0 + 4)
    bandit.step(T0 + 5, learn=True)
    assert sums(bandit, 0, "a") == [0.25, 0.5, 0.5] and sums(bandit, 0, "b") == [0, 0, 0]


def test_a_cluster_that_is_gone_is_ignored(learner: Make) -> None:
    bandit = learner()
    show(bandit, shown("r", ["a"], [99, 0], [0.75, 0.25], [0b11]))
    bandit.step(T0, learn=True)
    assert len(bandit.edges.table) == 1 and sums(bandit, 0, "a") == [0.0625, 0.25, 0]


def test_nothing_is_added_while_learning_is_skipped(learner: Make) -> None:
    bandit = learner()
    show(bandit, shown("r", ["a"], [0], [1.0], [1]))
    bandit.step(T0, learn=False)
    bandit.step(T0 + 1, learn=True)
    assert len(bandit.edges.table) == 0


def test_forgetting_keeps_means_and_halves_what_counts(learner: Make) -> None:
    """Each half-life, what is known weighs half; the mean stays, and a late reward weighs as much as its impression."""
    bandit = learner(half_life_s=1.0)
    interpreted = isinstance(bandit.edges.table, CudaTable) and not COMPILED
    times, apart = (
        (20, 10.0) if interpreted else (400, 0.5)
    )  # 200 half-lives: more than float32 holds without rescaling
    for number in range(times):
        now = T0 + int(1000 * apart) * number
        show(bandit, shown(f"r{number}", ["a"], [0], [0.5], [1]), now)
        if number % 4 == 0:
            bandit.feedback(act(f"r{number}", "a"), now + 400)
        bandit.step(now + 400, learn=True)
    d, n, b = sums(bandit, 0, "a")
    assert bandit.edges.decay is not None
    factor = bandit.edges.decay.decay(now + 400)
    ages = 0.4 + apart * np.arange(times - 1, -1, -1.0)
    weights = 0.5**ages
    assert n * factor == pytest.approx(0.5 * weights.sum(), rel=1e-5)
    assert d * factor == pytest.approx(0.25 * weights.sum(), rel=1e-5)
    assert b * factor == pytest.approx(0.5 * weights[::4].sum(), rel=1e-5)
    assert bandit.moved, "serving must hear of the new scale"


def test_a_split_halves_every_edge_of_the_parent_and_a_drop_removes_them(learner: Make) -> None:
    bandit = learner()
    three_clusters(bandit)
    show(bandit, shown("r", ["a", "b"], [0, 1], [0.5, 0.25], [0b11, 0b01]))
    bandit.feedback(act("r", "b"), T0)
    bandit.step(T0, learn=True)
    bandit._follow(Split(parent=0, child=5))
    for place in (0, 5):
        assert sums(bandit, place, "a") == [0.125, 0.25, 0] and sums(bandit, place, "b") == [0.125, 0.25, 0.25]
    assert sums(bandit, 1, "a") == [0.0625, 0.25, 0]
    seen = bandit.edges.table.export(np.array([5], np.int32), np.array([key_of("a")])).last_seen_ms
    assert seen[0] == T0, "a split does not make an edge look as if it was shown"
    bandit._follow(Drop(place=0))
    assert sums(bandit, 0, "a") == [0, 0, 0] and len(bandit.edges.table) == 3


EVENTS = st.lists(
    st.tuples(
        st.integers(0, 4),  # item
        st.lists(st.floats(2**-7, 1.0, width=32), min_size=3, max_size=3),
        st.integers(1, 7),
        st.booleans(),
    ),
    min_size=1,
    max_size=40,
)


def collected(make: Make, events: Sequence[Any], order: Sequence[int], cuts: set[int], workers: int) -> Float32:
    """Sums [3 places, 5 items, 3] after the impressions and rewards in this order, a step after each cut; by so many workers,
    each with the edges that are its own."""
    total = np.zeros((3, 5, 3), np.float32)
    slots, keys = (a.ravel() for a in np.meshgrid(np.arange(3, dtype=np.int32), np.arange(5), indexing="ij"))
    for worker in range(workers):
        bandit = make()
        three_clusters(bandit)
        mine = shard_of(slots, keys, workers) == worker
        for number, index in enumerate(order):
            item, weights, bits, rewarded = events[index]
            for edge in range(3):
                if not mine[(slots == edge) & (keys == item)][0]:
                    bits &= ~(1 << edge)
            show(bandit, shown(f"r{index}", [str(item)], [0, 1, 2], weights, [bits]))
            if rewarded:
                bandit.feedback(act(f"r{index}", str(item)), T0)
            if number in cuts:
                bandit.step(T0, learn=True)
        bandit.step(T0, learn=True)
        total += bandit.edges.table.lookup(slots, keys)[0].reshape(3, 5, 3)
    return total


def agree(make: Make, events: Sequence[Any], order: Sequence[int], cuts: set[int]) -> None:
    """Within float32's rounding of each addition: half an ulp each."""
    expected = np.zeros((3, 5, 3))
    for item, weights, bits, rewarded in events:
        for edge in range(3):
            if bits >> edge & 1:
                w = float(np.float32(weights[edge]))
                expected[edge, item] += (w * w, w, w * rewarded)
    for workers in (1, 3):
        found = collected(make, events, order, cuts, workers)
        np.testing.assert_allclose(found, expected, rtol=len(events) * 2**-24)


@pytest.mark.parametrize("table", [CpuTable, ReferenceTable])
@given(events=EVENTS, data=st.data())
@settings(deadline=None, max_examples=30)
def test_sums_do_not_depend_on_order_batch_or_number_of_workers(
    table: type[Table], events: Sequence[Any], data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(len(events))))
    agree(made_with(table), events, order, data.draw(st.sets(st.integers(0, len(events) - 1))))


def test_sums_are_the_same_in_every_table(learner: Make) -> None:
    events = [(n % 5, [0.25, 0.5, 1 / (n + 1)], n % 7 + 1, n % 3 == 0) for n in range(20)]
    agree(learner, events, range(20), {4, 11})


def test_a_step_is_one_update_with_the_bits_of_one_for_what_was_shown_and_one_for_rewards(
    learner: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def apart(slots: Int32, keys: Int64, each: Float32, now_ms: int) -> None:
        shown = each[:, 1] > 0
        for part in (lambda: shown, lambda: old.edges.table.lookup(slots, keys)[1] & ~shown):
            chosen = part()
            old.edges.table.lookup_train(slots[chosen], keys[chosen], now_ms)
            old.edges.table.apply_gradients(slots[chosen], keys[chosen], -each[chosen], now_ms)

    bandit, old = learner(half_life_s=30), learner(half_life_s=30)
    old.edges.add = apart  # type: ignore[method-assign]
    calls: list[str] = []
    for name in ("lookup_train", "apply_gradients"):
        verb = getattr(bandit.edges.table, name)
        monkeypatch.setattr(
            bandit.edges.table, name, lambda *given, name=name, verb=verb: (calls.append(name), verb(*given))[1]
        )
    rng = np.random.default_rng(3)
    for one in (bandit, old):
        three_clusters(one)
    for step in range(12):
        requests = [(rng.integers(0, 9, 4), rng.random(3), rng.integers(0, 8, 4)) for _ in range(rng.integers(1, 9))]
        late = rng.integers(0, 9, (20, 2))
        for one in (bandit, old):
            now = T0 + 1000 * step
            for n, (items, weights, bits) in enumerate(requests):
                show(one, shown(f"{step}.{n}", [str(i) for i in items], [2, 0, 1], list(weights), list(bits)), now)
            for n, item in late:
                one.feedback(act(f"{step - 1}.{n}" if item % 2 else f"{step}.{n}", str(item)), now)
            one.step(now, learn=True)
            one.edges.table.remove(np.zeros(1, np.int32), np.array([key_of(str(step % 9))]))
        assert calls.count("lookup_train") == calls.count("apply_gradients") == 1
        calls.clear()
    mine, theirs = bandit.edges.rows(), old.edges.rows()
    order, other = np.lexsort((mine.keys, mine.slots)), np.lexsort((theirs.keys, theirs.slots))
    assert len(mine.keys) > 15 and mine.values[:, 2].any()
    for name in (
        "slots",
        "keys",
        "values",
        "last_seen_ms",
    ):  # `uses` of what was shown and rewarded at once: one, not two
        np.testing.assert_array_equal(getattr(mine, name)[order], getattr(theirs, name)[other], err_msg=name)


def test_a_restored_learner_goes_on_as_the_one_saved(learner: Make) -> None:
    bandit = learner(half_life_s=100.0)
    show(bandit, shown("r", ["a", "b"], [0], [0.5], [1, 1]))
    show(bandit, shown("none", ["a"], [0], [0.5], [0]))
    bandit.feedback(act("r", "a"), T0)
    bandit.step(T0, learn=True)
    other = learner(half_life_s=100.0)
    other.restore(bandit.state())
    other.edges.table.restore(bandit.edges.rows())
    for one in (bandit, other):
        one.feedback(act("r", "a"), T0 + 1)
        one.feedback(act("r", "b"), T0 + 1)
        show(one, shown("early", ["b"], [0], [0.25], [1]), T0 + 2, [(T0, act("early", "b"))])
        one.step(T0 + 3, learn=True)
    assert sums(bandit, 0, "b") == sums(other, 0, "b") and sums(bandit, 0, "b")[2] > 0.7
    for name, array in bandit.state().items():
        np.testing.assert_array_equal(other.state()[name], array, err_msg=name)


def test_a_reward_of_an_edge_that_made_room_since_does_not_bring_it_back_alone(learner: Make) -> None:
    bandit = learner()
    show(bandit, shown("r", ["a", "b"], [0], [0.5], [1, 1]))
    bandit.step(T0, learn=True)
    bandit.edges.table.remove(np.zeros(1, np.int32), np.array([key_of("a")]))
    for item in ("a", "b"):
        bandit.feedback(act("r", item), T0 + 1)
    bandit.step(T0 + 1, learn=True)
    assert sums(bandit, 0, "a") == [0, 0, 0] and sums(bandit, 0, "b") == [0.25, 0.5, 0.5]
    show(bandit, shown("again", ["a"], [0], [0.5], [1]), T0 + 2)
    bandit.feedback(act("again", "a"), T0 + 2)
    bandit.step(T0 + 3, learn=True)
    assert sums(bandit, 0, "a") == [0.25, 0.5, 0.5]


def test_a_full_table_of_edges_makes_room_and_never_teaches_edges_that_are_not_there() -> None:
    for kind in (CpuTable, ReferenceTable):
        bandit = made_with(lambda layout: kind(replace(layout, capacity=40, spare=0.1)))()  # noqa: B023
        for n in range(30):
            items = [f"{n}-{i}" for i in range(5 if n < 29 else 60)]
            show(bandit, shown(f"r{n}", items, [0], [0.5], [1] * len(items)), T0 + 8000 * n)
            bandit.feedback(act(f"r{n}", items[0]), T0 + 8000 * n)
            bandit.step(T0 + 8000 * n, learn=True)
            assert sums(bandit, 0, items[0]) == [0.25, 0.5, 0.5] and len(bandit.edges.table) <= 40
        assert sums(bandit, 0, "29-59") == [0, 0, 0] and not bandit.edges.table.defaults().values.any()
        bandit._follow(Split(parent=0, child=1))
        assert 20 <= len(bandit.edges.table) <= 40 and not bandit.edges.table.defaults().values.any()


def test_what_was_served_is_read_back() -> None:
    impression = shown("r", ["a", "b"], [3, 2**40], [0.75, 0.25], [0b10, 0b11])
    served = decode(impression.bandit, 2)
    assert (served.generation, served.clusters.tolist(), served.weights.tolist()) == ("g1", [3, 2**40], [0.75, 0.25])
    assert served.edges.tolist() == [2, 3] and served.vector.tolist() == [1.0] * DIM


@pytest.mark.parametrize(
    ("data", "items", "reason"),
    [
        (b"\x02" * 20, 1, "version"),
        (b"", 1, "version"),
        (shown("r", ["a"], [0], [1.0], [1]).bandit[:-1], 1, "cut or padded"),
        (shown("r", ["a"], [0], [1.0], [1]).bandit, 2, "shows 2"),
        (shown("r", ["a"], [0, 0], [0.5, 0.5], [1]).bandit, 1, "twice"),
        (shown("r", ["a"], [0], [1.5], [1]).bandit, 1, "weights"),
        (shown("r", ["a"], [0], [1.0], [2]).bandit, 1, "not active"),
        (shown("r", ["a"], [], [], [0]).bandit, 1, "0 active"),
    ],
)
def test_what_cannot_be_is_refused(data: bytes, items: int, reason: str) -> None:
    with pytest.raises(BadInput, match=reason):
        decode(data, items)


def test_a_vector_of_another_width_is_refused(learner: Make) -> None:
    impression = shown("r", ["a"], [0], [1.0], [1])
    other = replace(decode(impression.bandit, 1), vector=np.ones(DIM + 1, np.float32))
    with pytest.raises(BadInput, match="tower_dim"):
        learner().served(replace(impression, bandit=other.encode()))


@pytest.mark.parametrize(("before_s", "after_s"), [(100.0, 10.0), (10.0, 1000.0), (10.0, 0.0), (0.0, 10.0)])
def test_another_half_life_keeps_what_the_sums_are_as_of_the_last_step(before_s: float, after_s: float) -> None:
    learner = made_with(CpuTable)
    saved, loaded = learner(half_life_s=before_s), learner(half_life_s=after_s)
    for number in range(4):
        show(saved, shown(f"r{number}", ["a"], [0], [0.5], [1]), T0 + 5000 * number)
    last = T0 + 20_000
    saved.step(last, learn=True)
    loaded.edges.table.restore(saved.edges.rows())
    loaded.restore(saved.state())
    show(loaded, shown("r", ["b"], [0], [1.0], [1]), last)
    loaded.step(last, learn=True)

    def as_of(bandit: BanditLearner, item: str, now_ms: int) -> list[float]:
        scale = 1.0 if bandit.edges.decay is None else bandit.edges.decay.decay(now_ms)
        return [value * scale for value in sums(bandit, 0, item)]

    assert as_of(loaded, "a", last) == pytest.approx(as_of(saved, "a", last), rel=1e-4)
    assert as_of(loaded, "b", last) == pytest.approx([1, 1, 0], rel=1e-4)
    left = 0.5 if after_s else 1.0
    later = last + int(after_s * 1000)
    assert as_of(loaded, "a", later) == pytest.approx([v * left for v in as_of(saved, "a", last)], rel=1e-4)
    assert loaded.published()["half_life_s"].tolist() == [after_s], "serving reads the sums by it"


def test_edges_that_hold_no_counts_begin_anew() -> None:
    learner = made_with(CpuTable)
    saved, loaded = learner(half_life_s=100.0), learner(half_life_s=100.0)
    show(saved, shown("r", ["a", "b"], [0], [1.0], [1, 1]))
    saved.step(T0, learn=True)
    rows = saved.edges.rows()
    rows.values[rows.keys == key_of("a")] = np.inf
    loaded.edges.table.restore(rows)
    loaded.restore(saved.state())
    assert sums(loaded, 0, "a") == [0, 0, 0] and sums(loaded, 0, "b") == [1, 1, 0]


def test_where_there_is_no_room_for_open_impressions_new_ones_neither_count_as_shown_nor_are_rewarded(
    learner: Make,
) -> None:
    bandit = learner()
    show(bandit, shown("r", ["a"], [0], [1.0], [1]))
    bandit.opened.limit_bytes = bandit.opened._bytes  # the room that this one takes
    show(bandit, shown("s", ["b"], [0], [1.0], [1]), T0, [(T0, act("s", "b"))])
    bandit.feedback(act("r", "a"), T0 + 1)
    bandit.step(T0 + 2, learn=True)
    assert sums(bandit, 0, "a") == [1, 1, 1] and sums(bandit, 0, "b") == [0, 0, 0]
    assert bandit.take_outcomes() == ["no_room", "rewarded"] and bandit.opened.full_ratio == 1
    bandit.step(T0 + 200_000, learn=True)
    show(bandit, shown("t", ["b"], [0], [1.0], [1]), T0 + 200_001)
    bandit.step(T0 + 200_002, learn=True)
    assert sums(bandit, 0, "b")[1] > 0
