"""Trending and co-visits against plain float64 sums over all that was ever counted."""

from __future__ import annotations

import threading
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.retrieval.covisits import CoVisits
from recsys.retrieval.select import largest
from recsys.retrieval.shared_attributes import Followed
from recsys.retrieval.top_counts import Trending
from recsys.types import Int32

HOUR_MS = 3_600_000
START_MS = 1_700_000_000_000


def oracle(events: list[tuple[int, int]], now_ms: int, half_life_s: float) -> dict[int, float]:
    """Decayed count of each row, by definition."""
    counts: dict[int, float] = defaultdict(float)
    for row, at_ms in events:
        counts[row] += 2.0 ** ((at_ms - now_ms) / (half_life_s * 1000))
    return counts


def best(counts: dict[int, float], k: int) -> list[int]:
    return [row for row, _ in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:k]]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 40)), min_size=1, max_size=200),
    st.integers(1, 6),
)
def test_trending_top_is_exact_after_every_event_in_any_order(pairs: list[tuple[int, int]], top: int) -> None:
    # Whole half-lives, so that sums are exact and ties are real ties.
    trending = Trending(half_life_s=3600.0, top=top)
    events = [(row, START_MS + hours * HOUR_MS) for row, hours in pairs]
    for count in range(1, len(events) + 1):
        trending.add(*events[count - 1])
        rows, scores = trending.top(top, START_MS + 40 * HOUR_MS)
        expected = oracle(events[:count], START_MS + 40 * HOUR_MS, 3600.0)
        assert rows.tolist() == best(expected, top)
        np.testing.assert_allclose(scores, [expected[row] for row in rows.tolist()], rtol=1e-6)


def test_trending_stays_exact_over_rescales() -> None:
    trending = Trending(half_life_s=60.0, top=10)
    generator = np.random.default_rng(1)
    times = START_MS + np.sort(generator.integers(0, 3000 * 60_000, 4000))
    events = list(zip(generator.integers(0, 300, 4000).tolist(), times.tolist(), strict=True))
    for event in events:
        trending.add(*event)
    now_ms = events[-1][1]
    expected = oracle(events, now_ms, 60.0)
    rows, scores = trending.top(10, now_ms)
    assert rows.tolist() == best(expected, 10)
    np.testing.assert_allclose(scores, [expected[row] for row in rows.tolist()], rtol=1e-5)
    some = np.array([0, 1, 2, 5000], np.int32)
    np.testing.assert_allclose(
        trending.score(some, now_ms), [expected[0], expected[1], expected[2], 0.0], rtol=1e-5, atol=1e-30
    )


def test_trending_survives_a_jump_far_ahead_and_an_event_far_behind() -> None:
    trending = Trending(half_life_s=1.0, top=3)
    trending.add(1, 0)
    trending.add(2, START_MS)
    trending.add(3, 0)
    rows, scores = trending.top(3, START_MS)
    assert rows.tolist() == [2]
    assert scores.tolist() == [1.0]


def test_trending_score_halves_with_each_half_life_and_order_stays() -> None:
    trending = Trending(half_life_s=3600.0, top=3)
    for row in (7, 7, 5):
        trending.add(row, START_MS)
    assert trending.top(3, START_MS + HOUR_MS)[1].tolist() == [1.0, 0.5]
    assert trending.top(3, START_MS + 9999 * HOUR_MS)[0].tolist() == [7, 5]


def test_a_filter_does_not_starve_trending_or_covisits() -> None:
    trending, covisits = Trending(half_life_s=3600.0, top=5), CoVisits(3600.0, neighbours=100)
    for row in range(60):
        for _ in range(70 - row):
            trending.add(row, START_MS)
        covisits.add(row, [60], START_MS)
    allowed = np.zeros(50, np.bool_)
    allowed[3::7] = True
    assert trending.top(4, START_MS, allowed)[0].tolist() == [3, 10, 17, 24]
    assert trending.top(9, START_MS)[0].tolist() == list(range(9))
    assert covisits.candidates([60], 3, START_MS, allowed)[0].tolist() == [45, 38, 31]  # the latest weigh most
    nothing = np.zeros(0, np.bool_)
    assert trending.top(4, START_MS, nothing)[0].tolist() == []
    assert covisits.candidates([60], 3, START_MS, nothing)[0].tolist() == []


def test_trending_says_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="half_life_s"):
        Trending(half_life_s=0.0)
    assert Trending(half_life_s=1.0).top(5, 0)[0].tolist() == []


