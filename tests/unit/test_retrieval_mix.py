"""Followed attributes and the mix of sources."""

from __future__ import annotations

import time

import numpy as np

from recsys.candidates.mix import Showable, mix
from recsys.retrieval.select import NO_ROWS
from recsys.retrieval.shared_attributes import Followed
from recsys.types import Float32, Int32

NEWS, SPORT = 11, 22
PRIORS = {"nearest": 3.0, "trending": 10.0}
ALL = Showable(np.ones(100, np.bool_), np.ones(100, np.bool_), NO_ROWS)


def source(name: str, rows: list[int], scores: list[float]) -> tuple[str, Int32, Float32]:
    return name, np.array(rows, np.int32), np.array(scores, np.float32)


def rows_of(followed: Followed, *keys: tuple[int, int, float], k: int = 10) -> list[int]:
    return followed.query(keys, k)[0].tolist()


def test_followed_items_come_by_popularity_and_every_fourth_is_new() -> None:
    followed = Followed()
    for row in range(8):
        followed.upsert(row, [[NEWS]])
    for row, notes in ((0, 3), (1, 5), (2, 4), (3, 1)):
        for _ in range(notes):
            followed.note(row)
    assert rows_of(followed, (0, NEWS, 1.0)) == [1, 2, 0, 7, 3, 6, 5, 4]


def test_followed_weights_share_the_places_and_shared_items_lead() -> None:
    followed = Followed()
    for row in range(10):
        followed.upsert(row, [[NEWS]])
    for row in range(10, 20):
        followed.upsert(row, [[SPORT]])
    assert {row // 10 for row in rows_of(followed, (0, NEWS, 1.0), (0, SPORT, 0.9), k=4)} == {0, 1}
    assert rows_of(followed, (0, NEWS, 1.0), (0, SPORT, 0.1), k=3) == [9, 8, 7]
    followed.upsert(20, [[NEWS, SPORT]])
    assert rows_of(followed, (0, NEWS, 1.0), (0, SPORT, 1.0), k=1) == [20]


def test_followed_gives_allowed_items_only() -> None:
    followed = Followed()
    for row in range(30):
        followed.upsert(row, [[NEWS]])
    allowed = np.zeros(20, np.bool_)
    allowed[[2, 9, 19]] = True
    assert followed.query([(0, NEWS, 1.0)], 2, allowed)[0].tolist() == [19, 9]


def test_followed_attributes_do_not_mix() -> None:
    followed = Followed()
    followed.upsert(1, [[NEWS], [SPORT]])
    assert rows_of(followed, (1, NEWS, 1.0), (0, SPORT, 1.0)) == []
    assert rows_of(followed, (1, SPORT, 1.0)) == [1]


def test_followed_changes_and_deletions_hold_at_once() -> None:
    followed = Followed()
    for row in (1, 2):
        followed.upsert(row, [[NEWS]])
        followed.note(row)
    followed.upsert(1, [[SPORT]])
    assert rows_of(followed, (0, NEWS, 1.0)) == [2]
    assert rows_of(followed, (0, SPORT, 1.0)) == [1]
    followed.delete(2)
    followed.delete(2)
    followed.note(2)
    assert rows_of(followed, (0, NEWS, 1.0), (0, SPORT, 1.0)) == [1]
    followed.upsert(2, [[NEWS]])
    assert rows_of(followed, (0, NEWS, 1.0)) == [2]


def test_followed_keeps_the_most_popular_of_a_large_value_exactly() -> None:
    followed = Followed()
    generator = np.random.default_rng(5)
    for row in range(2000):
        followed.upsert(row, [[NEWS]])
    counts = np.zeros(2000)
    for row in (generator.zipf(1.2, 6000) % 2000).tolist():
        followed.note(row)
        counts[row] += 1  # 6,000 notes are far below one half-life
    rows = rows_of(followed, (0, NEWS, 1.0), k=400)
    top = np.argsort(-counts, kind="stable")[:100].tolist()
    assert len(set(top) & set(rows)) == 100
    assert len(rows_of(followed, (0, NEWS, 1.0), k=5000)) <= 450


def test_followed_takes_a_large_catalogue_quickly() -> None:
    followed = Followed()
    started = time.perf_counter()
    for row in range(50_000):
        followed.upsert(row, [[row % 300], [row % 7, row % 11]])
    assert time.perf_counter() - started < 3.0
    assert rows_of(followed, (0, 5, 1.0), k=2) == [49_805, 49_505]


def test_mix_adds_counts_and_priors_and_says_who_brought_what() -> None:
    rows, scores, masks = mix(
        [source("covisited", [4, 2], [3.0, 1.0]), source("trending", [2, 9], [300.0, 100.0])],
        10,
        {"trending": 4.0},
        ALL,
    )
    assert rows.tolist() == [2, 4, 9]
    assert scores.tolist() == [4.0, 3.0, 1.0]
    assert masks.tolist() == [0b11, 0b01, 0b10]


def test_mix_is_deterministic_bounded_and_breaks_ties_by_row() -> None:
    first = mix([source("nearest", [5, 1, 3], [1.0, 1.0, 1.0]), source("caller", [8], [0.0])], 3, PRIORS, ALL)
    assert first[0].tolist() == [1, 3, 5]
    assert mix([source("nearest", [5, 1], [-1.0, -2.0])], 9, PRIORS, ALL)[0].tolist() == [1, 5]
    assert mix([], 5, PRIORS, ALL)[0].tolist() == []
    assert mix([source("trending", [], [])], 5, PRIORS, ALL)[2].tolist() == []
