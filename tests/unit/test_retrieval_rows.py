"""What sources keep by row is gone when the row becomes another item's."""

from __future__ import annotations

import numpy as np

from recsys.retrieval.covisits import CoVisits
from recsys.retrieval.factors import Factors
from recsys.retrieval.item_index import ItemIndex
from recsys.retrieval.searcher import Searcher
from recsys.retrieval.shared_attributes import Followed
from recsys.retrieval.top_counts import Trending
from recsys.retrieval.transitions import Transitions

GONE = np.array([1, 3], np.int32)
EVERY = np.arange(6, dtype=np.int32)


def test_trending_has_the_next_largest() -> None:
    trending = Trending(3600, top=2)
    for row in range(6):
        trending.add(row, 0, weight=10.0 - row)
    trending.forget_rows(GONE)
    assert [trending.top(k, 0)[0].tolist() for k in (2, 4, 6)] == [[0, 2], [0, 2, 4, 5], [0, 2, 4, 5]]
    assert trending.score(EVERY, 0).tolist() == [10, 0, 8, 0, 6, 5]
    trending.add(3, 0, weight=0.5)  # another item
    assert trending.score(GONE, 0).tolist() == [0, 0.5]


def test_covisits_have_no_pairs_with_it() -> None:
    covisits = CoVisits(3600)
    for row in (1, 2, 4):
        covisits.add(row, [3, 0], 0)
    covisits.forget_rows(GONE)
    assert sorted(covisits.candidates([0], 10, 0)[0].tolist()) == [2, 4]
    assert not len(covisits.candidates([3], 10, 0)[0]) and covisits.num_pairs == 4


def test_followed_popularity_begins_anew() -> None:
    followed = Followed()
    for row in range(4):
        followed.upsert(row, [[7]])
    followed.note(3, 50.0)
    followed.note(2, 5.0)
    followed.delete(3)
    followed.forget_rows(np.array([3], np.int32))
    followed.upsert(3, [[7]])
    for row in (2, 3):
        followed.note(row)
    assert followed.query([(0, 7, 1.0)], 1)[0].tolist() == [2]


def test_transitions_neither_lead_from_nor_to_it() -> None:
    transitions, context = Transitions(1), np.ones(1, np.int64)
    for source, target in ((0, 1), (0, 2), (3, 2), (0, 3), (0, 4)):
        transitions.add(source, target, context)
    transitions.forget_rows(GONE)
    assert sorted(transitions.candidates(0, context, 10)[0].tolist()) == [2, 4]
    assert not len(transitions.candidates(3, context, 10)[0])
    restored = Transitions(1)
    restored.restore(transitions.state(), EVERY)
    assert sorted(restored.candidates(0, context, 10)[0].tolist()) == [2, 4]


def test_factors_begin_as_those_of_a_new_item() -> None:
    factors = Factors()
    before = factors.score([5], EVERY)
    for turn in range(200):
        factors.learn([5], turn % 6)
    factors.forget_rows(GONE)
    outs, fresh = factors._outs, Factors()
    fresh._reach(6)
    np.testing.assert_array_equal(outs[GONE], fresh._outs[GONE])
    factors.learn([5], 1)
    restored = Factors()
    restored.restore(factors.state(), EVERY)
    np.testing.assert_array_equal(restored.score([5], EVERY), factors.score([5], EVERY))
    assert not before.any()


def test_a_full_exact_buffer_does_not_bring_back_what_the_index_knew_of_a_row() -> None:
    vectors = np.eye(6, dtype=np.float32)
    searcher = Searcher(ItemIndex.build(EVERY, vectors), limit=2)
    searcher.delete(3)
    searcher.put(np.array([3], np.int32), vectors[5:])  # another item, which looks like row 5's
    for row in (0, 1):
        searcher.put(np.array([row], np.int32), vectors[row : row + 1])
    rows, scores = searcher.search(vectors[3], 6)
    assert 3 not in rows.tolist() and not scores.any() and searcher.dropped == 1
