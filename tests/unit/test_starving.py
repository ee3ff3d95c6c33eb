"""What is dead, filtered out or left out is skipped in the search: it never starves what may be shown."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.retrieval.covisits import CoVisits
from recsys.retrieval.shared_attributes import Followed
from recsys.retrieval.top_counts import Trending
from recsys.retrieval.transitions import Transitions
from recsys.types import Int32

T0 = 1_700_000_000_000


def rows(*chosen: int) -> Int32:
    return np.array(chosen, np.int32)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.integers(0, 40), st.sampled_from(["add", "add", "add", "bury", "revive", "forget"])), max_size=150
    ),
    st.sets(st.integers(0, 40), max_size=20),
    st.integers(1, 6),
)
def test_trending_is_exact_among_the_living_whatever_died_and_came_back(
    steps: list[tuple[int, str]], left_out: set[int], k: int
) -> None:
    trending, counts, dead = Trending(3600.0, top=4), dict.fromkeys(range(41), 0), set()
    for number, (row, what) in enumerate(steps):
        if what == "add":
            trending.add(row, T0)
            counts[row] += 1
        elif what == "bury":
            trending.bury(rows(row))
            dead.add(row)
        elif what == "revive":
            trending.revive(row)
            dead.discard(row)
        else:
            trending.forget_rows(rows(row))
            counts[row] = 0
            dead.discard(row)
        if number == len(steps) // 2:
            again = Trending(3600.0, top=4)
            again.restore(trending.state())
            again.bury(rows(*sorted(dead)))
            trending = again
        alive = [r for r in counts if counts[r] and r not in dead and r not in left_out]
        found, scores = trending.top(k, T0, None, rows(*left_out))
        assert found.tolist() == sorted(alive, key=lambda r: (-counts[r], r))[:k]
        assert scores.tolist() == [counts[r] for r in found.tolist()]


def test_deleting_the_hottest_lets_the_next_lead_and_looks_at_all_rows_rarely() -> None:
    trending = Trending(3600.0, top=100)
    for row in range(5000):
        trending.add(row, T0, 5000.0 - row)
    looked = 0
    resize = trending._resize

    def counted(sums: np.ndarray) -> None:  # type: ignore[type-arg]
        nonlocal looked
        looked += 1
        resize(sums)

    trending._resize = counted  # type: ignore[method-assign]
    for row in range(1000):
        trending.bury(rows(row))
        assert trending.top(20, T0)[0].tolist() == list(range(row + 1, row + 21))
    assert looked <= 20


def test_dead_neighbours_make_room_for_those_alive() -> None:
    covisits = CoVisits(3600.0, 0.0, 10)
    for row in range(1, 19):
        for _ in range(5):
            covisits.add(row, [0], T0)
    alive = np.arange(100) >= 19
    covisits.alive = lambda: alive
    for row in range(20, 28):
        covisits.add(row, [0], T0)
    assert {*covisits.candidates([0], 5, T0, alive)[0].tolist()} <= {*range(20, 28)}
    assert {*covisits.candidates([0], 50, T0, alive)[0].tolist()} >= {*range(20, 27)}


def test_transitions_to_what_is_not_allowed_are_walked_past() -> None:
    transitions, context = Transitions(1, length=20), np.zeros(1, np.int64)
    transitions.add(0, 1, context)
    for _ in range(60):
        transitions.add(0, 2, context)
    allowed = np.arange(5) != 2
    assert transitions.candidates(0, context, 5, allowed)[0].tolist() == [1]
    assert transitions.candidates(0, context, 5)[0].tolist() == [2]


def filled(count: int) -> Followed:
    followed = Followed()
    for row in range(count):
        followed.upsert(row, [[1]])
    for row in range(count):
        followed.note(row, 1 + count - row)
    return followed


def test_followed_finds_the_next_best_where_the_popular_were_deleted() -> None:
    followed = filled(3000)
    for row in range(2000):
        followed.delete(row)
    found, _ = followed.query([(0, 1, 1.0)], 100)
    assert len(found) == 100 and {*range(2000, 2060)} <= {*found.tolist()}


def test_followed_finds_what_passes_where_what_is_popular_does_not() -> None:
    followed, count = filled(3000), 3000
    allowed = (np.arange(count) >= 1000) & (np.arange(count) < 2500)
    assert sorted(followed.query([(0, 1, 1.0)], 100, allowed)[0].tolist()) == list(range(1000, 1100))
    narrow = np.zeros(count, np.bool_)
    narrow[1500:1510] = True
    assert sorted(followed.query([(0, 1, 1.0)], 100, narrow)[0].tolist()) == list(range(1500, 1510))
    left_out = rows(*range(1000), *range(2500, count))
    assert sorted(followed.query([(0, 1, 1.0)], 100, None, left_out)[0].tolist()) == list(range(1000, 1100))
