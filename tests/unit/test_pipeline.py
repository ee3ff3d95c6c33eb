"""The pipeline over a small trained world: which sources answer, whatever is chosen of retrieval's options."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recsys.config import parse
from recsys.ranking.work import Work
from recsys.testing.towers import TrainedWorld
from recsys.testing.vectors import clustered
from recsys.types import Float32

NUM, REQUESTS = 400, 50


def trained(folder: Path, vectors: Float32 | None = None, **sections: Any) -> TrainedWorld:
    config = parse({"data_dir": str(folder), "bandit": {"neighbours": 20}, "training": {"batch_size": 64}} | sections)
    world = TrainedWorld(config, num_items=NUM, num_clicks=600, num_users=25, vectors=vectors)
    world.explore(100)
    return world


def asked(world: TrainedWorld) -> list[Work]:
    works = [world.work(world.any_user(), f"asked-{n}") for n in range(REQUESTS)]
    for work in works:
        world.pipeline.find_candidates(work)
    return works


def answered_by(works: list[Work]) -> Counter[str]:
    """In how many requests each source brought a candidate."""
    return Counter(name for work in works for name in {s for n in range(len(work.rows)) for s in work.sources(n)})


@pytest.mark.parametrize(
    "options",
    [{}, {"model": {"interests": 3}}, {"retrieval": {"hubness": 1.0}}, {"retrieval": {"learn_quotas": True}}],
    ids=str,
)
def test_nearest_and_bandit_bring_candidates_for_nearly_all_requests(tmp_path: Path, options: dict[str, Any]) -> None:
    world = trained(tmp_path, **options)
    works = asked(world)
    found = answered_by(works)
    assert min(found["nearest"], found["bandit"]) >= 0.9 * REQUESTS, found
    for work in works:
        world.pipeline.build_features(work)
        world.pipeline.score(work)
        answer = world.pipeline.answer(work)
        assert len({item.item_id for item in answer.items}) == work.request.n and not answer.degraded


def test_where_items_are_placed_users_are_near_one_of_them(tmp_path: Path) -> None:
    vectors = clustered(NUM, centres=20)
    world = trained(tmp_path, vectors)
    works = asked(world)
    assert answered_by(works)["bandit"] >= 0.9 * REQUESTS
    for located in (work.located for work in works if work.located is not None):
        rows, scores = located.search(1)
        assert scores[0] > 0.6 and rows[0] == np.argmax(vectors @ located.vector)
