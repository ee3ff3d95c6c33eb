"""Scoring: the light first stage, and that it changes no score of what it keeps."""

import numpy as np
import pytest

from recsys.config import Config, parse
from recsys.features.build import Features
from recsys.features.catalogue import Catalogue
from recsys.features.schema import Schema
from recsys.model.layouts import layouts
from recsys.ranking.parameters import ParameterStore
from recsys.ranking.pipeline import Pipeline, Work
from recsys.ranking.request import Request
from recsys.ranking.scorer import Scorer
from recsys.ranking.sources import Sources
from recsys.state.memory import MemoryState
from recsys.testing.world import World


def world(**ranking: object) -> tuple[Config, Pipeline, Scorer, tuple[str, ...]]:
    """Sixty items, and rows whose wide weights differ from item to item."""
    config = parse({"model": {"dim": 4, "expert_hidden": [8, 4], "attention": [8]}, "ranking": ranking})
    schema = Schema.of(config)
    store, sources = ParameterStore(layouts(config, schema), schema.hash), Sources(config, schema, Catalogue(schema))
    items = World(seed=1, num_users=3, num_items=60).items()
    for item in items:
        sources.item(item)
    keys = sources.catalogue.keys[: len(items), 0]
    rows = np.random.default_rng(0).normal(size=(len(keys), 4 + len(schema.tasks))).astype(np.float32)
    store.tables["deep"].write(np.full(len(keys), schema.slot("item"), np.int32), keys, rows, 0)
    scorer = Scorer(config, schema, store)
    pipeline = Pipeline(config, schema, MemoryState(50, 1000), sources, scorer, None)
    return config, pipeline, scorer, tuple(item.item_id for item in items)


def features(pipeline: Pipeline, ids: tuple[str, ...]) -> Features:
    work = Work(request=Request(request_id="r", user_id="u", candidates=ids), now_ms=1000, deadline=float("inf"))
    for stage in (pipeline.load_state, pipeline.find_candidates, pipeline.build_features):
        stage(work)
    assert work.features is not None
    return work.features


def test_the_light_stage_keeps_the_best_by_the_wide_part_and_scores_them_alike() -> None:
    _, pipeline, scorer, ids = world()
    asked = features(pipeline, ids)
    (everything,) = scorer.predict([asked])
    kept, all_of_them = scorer.rank(asked, len(ids))
    assert kept.tolist() == list(range(len(ids)))
    np.testing.assert_array_equal(all_of_them, everything)
    kept, some = scorer.rank(asked, 15)
    # An untrained network adds nothing to the wide part: the stage's order is the final one.
    assert set(kept.tolist()) == set(np.argsort(-scorer.value(everything))[:15].tolist())
    np.testing.assert_allclose(some, everything[kept], rtol=1e-6)


@pytest.mark.parametrize("full", [1, 200])
def test_a_list_is_the_same_however_many_the_network_scores(full: int) -> None:
    """With an untrained network; and never are fewer scored than are shown or drawn from."""
    _, pipeline, _, ids = world(full_candidates=full, draw_pool=2)
    answer = pipeline.recommend(Request(request_id="r", user_id="u", n=30, candidates=ids), 1000)
    _, reference, _, _ = world(full_candidates=60, draw_pool=2)
    expected = reference.recommend(Request(request_id="r", user_id="u", n=30, candidates=ids), 1000)
    assert [item.item_id for item in answer.items] == [item.item_id for item in expected.items]
    assert len(answer.items) == 30