def test_restored_trending_answers_the_same_and_goes_on_the_same() -> None:
    generator = np.random.default_rng(2)
    first, second = Trending(100.0, 20), Trending(100.0, 20)
    for step in range(3000):
        first.add(int(generator.integers(0, 200)), START_MS + step * 50_000)
    second.restore(first.state())
    now_ms = START_MS + 3000 * 50_000
    for row in (3, 4, 3):
        first.add(row, now_ms)
        second.add(row, now_ms)
    for one, other in zip(first.top(20, now_ms), second.top(20, now_ms), strict=True):
        np.testing.assert_array_equal(one, other)


def test_restored_rows_are_mapped_and_gone_items_forgotten() -> None:
    trending, restored = Trending(100.0), Trending(100.0)
    covisits, again = CoVisits(100.0, backward=1.0), CoVisits(100.0, backward=1.0)
    for row in (0, 1, 1, 2, 2, 2):
        trending.add(row, START_MS)
    covisits.add(2, [1, 0], START_MS)
    row_map: Int32 = np.array([5, -1, 0], np.int32)
    restored.restore(trending.state(), row_map)
    again.restore(covisits.state(), row_map)
    assert restored.top(3, START_MS)[0].tolist() == [0, 5]
    assert again.candidates([0], 3, START_MS)[0].tolist() == [5]
    assert again.candidates([1], 3, START_MS)[0].tolist() == []
    assert again.num_pairs == 2
    empty = Trending(100.0)
    empty.restore(trending.state(), np.zeros(0, np.int32))
    assert empty.top(3, START_MS)[0].tolist() == []


def covisit_oracle(adds: list[tuple[int, list[int], int]], history: list[int], now_ms: int) -> dict[int, float]:
    """Half-life 1 h and 4 visits, backward .5, discounts 1, .5, history discount .25: from the definition."""
    visits: list[tuple[int, int, float, int]] = []
    for row, previous, at_ms in adds:
        for earlier, discount in zip(previous, (1.0, 0.5), strict=False):
            if earlier != row:
                visits += [(earlier, row, discount, at_ms), (row, earlier, discount * 0.5, at_ms)]
    scores: dict[int, float] = defaultdict(float)
    for position, source in enumerate(history):
        later = 0.0
        for visited, target, amount, at_ms in reversed(visits):
            if visited == source:
                scores[target] += 0.25**position * amount * 2.0 ** ((at_ms - now_ms) / HOUR_MS - later / 4.0)
                later += amount
    return scores


