"""The pipeline over a small trained world: which sources answer, whatever is chosen of retrieval's options."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recsys import metrics
from recsys.config import parse
from recsys.ranking.stages import Gathered
from recsys.testing.trained_world import TrainedWorld
from recsys.testing.vectors import clustered
from recsys.types import Float32

NUM, REQUESTS = 400, 50


def trained(folder: Path, vectors: Float32 | None = None, **sections: Any) -> TrainedWorld:
    config = parse({"data_dir": str(folder), "bandit": {"neighbours": 20}, "training": {"batch_size": 64}} | sections)
    world = TrainedWorld(config, num_items=NUM, num_clicks=600, num_users=25, vectors=vectors)
    world.explore(100)
    return world


def asked(world: TrainedWorld) -> list[Gathered]:
    return [world.pipeline.gather(world.opened(world.any_user(), f"asked-{n}")) for n in range(REQUESTS)]


def answered_by(gathered: list[Gathered]) -> Counter[str]:
    """In how many requests each source brought a candidate."""
    found = [one.candidates for one in gathered]
    return Counter(name for one in found for name in {s for n in range(len(one.rows)) for s in one.sources(n)})


@pytest.mark.parametrize(
    "options",
    [{}, {"model": {"interests": 3}}, {"retrieval": {"hubness": 1.0}}, {"retrieval": {"learn_quotas": True}}],
    ids=str,
)
def test_nearest_and_bandit_bring_candidates_for_nearly_all_requests(tmp_path: Path, options: dict[str, Any]) -> None:
    world = trained(tmp_path, **options)
    requests = asked(world)
    found = answered_by(requests)
    assert min(found["nearest"], found["bandit"]) >= 0.9 * REQUESTS, found
    for one in requests:
        shown = world.pipeline.show(world.pipeline.score(one, world.pipeline.describe(one)))
        assert len({item.item_id for item in shown.items}) == one.asked.n and not shown.degraded


def test_where_items_are_placed_users_are_near_one_of_them(tmp_path: Path) -> None:
    vectors = clustered(NUM, centres=20)
    world = trained(tmp_path, vectors)
    requests = asked(world)
    assert answered_by(requests)["bandit"] >= 0.9 * REQUESTS
    for located in (one.asked.located for one in requests if one.asked.located is not None):
        rows, scores = located.search(1)
        assert scores[0] > 0.6 and rows[0] == np.argmax(vectors @ located.vector)


def counted(of: str) -> float:
    return metrics.REGISTRY.get_sample_value("recsys_unusable_vectors_total", {"of": of}) or 0.0


def test_items_and_users_without_a_direction_are_left_out_and_counted(tmp_path: Path) -> None:
    vectors, before = clustered(NUM, centres=20), counted("item")
    vectors[3], vectors[7] = 0, np.nan
    world = trained(tmp_path, vectors)
    assert counted("item") == before + 2
    located = next(one.asked.located for one in asked(world) if one.asked.located is not None)
    assert set(range(NUM)) - set(located.search(NUM)[0].tolist()) == {3, 7}
    for name, weights in located.generation.towers.weights.items():
        if name != "steps":
            weights.fill(np.nan)
    world.generations.changed(5)
    world.generations.refresh(1e12)
    assert counted("item") >= before + 3
    users = counted("user")
    requests = asked(world)
    assert counted("user") > users
    assert not {"nearest", "bandit"} & answered_by(requests).keys()
    for one in requests:
        shown = world.pipeline.show(world.pipeline.score(one, None))
        assert len(shown.items) == one.asked.n and not shown.degraded
