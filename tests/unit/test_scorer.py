"""Scoring: the light first stage, and that it changes no score of what it keeps."""

from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from recsys.candidates.sources import Sources
from recsys.config import Config, parse
from recsys.features.build import Features
from recsys.features.catalogue import Catalogue
from recsys.features.schema import Schema
from recsys.model import scoring
from recsys.model.layouts import layouts
from recsys.model.plan import Block
from recsys.model.torch_scoring import TorchScoring
from recsys.parameters.base import Reply
from recsys.parameters.deltas import Delta, RowDelta, Version
from recsys.parameters.store import ParameterStore
from recsys.ranking.pipeline import Pipeline
from recsys.ranking.request import Request
from recsys.ranking.scorer import Scorer
from recsys.state.memory_state import MemoryState
from recsys.table.base import Layout, Segment, SlotPolicy
from recsys.testing.world import World


def world(slate: Mapping[str, object] = {}, **ranking: object) -> tuple[Config, Pipeline, Scorer, tuple[str, ...]]:
    """Sixty items, and rows whose wide weights differ from item to item."""
    model = {"dim": 4, "expert_hidden": [8, 4], "attention": [8]}
    config = parse({"model": model, "ranking": ranking, "slate": slate})
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
    opened = pipeline.open(Request(request_id="r", user_id="u", candidates=ids), 1000)
    found = pipeline.describe(pipeline.gather(opened))
    assert found is not None
    return found


def test_the_light_stage_keeps_the_best_by_the_wide_part_and_scores_them_alike() -> None:
    _, pipeline, scorer, ids = world()
    asked = features(pipeline, ids)
    (everything,) = scorer.predict([asked])
    whole = scorer.rank(asked, len(ids))
    assert whole.kept.tolist() == list(range(len(ids)))
    np.testing.assert_allclose(whole.predictions, everything, rtol=1e-5)
    some = scorer.rank(asked, 15)
    # An untrained network adds nothing to the wide part: the stage's order is the final one.
    assert set(some.kept.tolist()) == set(np.argsort(-scorer.value(everything))[:15].tolist())
    np.testing.assert_allclose(some.predictions, everything[some.kept], rtol=1e-6)


def test_a_network_that_the_kernels_do_not_know_is_scored_by_torch_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    scoring.warm_up()
    expected = world()[1].recommend(Request(request_id="r", user_id="u", n=10), 1000)
    monkeypatch.setattr("recsys.model.packed.ACTIVATIONS", ("prelu",))
    _, pipeline, scorer, _ = world()
    assert isinstance(scorer.networks.current.scores, TorchScoring)
    assert "scored by torch, slower: the kernels have no activation 'dice'" in caplog.text
    answer = pipeline.recommend(Request(request_id="r", user_id="u", n=10), 1000)
    assert [item.item_id for item in answer.items] == [item.item_id for item in expected.items]
    assert answer.items[0].score == pytest.approx(expected.items[0].score, rel=1e-5) and not answer.degraded


@pytest.mark.parametrize("full", [1, 200])
def test_a_list_is_the_same_however_many_the_network_scores(full: int) -> None:
    """With an untrained network; and never are fewer scored than are shown or drawn from."""
    _, pipeline, _, ids = world({"draw_pool": 2}, full_candidates=full)
    answer = pipeline.recommend(Request(request_id="r", user_id="u", n=30, candidates=ids), 1000)
    _, reference, _, _ = world({"draw_pool": 2}, full_candidates=60)
    expected = reference.recommend(Request(request_id="r", user_id="u", n=30, candidates=ids), 1000)
    assert [item.item_id for item in answer.items] == [item.item_id for item in expected.items]
    assert len(answer.items) == 30


def test_a_reply_names_the_version_that_its_rows_are_of_when_a_delta_comes_in_between() -> None:
    """The first look is overtaken by a delta: what is answered is the second, whole."""
    layout = Layout(name="deep", segments=(Segment(name="deep", dim=1),), slots={0: SlotPolicy()}, capacity=1000)
    one = np.zeros(1, np.int32), np.array([5])

    class Overtaken(ParameterStore):
        looks = 0

        def _look(self, blocks: Sequence[Block]) -> Reply:
            reply = super()._look(blocks)
            self.looks += 1
            if self.looks == 1:
                self.apply(delta(2))
            return reply

    def delta(step: int) -> Delta:
        nothing = np.zeros(0, np.int32), np.zeros(0, np.int64)
        rows = RowDelta(
            layout="deep",
            slots=one[0],
            keys=one[1],
            values=np.full((1, 1), step, np.float32),
            last_seen_ms=np.zeros(1, np.int64),
            removed_slots=nothing[0],
            removed_keys=nothing[1],
            default_slots=nothing[0],
            default_values=np.zeros((0, 1), np.float32),
        )
        return Delta(version=Version(epoch=1, step=step), covers_ms=step, schema="s", rows=(rows,))

    store = Overtaken([layout], "s")
    store.apply(delta(1))
    reply = store.lookup([Block(layout="deep", slots=one[0], keys=one[1])])
    assert (reply.state.version.step, reply.values[0].tolist()) == (2, [[2.0]])