def test_covisits_are_the_decayed_sums_they_claim_to_be_over_rescales() -> None:
    covisits = CoVisits(3600.0, 0.5, 50, half_life_visits=4.0, discounts=(1.0, 0.5), history_discount=0.25)
    generator = np.random.default_rng(3)
    adds = [
        (int(row), generator.choice(12, 3, replace=False).tolist(), START_MS + step * HOUR_MS // 6)
        for step, row in enumerate(generator.integers(0, 12, 5000))
    ]
    for add in adds:
        covisits.add(*add)
    now_ms = adds[-1][2] + HOUR_MS
    expected = covisit_oracle(adds, [4, 2, 9], now_ms)
    rows, scores = covisits.candidates([4, 2, 9], 5, now_ms)
    assert rows.tolist() == best(expected, 5)
    np.testing.assert_allclose(scores, [expected[row] for row in rows.tolist()], rtol=1e-5)
    wanted = np.array([3, 99, 7], np.int32)
    np.testing.assert_allclose(covisits.score([4, 2, 9], wanted, now_ms), [expected[3], 0.0, expected[7]], rtol=1e-5)


def test_covisits_keep_the_largest_neighbours_and_bound_all_pairs() -> None:
    covisits = CoVisits(1e6, 0.0, 5, half_life_visits=1e9, max_pairs=20)
    for neighbour in range(100, 109):
        for _ in range(neighbour - 98):
            covisits.add(neighbour, [1], START_MS)
    covisits.add(50, [1], START_MS)
    assert covisits.num_pairs == 5
    assert covisits.candidates([1], 9, START_MS)[0].tolist() == [108, 107, 106, 105, 104]
    for source in range(1000, 1030):
        covisits.add(7, [source], START_MS)
    assert covisits.num_pairs == 20
    assert covisits.candidates([1], 9, START_MS)[0].tolist() == []
    assert covisits.candidates([1029, 1028], 9, START_MS)[0].tolist() == [7]


def test_covisits_break_ties_by_row() -> None:
    covisits = CoVisits(3600.0, 0.0, history_discount=1.0)
    for row in (9, 3, 6):
        covisits.add(row, [row + 10], START_MS)
    assert covisits.candidates([19, 13, 16], 2, START_MS)[0].tolist() == [3, 6]


def test_restored_covisits_answer_the_same_and_go_on_the_same() -> None:
    generator = np.random.default_rng(4)
    first, second = CoVisits(60.0, neighbours=4, max_pairs=60), CoVisits(60.0, neighbours=4, max_pairs=60)
    for step in range(2000):
        first.add(
            int(generator.integers(0, 40)), generator.choice(40, 3, replace=False).tolist(), START_MS + step * 30_000
        )
    second.restore(first.state())
    for step in range(2000, 2100):
        event = (
            int(generator.integers(0, 40)),
            generator.choice(40, 3, replace=False).tolist(),
            START_MS + step * 30_000,
        )
        first.add(*event)
        second.add(*event)
    now_ms = START_MS + 2100 * 30_000
    assert first.num_pairs == second.num_pairs
    for row in range(40):
        for one, other in zip(
            first.candidates([row, 1], 10, now_ms), second.candidates([row, 1], 10, now_ms), strict=True
        ):
            np.testing.assert_array_equal(one, other)


def test_readers_beside_the_writer_see_ordered_answers() -> None:
    trending, covisits = Trending(1.0, 20), CoVisits(1.0, neighbours=5)
    done, wrong = threading.Event(), []

    def read() -> None:
        while not done.is_set():
            for _, scores in (trending.top(20, START_MS), covisits.candidates([1, 2], 20, START_MS)):
                if (np.diff(scores) > 0).any():
                    wrong.append(scores)

    reader = threading.Thread(target=read)
    reader.start()
    for step in range(20_000):
        row = step * 7919 % (step // 4 + 5)
        trending.add(row, START_MS + step)
        covisits.add(row, [step % 5], START_MS + step)
    done.set()
    reader.join()
    assert not wrong


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7), st.integers(0, 20)), min_size=1, max_size=250),
    st.integers(1, 3),
    st.integers(0, 12),
)
def test_bounded_covisits_err_by_no_more_than_they_say(
    events: list[tuple[int, int, int]], neighbours: int, more_pairs: int
) -> None:
    def empty() -> CoVisits:
        return CoVisits(86_400.0, neighbours=neighbours, half_life_visits=20.0, max_pairs=4 * neighbours + more_pairs)

    bounded = empty()
    exact = CoVisits(86_400.0, neighbours=100, half_life_visits=20.0)
    now_ms = START_MS
    every = np.arange(8, dtype=np.int32)
    for count, (row, before, hours) in enumerate(events):
        now_ms += hours * HOUR_MS
        bounded.add(row, [before], now_ms)
        exact.add(row, [before], now_ms)
        assert bounded.num_pairs <= 4 * neighbours + more_pairs
        if count == len(events) // 2:  # the statement holds over a restart
            state, bounded = bounded.state(), empty()
            bounded.restore(state)
    for source in range(8):
        found, truth = (c.score([source], every, now_ms).astype(np.float64) for c in (bounded, exact))
        slack = 1e-6 * (1.0 + truth.max())
        assert (found <= truth + slack).all()
        assert (truth <= found + bounded.error(source, now_ms) + slack).all()
        assert exact.error(source, now_ms) == 0.0


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 400), st.integers(1, 3)), min_size=1, max_size=400), st.integers(1, 40))
def test_followed_is_exact_up_to_its_bound(notes: list[tuple[int, int]], k: int) -> None:
    followed, counts = Followed(), np.zeros(401)
    for row in range(401):
        followed.upsert(row, [[1]])
    for row, times in notes:
        for _ in range(times):
            followed.note(row)
            counts[row] += 1
    popular = best({row: c for row, c in enumerate(counts.tolist()) if c}, k)
    ranked = followed.query([(0, 1, 1.0)], 1000)[0].tolist()
    assert set(popular) <= set(ranked)


def test_followed_sorts_anew_once_a_fiftieth_of_its_items_was_noted() -> None:
    followed, count = Followed(), 200
    for row in range(count):
        followed.upsert(row, [[1]])
        followed.note(row)
    assert followed.query([(0, 1, 1.0)], 1)[0].tolist() == [count - 1]
    for _ in range(count // 50 + 1):
        followed.note(150)
    assert followed.query([(0, 1, 1.0)], 1)[0].tolist() == [150]


@given(st.lists(st.integers(0, 5), max_size=40), st.integers(0, 45))
def test_largest_is_a_stable_sort_cut_short(values: list[int], k: int) -> None:
    given_values = np.array(values, np.float32)
    np.testing.assert_array_equal(largest(given_values, k), np.argsort(-given_values, kind="stable")[:k])


def test_of_a_value_that_nobody_asks_for_no_notes_pile_up() -> None:
    followed = Followed()
    for row in range(900):
        followed.upsert(row, [[7]])
    for row in [*range(900), *range(900)]:
        followed.note(row)
    value = followed._filed.get((0, 7))
    assert value is not None and len(value.popular) <= 400 and len(value.added) <= 400
    assert len(followed.query([(0, 7, 1.0)], 5)[0]) == 5 and not value.added
