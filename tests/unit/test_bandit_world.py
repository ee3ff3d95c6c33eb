"""The simulated stream: the same again from its seed, candidates that are the graph's, items that come, go and drift."""

import numpy as np

from recsys.testing.bandit_world import BanditWorld, BanditWorldOptions

SMALL = BanditWorldOptions(clusters=12, active=4, edges=8, living=30, arrival_s=5.0, duration_s=100, rate=6, dim=4)


def test_world_is_the_same_again_from_its_seed() -> None:
    one, two, other = BanditWorld(1, SMALL), BanditWorld(1, SMALL), BanditWorld(2, SMALL)
    for _ in range(20):
        requests, truth = one.step()
        again, same = two.step()
        np.testing.assert_array_equal(truth, same)
        np.testing.assert_array_equal(requests.items, again.items)
        assert not np.array_equal(other.step()[1], truth)


def test_candidates_are_the_items_of_the_active_clusters_each_once() -> None:
    world = BanditWorld(3, SMALL)
    for _ in range(30):
        requests, truth = world.step()
        assert len(truth) == len(requests.items) == requests.starts[-1] and ((truth > 0) & (truth < 1)).all()
        np.testing.assert_allclose(requests.weights.sum(1), 1, rtol=1e-5)
        for request, (start, end) in enumerate(zip(requests.starts[:-1], requests.starts[1:], strict=True)):
            items = requests.items[start:end]
            assert len(np.unique(items)) == len(items)
            clusters = np.repeat(requests.clusters[request : request + 1], len(items), 0)
            places = world.edges_of(clusters, items)
            assert (places >= 0).any(1).all()
            mine = (requests.candidate >= start) & (requests.candidate < end)
            assert set(requests.edge[mine].tolist()) == set(places[places >= 0].tolist())
            k = requests.column[mine] - request * SMALL.active
            np.testing.assert_array_equal(
                requests.edge[mine],
                places[requests.candidate[mine] - start, k],
                "each edge is its item's and cluster's",
            )


def test_items_come_and_go_by_age_and_qualities_drift() -> None:
    world = BanditWorld(4, SMALL)
    before = None
    for second in range(1, 101):
        requests, _ = world.step()
        assert world.oldest == second // 5
        assert requests.items.min() >= world.oldest and requests.items.max() < world.oldest + SMALL.living
        before = world._quality.copy() if before is None else before
    assert world.num_items == SMALL.living + 20
    moved = world._quality - before
    assert 0.03 < moved.std() < 0.3  # an Ornstein-Uhlenbeck step of 99 s: √(1 - 2^(-99/7200)) = 0.097
