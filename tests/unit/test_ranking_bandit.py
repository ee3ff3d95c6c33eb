"""The source `bandit`: from a user's vector to candidates, by what the edges say; and what is logged of it."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from recsys.bandit.graph import Published
from recsys.bandit.served import decode
from recsys.candidates import recent_users
from recsys.candidates.explorer import Active, Bandit
from recsys.candidates.generation import Generations
from recsys.config import Config, parse
from recsys.errors import ParametersUnavailable, SchemaMismatch
from recsys.features.build import UserFeatures, user_features
from recsys.features.catalogue import Catalogue
from recsys.features.schema import Schema
from recsys.keys import key_of
from recsys.model import networks, specs, weights
from recsys.model.layouts import layouts
from recsys.model.plan import Block
from recsys.parameters.base import Reply
from recsys.parameters.dense_weights import DenseWeights
from recsys.parameters.in_process import OwnNetworks
from recsys.parameters.row_source import RowSource
from recsys.parameters.store import ParameterStore
from recsys.ranking.scorer import Scorer
from recsys.retrieval.item_index import ItemIndex
from recsys.retrieval.searcher import Searcher
from recsys.retrieval.select import NO_ROWS
from recsys.table.tables import Tables
from recsys.training.bandit_learner import BanditLearner
from recsys.types import Float32, HistoryEvent, Item

DIM, NUM = 8, 60
VECTORS = np.random.default_rng(0).normal(size=(NUM, DIM)).astype(np.float32)
CENTROIDS = np.eye(DIM, dtype=np.float32)[:3]


class Away(ParameterStore):
    """A parameter store that can be away."""

    away = False

    def lookup(self, blocks: Sequence[Block]) -> Reply:
        if self.away:
            raise ParametersUnavailable("away")
        return super().lookup(blocks)


class World:
    """A bandit over 60 items, three clusters and a store of edges."""

    def __init__(self, **options: Any) -> None:
        bandit: dict[str, Any] = {"clusters": 4, "active": 2, "neighbours": 10, "half_life_s": 0, "alpha": 0.1}
        self.config: Config = parse(
            {
                "model": {"tower_dim": DIM, "dim": 4, "expert_hidden": [4], "attention": [4]},
                "retrieval": {"sources": {"bandit": 10}},
                "table": {"capacity": 5000},
                "bandit": bandit | options,
            }
        )
        self.schema = Schema.of(self.config)
        self.catalogue = Catalogue(self.schema)
        for number in range(NUM):
            self.catalogue.apply(Item(item_id=f"i{number}", attributes={"category": f"c{number % 3}"}))
        self.store = Away(layouts(self.config, self.schema), self.schema.hash, "reference")
        self.published = Published(
            ids=np.array([5, 6, 7]),
            places=np.array([0, 1, 2], np.int32),
            centroids=CENTROIDS,
            weights=np.full(3, 100, np.float32),
            generation="g",
            clock=(0, 0, 0),
            half_life_s=None,
        )
        self.own = OwnNetworks(
            self.config,
            networks.arrays(networks.ranker(self.config, self.schema)),
            networks.arrays(networks.two_tower(self.config, self.schema)),
            lambda: self.published,
        )
        self.scorer = Scorer(self.config, self.schema, self.store, self.own)
        self.bandit = Bandit(self.config, self.catalogue, self.scorer)
        self.searcher = Searcher(ItemIndex.build(np.arange(NUM, dtype=np.int32), VECTORS))

    def prepare(self, name: str = "g") -> None:
        self.bandit.prepare(name, self.searcher, self.scorer.towers)

    def user(self, clicked: str = "i1") -> UserFeatures:
        history = [HistoryEvent(time_ms=1, event_id="e", item_id=clicked, type="click")]
        return user_features(self.schema, self.catalogue, "u", history, {}, 2)

    def active(self, vector: Float32, name: str = "g") -> Active:
        active = self.bandit.activate(name, self.user(), vector)
        assert active is not None
        return active

    def set_edges(self, place: int, sums: dict[int, tuple[float, float, float]]) -> None:
        keys = np.array([key_of(f"i{row}") for row in sums])
        self.store.tables["edge"].write(
            np.full(len(keys), place, np.int32), keys, np.array(list(sums.values()), np.float32), 0
        )

    def found(self, active: Active, quota: int = 10, request: str = "r", **more: Any) -> list[int]:
        arguments: dict[str, Any] = {"left_out": NO_ROWS, "allowed": None} | more
        rows, scores = self.bandit.candidates(active, quota, request, 0, **arguments)
        assert (np.diff(scores) < 0).all() and (scores > 0).all()
        return [int(row) for row in rows]


def test_active_clusters_are_the_nearest_and_their_weights_a_softmax() -> None:
    world = World()
    world.prepare()
    vector = np.array([0.8, 0.1, 0.6, *[0.0] * 5], np.float32)
    active = world.active(vector)
    assert active.clusters.tolist() == [5, 7]
    expected = np.exp(np.array([0.8, 0.6]) / 0.1)
    np.testing.assert_allclose(active.weights, expected / expected.sum(), rtol=1e-5)


def test_several_interests_are_one_user_in_the_direction_of_their_mean() -> None:
    world = World()
    world.prepare()
    interests = np.eye(DIM, dtype=np.float32)[[0, 0, 2]]
    active = world.active(interests)
    assert active.clusters.tolist() == [5, 7] and np.linalg.norm(active.vector) == pytest.approx(1)
    expected = np.exp(np.array([2, 1]) / np.sqrt(5) / 0.1)
    np.testing.assert_allclose(active.weights, expected / expected.sum(), rtol=1e-5)
    assert world.bandit.activate("g", world.user(), np.stack([CENTROIDS[0], -CENTROIDS[0]])) is None


def test_what_nothing_is_known_of_comes_first_then_the_best_by_ucb() -> None:
    world = World(active=1)
    world.prepare()
    active = world.active(CENTROIDS[0])
    assert active.graph is not None
    near = active.graph.rows[active.at[0], :10].tolist()
    world.set_edges(0, {row: (100.0, 100.0, float(10 * n)) for n, row in enumerate(near[:8])})
    found = world.found(active)
    assert set(found[:2]) == set(near[8:]) == set(active.fresh)
    assert found[2:] == near[7::-1], "by the mean reward, falling"
    narrow = world.found(active, quota=3)
    assert set(narrow[:2]) == set(near[8:]) and narrow[2] == near[7]


def test_with_a_prior_nothing_is_fresh_and_alpha_decides_whether_the_unknown_is_tried() -> None:
    """Unknown: 0 + α √(1/.5); known: about its mean."""
    for alpha, unknown_first in ((0.1, False), (1.0, True)):
        world = World(active=1, prior=0.5, alpha=alpha)
        world.prepare()
        active = world.active(CENTROIDS[0])
        assert active.graph is not None
        near = active.graph.rows[active.at[0], :10].tolist()
        world.set_edges(0, dict.fromkeys(near[:8], (1e6, 1e6, 5e5)))
        found = world.found(active)
        assert len(active.fresh) == 0
        assert set(found[:2] if unknown_first else found[8:]) == set(near[8:])


def test_a_wide_edge_beats_a_better_known_one_when_alpha_is_large() -> None:
    for alpha, first in ((0.0, 0), (1.0, 1)):
        world = World(active=1, alpha=alpha)
        world.prepare()
        active = world.active(CENTROIDS[0])
        assert active.graph is not None
        near = active.graph.rows[active.at[0], :10].tolist()
        world.set_edges(0, dict.fromkeys(near, (1e6, 1e6, 0.0)))
        world.set_edges(0, {near[0]: (1e6, 1e6, 5e5), near[1]: (2.0, 2.0, 0.8)})
        assert world.found(active, quota=1) == [near[first]]


def test_only_alive_allowed_and_not_forbidden_items_are_found() -> None:
    world = World(active=1)
    world.prepare()
    active = world.active(CENTROIDS[0])
    assert active.graph is not None
    near = active.graph.rows[active.at[0], :10].tolist()
    world.catalogue.apply(Item(item_id=f"i{near[0]}", deleted=True))
    allowed = world.catalogue.alive.copy()
    allowed[near[1]] = False
    assert set(world.found(active, left_out=np.array([near[2]], np.int32))) == set(near) - {near[0], near[2]}
    assert set(world.found(active, allowed=allowed)) == set(near[2:])


def test_the_choice_is_seeded_by_the_request() -> None:
    world = World()
    world.prepare()
    active = world.active(np.float32([0.6, 0.6, 0.6, *[0.1] * 5]))
    assert world.found(active, request="a") == world.found(active, request="a")
    assert len({tuple(world.found(active, request=str(n))) for n in range(20)}) > 10, "fresh items in random order"


@pytest.mark.parametrize("policy", ["thompson", "epsilon_greedy"])
def test_other_policies_choose_the_better_ones_more_often(policy: str) -> None:
    world = World(active=1, policy=policy, alpha=1.0, epsilon=0.3)
    world.prepare()
    active = world.active(CENTROIDS[0])
    assert active.graph is not None
    near = active.graph.rows[active.at[0], :10].tolist()
    world.set_edges(0, {row: (100.0, 100.0, 50.0 if n < 3 else 30.0) for n, row in enumerate(near)})
    often = np.zeros(NUM)
    for number in range(300):
        found = world.found(active, quota=3, request=str(number))
        assert len(set(found)) == 3
        often[found] += 1
    assert often[near[:3]].min() > 2 * often[near[3:]].max() > 0


def test_what_is_logged_says_which_shown_items_have_which_edges() -> None:
    world = World()
    world.prepare()
    active = world.active(np.float32([0.7, 0.0, 0.6, *[0.0] * 5]))
    assert active.graph is not None
    rows = active.graph.rows[active.at]
    shown = np.array([rows[0, 0], rows[1, 0], 59], np.int32)
    served = decode(world.bandit.served(active, shown), 3)
    expected = [sum(1 << k for k in range(2) if row in rows[k]) for row in shown.tolist()]
    assert served.edges.tolist() == expected and expected[0] & 1 and expected[1] & 2
    assert (served.generation, served.clusters.tolist()) == ("g", [5, 7])
    np.testing.assert_array_equal(served.vector, active.vector)


def test_before_any_centroid_is_known_the_first_cluster_is_logged_and_nothing_is_found() -> None:
    world = World()
    world.published = Published(
        ids=np.array([3]),
        places=np.array([0], np.int32),
        centroids=np.zeros((1, DIM), np.float32),
        weights=np.zeros(1, np.float32),
        generation="",
        clock=(0, 0, 0),
        half_life_s=None,
    )
    world.scorer.refresh()
    world.prepare()
    active = world.active(CENTROIDS[0])
    assert world.found(active) == []
    served = decode(world.bandit.served(active, np.array([1, 2], np.int32)), 2)
    assert (served.clusters.tolist(), served.weights.tolist(), served.edges.tolist()) == ([3], [1.0], [0, 0])
    world.published = Published(
        ids=np.array([3]),
        places=np.array([0], np.int32),
        centroids=CENTROIDS[:1],
        weights=np.ones(1, np.float32),
        generation="g",
        clock=(0, 0, 0),
        half_life_s=None,
    )
    world.scorer.refresh()
    world.bandit.refresh()
    assert len(world.found(world.active(CENTROIDS[0]))) == 10


def test_without_a_vector_or_a_trainer_there_is_no_bandit() -> None:
    world = World()
    world.prepare()
    assert world.bandit.activate("g", world.user(), np.zeros(DIM, np.float32)) is None
    untrained = Scorer(world.config, world.schema, world.store)
    assert Bandit(world.config, world.catalogue, untrained).activate("g", world.user(), CENTROIDS[0]) is None


def test_in_a_new_generation_clusters_are_where_their_users_of_late_are() -> None:
    world = World()
    world.prepare()
    for _ in range(5):
        world.active(CENTROIDS[0])  # i1 was clicked by users of cluster 5
    world.prepare("g2")
    active = world.active(VECTORS[0], "g2")
    assert active.graph is not None and active.graph.ids.tolist() == [5], "of the others nothing is known there"
    expected = world.scorer.user_vector(world.user(), world.scorer.towers)
    assert expected is not None
    np.testing.assert_allclose(active.graph.centroids[0], expected, rtol=1e-5)
    assert world.active(CENTROIDS[0]).generation == "g", "requests under way still find the one before"


def test_a_new_item_is_found_as_soon_as_it_has_a_vector() -> None:
    world = World(active=1)
    world.prepare()
    row = world.catalogue.apply(Item(item_id="new"))
    world.bandit.arrived("g", [row], world.scorer.towers)
    world.bandit.refresh()
    found = [row in world.found(world.active(centroid)) for centroid in CENTROIDS]
    assert any(found), "wherever it is, it is tried where it is least far"
    world.prepare("g2")
    assert world.bandit._spaces["g2"].newest.tolist() == [row], "it stays new in the next generation"


def test_the_last_known_edges_serve_while_parameter_is_away() -> None:
    world = World(active=1)
    world.prepare()
    active = world.active(CENTROIDS[0])
    assert active.graph is not None
    near = active.graph.rows[active.at[0], :10].tolist()
    world.set_edges(0, {row: (100.0, 100.0, float(n)) for n, row in enumerate(near)})
    before = world.found(active)
    world.store.away = True
    assert world.found(active) == before


def test_generations_prepare_the_graph_before_they_are_used() -> None:
    world = World()
    generations = Generations(world.config, world.catalogue, world.scorer, bandit=world.bandit)
    assert generations.due(0.0)
    generations.build(0.0)
    located = generations.locate(world.user())
    assert located is not None and world.bandit._spaces.keys() == {generations.name}
    row = world.catalogue.apply(Item(item_id="new", attributes={"category": "c1"}))
    generations.changed(row)
    generations.refresh(1.0)
    assert world.bandit._spaces[generations.name].newest.tolist() == [row]


def test_after_a_restart_clusters_are_found_by_the_users_before_it(tmp_path: Path) -> None:
    world = World()
    world.prepare()
    for centroid in (CENTROIDS[0], CENTROIDS[1], CENTROIDS[1]):
        world.active(centroid)
    recent_users.save(tmp_path, world.bandit.recent, world.schema)
    after = World()
    after.bandit.recent.extend(recent_users.load(tmp_path, after.schema))
    assert [one.cluster for one in after.bandit.recent] == [5, 6, 6]
    after.prepare("g2")
    active = after.active(VECTORS[0], "g2")
    assert active.graph is not None and active.graph.ids.tolist() == [5, 6]
    world.prepare("g2")
    expected = world.active(VECTORS[0], "g2").graph
    assert expected is not None
    np.testing.assert_array_equal(active.graph.centroids, expected.centroids)


def test_a_forgotten_user_is_in_no_file(tmp_path: Path) -> None:
    world = World()
    world.prepare()
    world.active(CENTROIDS[0])
    world.bandit.forget(key_of("another"))
    assert len(world.bandit.recent) == 1
    world.bandit.forget(key_of("u"))
    recent_users.save(tmp_path, world.bandit.recent, world.schema)
    assert recent_users.load(tmp_path, world.schema) == []


def test_users_of_another_schema_or_a_torn_file_are_not_used(tmp_path: Path) -> None:
    world = World()
    assert recent_users.load(tmp_path, world.schema) == []
    world.prepare()
    world.active(CENTROIDS[0])
    recent_users.save(tmp_path, world.bandit.recent, world.schema)
    other = Schema.of(parse({"features": {"context": ["hour"]}}))
    assert recent_users.load(tmp_path, other) == []
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-10])
    assert recent_users.load(tmp_path, world.schema) == []


def test_users_are_forgotten_while_requests_add_others() -> None:
    world, stop, failed = World(), threading.Event(), []
    world.prepare()
    user = world.user()

    def request(number: int) -> None:
        try:
            while not stop.is_set():
                world.bandit.activate("g", user, CENTROIDS[number])
        except Exception as error:  # noqa: BLE001 - the test's answer
            failed.append(error)

    threads = [threading.Thread(target=request, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    try:
        for turn in range(300):
            world.bandit.forget(key_of("u" if turn % 3 else "another"))
            assert all(one.user is user for one in world.bandit.recent)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failed


def test_a_row_that_becomes_another_items_leaves_the_graphs() -> None:
    world = World()
    world.prepare()
    before = world.active(CENTROIDS[0])
    assert before.graph is not None
    gone = np.unique(before.graph.rows[before.graph.rows >= 0])[:5]
    world.bandit.forget_rows(gone)
    world.bandit.refresh()
    for graph in (world.active(CENTROIDS[0]).graph, world.bandit._spaces["g"].graph):
        assert graph is not None and not np.isin(graph.rows, gone).any() and (graph.rows >= 0).any()
    assert np.isin(before.graph.rows, gone).any()  # a request under way keeps what it saw


@pytest.mark.parametrize(
    "forged",
    [
        {"ids": None},
        {"half_life_s": np.full(1, -1.0)},
        {"half_life_s": np.zeros(0)},
        {"decay": np.zeros(1, np.int64)},
        {"generation": np.zeros(1, np.float32)},
        {"places": np.zeros(2, np.int32)},
        {"places": np.full(1, 4, np.int32)},
        {"places": np.full(1, -1, np.int32)},
        {"ids": np.zeros(1, np.float32)},
        {"centroids": np.zeros((1, DIM + 1), np.float32)},
        {"centroids": np.zeros(DIM, np.float32)},
        {
            "ids": np.zeros(0, np.int64),
            "places": np.zeros(0, np.int32),
            "centroids": np.zeros((0, DIM), np.float32),
            "weights": np.zeros(0, np.float32),
        },
    ],
)
def test_clusters_that_no_trainer_tells_are_refused_and_the_weights_in_use_stay(forged: dict[str, Any]) -> None:
    world = World()
    config, schema = world.config, world.schema
    sent = {
        **{f"ranker.model.{n}": a for n, a in weights.of_ranker(specs.ranker(config, schema), seed=0).items()},
        **{f"towers.model.{n}": a for n, a in weights.of_towers(specs.two_tower(config, schema), seed=0).items()},
    }
    told = BanditLearner(config, Tables(layouts(config, schema))).published()
    source = DenseWeights(config, schema, RowSource(layouts(config, schema), world.store))
    source.load(payload(sent, told), 1)
    assert source.current.version == 1 and source.current.clusters is not None
    with pytest.raises(SchemaMismatch, match="dense weights 2 do not fit the configured model"):
        source.load(payload(sent, told | forged), 2)
    assert source.current.version == 1


def payload(sent: Mapping[str, Any], clusters: Mapping[str, Any]) -> bytes:
    """Dense weights, and what is told of the clusters, those that are None left out."""
    told = {f"clusters.{name}": array for name, array in clusters.items() if array is not None}
    return safetensors.numpy.save(sent | told)
