"""Online clusters: they find the groups that users come in, and nothing but the vectors decides."""

from __future__ import annotations

import numpy as np

from recsys.bandit.clusters import SPLIT_MASS, Clusters, Drop, Split
from recsys.types import Float32


def groups(count: int, size: int, dim: int = 16, spread: float = 0.1) -> tuple[Float32, Float32]:
    """Unit vectors around orthogonal centres, mixed, and the centres."""
    rng = np.random.default_rng(3)
    centres = np.linalg.qr(rng.normal(size=(dim, dim)))[0][:count].astype(np.float32)
    vectors = centres[rng.integers(count, size=size)] + spread * rng.normal(size=(size, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True), centres


def feed(clusters: Clusters, vectors: Float32, generation: str = "g1") -> list[Split | Drop]:
    changes = []
    for vector in vectors:
        clusters.add(vector, generation, clusters.ids[:1])
        changes += clusters.step()
    return changes


def test_one_cluster_becomes_the_groups_that_there_are() -> None:
    vectors, centres = groups(6, 6000)
    clusters = Clusters(16, 6)
    changes = feed(clusters, vectors)
    splits = sum(isinstance(c, Split) for c in changes)
    assert len(clusters) == 6 == 1 + splits - (len(changes) - splits)
    cosines = clusters.centroids() @ centres.T
    assert sorted(cosines.argmax(1).tolist()) == list(range(6)), "one cluster a group"
    assert cosines.max(1).min() > 0.97


def test_the_first_centroid_is_the_mean_direction_of_its_newest_vectors() -> None:
    vectors, _ = groups(2, 60)
    clusters = Clusters(16, 1)
    feed(clusters, vectors)
    weights = (1 - 1 / 100) ** np.arange(59, -1, -1)
    expected = weights @ vectors.astype(np.float64)
    np.testing.assert_allclose(clusters.centroids()[0], expected / np.linalg.norm(expected), rtol=1e-6)


def test_too_few_vectors_or_all_alike_are_not_split() -> None:
    vectors, _ = groups(4, int(SPLIT_MASS) - 10)
    clusters = Clusters(16, 8)
    assert feed(clusters, vectors) == []
    alike = Clusters(16, 8)
    assert feed(alike, np.repeat(vectors[:1], 500, 0)) == [] and len(alike) == 1


def test_a_cluster_that_users_left_is_dropped_and_its_place_serves_a_new_id() -> None:
    vectors, _ = groups(4, 4000)
    clusters = Clusters(16, 4)
    feed(clusters, vectors)
    assert len(clusters) == 4
    first = set(clusters.ids.tolist())
    moved = np.roll(vectors, 8, axis=1) * np.float32([1, -1] * 8)
    changes = feed(clusters, np.concatenate([moved, moved]))
    dropped = {c.place for c in changes if isinstance(c, Drop)}
    reused = {c.child for c in changes if isinstance(c, Split)} & dropped
    assert reused and set(clusters.places.tolist()) <= set(range(4))
    assert max(clusters.ids) > max(first), "an id is never used again"
    assert len(np.unique(clusters.places)) == len(clusters)


def test_a_new_generation_is_learned_by_the_logged_cluster_and_the_old_one_says_nothing_more() -> None:
    vectors, _ = groups(3, 3000)
    clusters = Clusters(16, 3)
    feed(clusters, vectors)
    ids, before = clusters.ids.copy(), clusters.centroids()
    turn = np.linalg.qr(np.random.default_rng(9).normal(size=(16, 16)))[0].astype(np.float32)
    member = (vectors @ before.T).argmax(1)
    for vector, at in zip(vectors[:200], member[:200], strict=True):
        clusters.add(vector @ turn, "g2", ids[at : at + 1])
        clusters.add(vector, "g1", ids[at : at + 1])
    assert clusters.generation == "g2"
    np.testing.assert_array_equal(clusters.ids, ids)
    cosines = (clusters.centroids() * (before @ turn)).sum(1)
    assert cosines.min() > 0.97, "the same clusters, in the new space"


def test_vectors_without_a_direction_and_unknown_clusters_change_nothing() -> None:
    vectors, _ = groups(3, 1000)
    clusters = Clusters(16, 3)
    feed(clusters, vectors)
    state = clusters.state()
    clusters.add(np.zeros(16, np.float32), "g1", clusters.ids)
    np.testing.assert_array_equal(clusters.state()["sums"], state["sums"])
    fresh = Clusters(16, 3)
    fresh.add(vectors[0], "g1", np.array([77]))
    assert not fresh.centroids().any(), "nobody knows where cluster 77 was"


def test_a_restored_state_goes_on_as_the_one_saved() -> None:
    vectors, _ = groups(5, 4000)
    one = Clusters(16, 5)
    feed(one, vectors[:2500], "g1")
    two = Clusters(16, 5)
    two.restore(one.state())
    assert feed(one, vectors[2500:], "g2") == feed(two, vectors[2500:], "g2")
    for name, array in one.state().items():
        np.testing.assert_array_equal(two.state()[name], array, err_msg=name)
