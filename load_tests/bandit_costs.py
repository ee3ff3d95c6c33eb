"""What a bandit's choice and update cost, and by how much the published mean is inflated."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from statistics import median

import numpy as np

from load_tests.common import ROUNDS, Report, percentile
from recsys.bandit.base import Policy, Requests
from recsys.bandit.policy import PolicyOptions, Shape, make_policy
from recsys.bandit.score import Edges, Grouped, Rule, choose, cluster_weights, score, score_grouped
from recsys.bandit.sums import EdgeSums
from recsys.testing.bandit_world import BanditWorld, BanditWorldOptions

TRAINED, TIMED = 100, 10
"""Batches a policy learns from before, and batches of a timed round."""
CLUSTERS, EDGES, ACTIVE, DIM = 256, 100, 10, 32
SETTINGS = ((1, 0.1), (3, 0.05), (3, 0.3), (10, 0.1), (10, 0.3))
"""K and temperature of the inflation's simulation."""


def costs(report: Report, policies: Mapping[str, PolicyOptions], options: BanditWorldOptions, seed: int) -> None:
    """Time of choosing and learning, a request, of policies that have learned from thousands of requests; in turns."""
    world = BanditWorld(seed, options)
    shape = Shape(
        num_edges=world.num_edges, num_items=world.num_items, num_clusters=options.clusters, hidden=options.hidden
    )
    made = {name: make_policy(chosen, shape, np.random.default_rng(seed)) for name, chosen in policies.items()}
    rng, batches = np.random.default_rng(seed), []
    for number in range(TRAINED + TIMED):
        requests, truth = world.step()
        requests = replace(requests, scores=truth.astype(np.float32))
        batches = [*batches[-TIMED + 1 :], (requests, truth)]
        if number < TRAINED:
            for policy in made.values():
                drawn = policy.choose(requests).drawn
                policy.update(world.events(requests, drawn, rng.random(len(drawn)) < truth[drawn]))
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(ROUNDS):
        for name, policy in made.items():
            seconds[name].append(sum(_timed(world, policy, *batch, rng) for batch in batches))
    for name, several in seconds.items():
        report.add(f"cost_{name}", median(several) / TIMED / options.rate * 1e6, "µs/request")
    ratios = [ours / full for ours, full in zip(seconds["diag_linucb"], seconds["linucb"], strict=True)]
    report.add("cost_vs_linucb", median(ratios))


def _timed(
    world: BanditWorld, policy: Policy, requests: Requests, truth: np.ndarray, rng: np.random.Generator
) -> float:
    started = time.perf_counter()
    drawn = policy.choose(requests).drawn
    chosen = time.perf_counter()
    events = world.events(requests, drawn, rng.random(len(drawn)) < truth[drawn])
    again = time.perf_counter()
    policy.update(events)
    return chosen - started + time.perf_counter() - again


def speed(report: Report) -> None:
    """One request from its vector to its 100 best candidates, and edges updated a second, places known; 256 clusters × 100 edges."""
    rng = np.random.default_rng(0)
    centroids = rng.normal(size=(CLUSTERS, DIM)).astype(np.float32)
    centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
    items = np.stack([rng.choice(2000, EDGES, replace=False) for _ in range(CLUSTERS)])
    d, n = rng.uniform(0.1, 50, (2, CLUSTERS, EDGES)).astype(np.float32)
    b = n * rng.random(n.shape, np.float32)
    cluster = np.repeat(np.arange(ACTIVE), EDGES)

    def once() -> None:
        at, weights = cluster_weights(centroids[rng.integers(CLUSTERS)], centroids, ACTIVE, 0.2)
        size = len(at) * EDGES
        edges = Edges(cluster[:size], items[at].ravel(), d[at].ravel(), n[at].ravel(), b[at].ravel(), 0.5)
        choose(score(weights, edges), 100, 0.3, rng)

    several = [_seconds(once) * 1e3 for _ in range(3000)]
    report.add("choose", percentile(several, 50), "ms")
    report.add("choose_p99", percentile(several, 99), "ms")
    sums = EdgeSums(CLUSTERS * EDGES, 3600.0)
    events = 4096
    places = rng.integers(0, CLUSTERS * EDGES, (events, ACTIVE))
    weights = rng.dirichlet(np.ones(ACTIVE), events).astype(np.float32)
    ones, times = np.ones(events, np.float32), np.arange(events, dtype=np.int64)
    rounds = [_seconds(lambda: sums.add(places, weights, ones, ones, times)) for _ in range(50)]
    report.add("update_edges", events * ACTIVE / median(rounds[1:]), "edges/s", "higher")


def _seconds(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def inflation(report: Report, seed: int, num: int = 60_000) -> None:
    """Mean score over mean truth: 50 clusters, 20 items that all have edges to all, 60k events, both means."""
    num_clusters, num_items, dim, held = 50, 20, 16, 5000
    for active, temperature in SETTINGS:
        rng = np.random.default_rng(seed)
        centroids = _unit(rng.normal(size=(num_clusters, dim)))
        users = _unit(centroids[rng.integers(num_clusters, size=num)] + 0.25 * rng.normal(size=(num, dim)))
        truth = 1 / (1 + np.exp(1 - 2 * users @ _unit(rng.normal(size=(num_items, dim))).T))
        found = [
            cluster_weights(u, centroids.astype(np.float32), active, temperature) for u in users.astype(np.float32)
        ]
        clusters, weights = np.zeros((num, active), np.int64), np.zeros((num, active), np.float32)
        for row, (at, shares) in enumerate(found):
            clusters[row, : len(at)], weights[row, : len(at)] = at, shares
        items = rng.integers(num_items, size=num)
        clicked = (rng.random(num) < truth[np.arange(num), items]).astype(np.float32)
        sums = EdgeSums(num_clusters * num_items)
        sums.add(
            clusters * num_items + items[:, None], weights, np.ones_like(clicked), clicked, np.zeros(num, np.int64)
        )
        everything = (clusters[:held, None, :] * num_items + np.arange(num_items)[None, :, None]).ravel()
        grouped = Grouped(
            candidate=np.repeat(np.arange(held * num_items, dtype=np.int32), active),
            column=np.tile(np.arange(held * active).reshape(held, 1, active), (1, num_items, 1))
            .ravel()
            .astype(np.int32),
            edge=everything.astype(np.int32),
        )
        for name in ("published", "normalised"):
            rule = Rule(published=name == "published")
            scores = score_grouped(weights[:held].ravel(), grouped, sums.sums, 1.0, rule, held * num_items)
            ratio = float(scores.mean.mean() / truth[:held].mean())
            report.add(f"inflation_{name}_k{active}_t{temperature:g}", ratio, "ratio")


def _unit(vectors: np.ndarray) -> np.ndarray:
    unit: np.ndarray = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    return unit
