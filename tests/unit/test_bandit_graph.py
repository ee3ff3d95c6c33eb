"""The graph: each cluster's nearest items and the newest ones, kept up as clusters move."""

from __future__ import annotations

import weakref
from dataclasses import replace

import numpy as np

from recsys.bandit.graph import Graph, Published, Space
from recsys.types import Float32, Int32

ITEMS = np.linalg.qr(np.random.default_rng(0).normal(size=(200, 8)))[0].astype(np.float32)
ITEMS /= np.linalg.norm(ITEMS, axis=1, keepdims=True)
W, NEWEST = 8, 2


class Index:
    """Exact search, and how often it was asked."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, vector: Float32, k: int) -> tuple[Int32, Float32]:
        self.asked += 1
        cosines = ITEMS @ vector
        rows = np.argsort(-cosines, kind="stable")[:k].astype(np.int32)
        return rows, cosines[rows]


def published(centroids: Float32, generation: str = "g1", weight: float = 100.0) -> Published:
    size = len(centroids)
    return Published(
        ids=np.arange(10, 10 + size),
        places=np.arange(size, dtype=np.int32)[::-1].copy(),
        centroids=centroids,
        weights=np.full(size, weight, np.float32),
        generation=generation,
        clock=(0, 0, 0),
        half_life_s=None,
    )


def graph(space: Space) -> Graph:
    assert space.graph is not None
    return space.graph


def edges(space: Space, cluster: int) -> set[int]:
    found = graph(space)
    [rows] = found.rows[found.ids == cluster]
    assert len(rows) == W + NEWEST and len(set(rows[rows >= 0])) == (rows >= 0).sum(), "no item twice"
    return set(rows[rows >= 0].tolist())


def near(vector: Float32) -> set[int]:
    return set(np.argsort(-ITEMS @ vector, kind="stable")[:W].tolist())


def test_each_cluster_has_its_nearest_items() -> None:
    space = Space(Index(), W, {})
    centroids = np.eye(8, dtype=np.float32)[:3]
    centroids[1] = 0  # not known in this generation
    space.follow(published(centroids), "g1")
    assert graph(space).ids.tolist() == [10, 12] and graph(space).places.tolist() == [2, 0]
    assert edges(space, 10) == near(centroids[0]) and edges(space, 12) == near(centroids[2])


def test_a_retired_graph_answers_but_lets_go_of_its_index() -> None:
    index = Index()
    freed, space = weakref.ref(index), Space(index, W, {})
    space.follow(published(np.eye(8, dtype=np.float32)[:1]), "g1")
    del index
    space.retire()
    assert freed() is None and edges(space, 10)


def test_only_a_cluster_that_moved_is_searched_for_again() -> None:
    index = Index()
    space = Space(index, W, {})
    centroids = np.eye(8, dtype=np.float32)[:3]
    space.follow(published(centroids), "g1")
    moved = centroids.copy()
    moved[0, 1] = 0.02
    moved[2] = np.eye(8, dtype=np.float32)[5]
    before = index.asked
    space.follow(published(moved), "g1")
    assert index.asked == before + 1
    assert edges(space, 12) == near(moved[2]) and edges(space, 10) == near(centroids[0])
    np.testing.assert_array_equal(graph(space).centroids, moved)


def test_our_own_centroids_hold_until_the_trainer_knows_them_in_this_generation() -> None:
    own = np.eye(8, dtype=np.float32)
    space = Space(Index(), W, {10: own[4], 11: own[5]})
    trainers = own[:3].copy()
    for other, weight, expected in [
        ("g0", 100.0, [own[4], own[5]]),  # of another generation: 12 is not known at all
        ("g1", 5.0, [own[4], own[5], own[2]]),  # of too few vectors, but for 12, of which nothing else is known
        ("g1", 50.0, [own[0], own[1], own[2]]),
    ]:
        space.follow(published(trainers, other, weight), "g1")
        np.testing.assert_array_equal(graph(space).centroids, expected)


def test_a_new_item_has_edges_at_once_to_its_nearest_cluster_and_where_it_is_among_the_nearest() -> None:
    centroids = np.eye(8, dtype=np.float32)[:3]
    space = Space(Index(), W, {})
    far = -centroids.sum(0) / np.sqrt(3)
    far[1] += 0.1  # nowhere among the nearest, and least far from the second cluster
    both = (centroids[0] + centroids[2]) / np.sqrt(2)
    space.arrive(np.array([900, 901], np.int32), np.stack([far, both]).astype(np.float32), 100)
    space.follow(published(centroids), "g1")
    assert [c for c in (10, 11, 12) if 900 in edges(space, c)] == [11]
    assert [c for c in (10, 11, 12) if 901 in edges(space, c)] == [10, 12]


def test_the_newest_items_of_a_cluster_stay() -> None:
    centroids = np.eye(8, dtype=np.float32)[:1]
    space = Space(Index(), W, {})
    for row in (900, 901, 902, 900):
        space.arrive(np.array([row], np.int32), -centroids, 100)
    space.follow(published(centroids), "g1")
    assert edges(space, 10) - near(centroids[0]) == {902, 900} and space.newest.tolist() == [901, 902, 900]
    space.arrive(np.array([903], np.int32), -centroids, 2)
    assert space.newest.tolist() == [900, 903]


def test_an_item_that_is_both_near_and_new_has_one_edge() -> None:
    centroids = np.eye(8, dtype=np.float32)[:1]
    row = next(iter(near(centroids[0])))
    space = Space(Index(), W, {})
    space.arrive(np.array([row], np.int32), ITEMS[row : row + 1], 100)
    space.follow(published(centroids), "g1")
    assert edges(space, 10) == near(centroids[0])


def test_a_small_catalogue_leaves_room() -> None:
    space = Space(lambda v, k: (np.array([3], np.int32), np.array([0.5], np.float32)), W, {})
    centroids = np.eye(8, dtype=np.float32)[:1]
    space.arrive(np.array([7], np.int32), -centroids, 100)
    space.follow(replace(published(centroids), ids=np.array([4])), "g1")
    assert edges(space, 4) == {3, 7}
