"""What the loop's own bandit costs: a request from the user's vector to its candidates, and an impression from its bytes to its edges.

256 clusters of 100 edges, K = 10 active. CPU time of one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import numpy as np

from load_tests.common import Report, percentile
from recsys.bandit.graph import Published
from recsys.bandit.served import Served
from recsys.candidates.explorer import Active, Bandit
from recsys.config import Config, parse
from recsys.features.build import user_features
from recsys.features.catalogue import Catalogue
from recsys.features.schema import Schema
from recsys.model import networks
from recsys.model.layouts import edges, layouts
from recsys.parameters.in_process import OwnNetworks
from recsys.parameters.store import ParameterStore
from recsys.ranking.scorer import Scorer
from recsys.retrieval.item_index import ItemIndex
from recsys.retrieval.searcher import Searcher
from recsys.table.tables import Tables
from recsys.testing.bandit_world import BanditWorld, BanditWorldOptions
from recsys.testing.vectors import clustered, near
from recsys.testing.world import World
from recsys.training.bandit_learner import BanditLearner
from recsys.types import Feedback, Impression, ShownItem

ITEMS, SEEN, REQUESTS = 2000, 50, 3000
STEPS, STEP, SHOWN, REWARDED = 20, 100, 20, 10
"""Steps, impressions of each, items shown in each, impressions for each one that is rewarded."""
CLUSTERS = 256


def _ms(work: Callable[[], Any]) -> float:
    started = time.thread_time()
    work()
    return (time.thread_time() - started) * 1000


def loop_choose(report: Report) -> None:
    """`Bandit.activate` and `candidates` of the default configuration, rows looked up in a store of this process."""
    config = parse({})
    bandit, vectors, user = _bandit(config)
    seen = np.random.default_rng(1).integers(ITEMS, size=(REQUESTS, SEEN))
    queries, quota, times = near(vectors, REQUESTS, seed=1), config.retrieval.sources["bandit"], []

    def once(number: int) -> None:
        active = bandit.activate("g", user, queries[number])
        assert isinstance(active, Active)
        rows, _ = bandit.candidates(active, quota, f"r{number}", 0, np.sort(seen[number]).astype(np.int32), None)
        assert len(rows) == quota

    once(0)
    for number in range(REQUESTS):
        times.append(_ms(partial(once, number)))
    report.add("loop_choose", percentile(times, 50), "cpu ms")
    report.add("loop_choose_p99", percentile(times, 99), "cpu ms")


def _bandit(config: Config) -> tuple[Bandit, Any, Any]:
    """A bandit whose every edge was shown, where its items lie, and a user."""
    schema, rng = Schema.of(config), np.random.default_rng(0)
    catalogue = Catalogue(schema)
    for item in World(num_items=ITEMS).items():
        catalogue.apply(item)
    vectors = clustered(ITEMS, config.model.tower_dim, centres=40)
    published = Published(
        ids=np.arange(CLUSTERS),
        places=np.arange(CLUSTERS, dtype=np.int32),
        centroids=near(vectors, CLUSTERS),
        weights=np.full(CLUSTERS, 100, np.float32),
        generation="g",
        clock=(0, 0, 0),
        half_life_s=None,
    )
    store = ParameterStore(layouts(config, schema), schema.hash)
    own = OwnNetworks(
        config,
        networks.arrays(networks.ranker(config, schema)),
        networks.arrays(networks.two_tower(config, schema)),
        lambda: published,
    )
    scorer = Scorer(config, schema, store, own)
    bandit = Bandit(config, catalogue, scorer)
    searcher = Searcher(ItemIndex.build(np.arange(ITEMS, dtype=np.int32), vectors))
    bandit.prepare("g", searcher, scorer.towers)
    for place, centroid in enumerate(published.centroids):
        keys = catalogue.keys[searcher.search(centroid, config.bandit.neighbours)[0], 0]
        n = rng.uniform(1, 50, len(keys))
        sums = np.stack([n / 5, n, n * rng.random(len(keys))], 1).astype(np.float32)
        store.tables["edge"].write(np.full(len(keys), place, np.int32), keys, sums, 0)
    return bandit, vectors, user_features(schema, catalogue, "u", [], {}, 0)


def loop_update(report: Report) -> None:
    """`BanditLearner` from an impression's bytes to the table's rows: edges of impressions and rewards, a second."""
    world = BanditWorld(0, BanditWorldOptions(rate=STEP, dim=32))
    config = parse({"model": {"tower_dim": 32}})
    learner = BanditLearner(config, Tables([edges(config.bandit, config.table.capacity or 1_000_000)]))
    state = learner.clusters.state()
    for name in ("sums", "weights", "mass"):
        state[name] = np.repeat(state[name], CLUSTERS, 0)
    state |= {"ids": np.arange(CLUSTERS), "places": np.arange(CLUSTERS, dtype=np.int32)}
    learner.clusters.restore(state | {"counts": np.array([CLUSTERS, 0, 0])})
    rates = []
    for number in range(STEPS):
        messages, num_edges = _impressions(world, number)
        events = [_click(message) for message in messages[::REWARDED]]
        before = time.thread_time()
        for message in messages:
            served = learner.served(message)
            assert served is not None
            learner.impression(message, served, number)
        for event in events:
            learner.feedback(event, number)
        learner.step(number, learn=True)
        rates.append(num_edges / (time.thread_time() - before))
    assert learner.take_outcomes().count("rewarded") == STEPS * STEP // REWARDED
    report.add("loop_update_edges", median(rates[1:]), "edges/cpu s", "higher")


def _click(impression: Impression) -> Feedback:
    return Feedback(
        event_id="e",
        user_id=impression.user_id,
        item_id=impression.items[0].item_id,
        type="click",
        time_ms=0,
        request_id=impression.request_id,
    )


def _impressions(world: BanditWorld, number: int) -> tuple[list[Impression], int]:
    """A second's requests, each showing some of its candidates; how many edges they and their rewards add to."""
    requests, _ = world.step()
    rng, messages, num_edges = np.random.default_rng(number), [], 0
    for index in range(STEP):
        start, end = requests.starts[index : index + 2]
        items = rng.permutation(requests.items[start:end])[:SHOWN]
        active = requests.weights[index] > 0
        clusters = requests.clusters[index][active]
        has = world.edges_of(np.broadcast_to(clusters, (SHOWN, len(clusters))), items) >= 0
        served = Served(
            generation="g",
            clusters=clusters,
            weights=requests.weights[index][active],
            vector=rng.standard_normal(32).astype(np.float32),
            edges=(has.astype(np.uint64) << np.arange(len(clusters), dtype=np.uint64)).sum(1, dtype=np.uint64),
        )
        shown = tuple(ShownItem(item_id=f"item-{item}", position=at + 1) for at, item in enumerate(items.tolist()))
        messages.append(
            Impression(request_id=f"{number}-{index}", user_id="u", time_ms=0, items=shown, bandit=served.encode())
        )
        num_edges += int(has.sum()) + (int(has[0].sum()) if index % REWARDED == 0 else 0)
    return messages, num_edges
