"""The generated world as ranking sees it after some clicks: counted, its towers trained, its items placed; no services."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from recsys.config import Config
from recsys.features.build import UserFeatures
from recsys.features.catalogue import Catalogue
from recsys.features.schema import Schema
from recsys.model import build, fused
from recsys.model.layouts import layouts
from recsys.model.plan import Block
from recsys.ranking.generation import CHUNK, Generations
from recsys.ranking.parameters import ParameterState, Reply
from recsys.ranking.pipeline import Pipeline
from recsys.ranking.request import Request
from recsys.ranking.scorer import Scorer
from recsys.ranking.sources import Sources
from recsys.ranking.work import Work
from recsys.state.memory import MemoryState
from recsys.table.tables import Tables
from recsys.testing.world import World
from recsys.training.towers import TowerLearner
from recsys.types import Feedback, Float32, HistoryEvent, UserUpdate

LOOKED_AT = 16
"""Items that a user looks at before the next user comes."""
STEP_MS = 1000
START_MS = 1_700_000_000_000


class _Direct:
    """Parameters read straight from the learner's tables."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables

    def lookup(self, blocks: Sequence[Block]) -> Reply:
        values = tuple(self._tables[block.layout].lookup(block.slots, block.keys)[0] for block in blocks)
        return Reply(values=values, state=ParameterState())

    def dense(self) -> tuple[int, bytes]:
        return 0, b""


class TrainedWorld:
    """Users look at random items and click as the world says; each click is counted and learned from."""

    def __init__(self, config: Config, *, num_items: int, num_clicks: int, seed: int = 0) -> None:
        fused.warm_up()  # as a service does
        self._world = World(seed, num_items=num_items)
        schema, self._rng = Schema.of(config), np.random.default_rng(seed)
        self.sources = Sources(config, schema, Catalogue(schema))
        for item in self._world.items():
            self.sources.item(item)
        self._store = MemoryState(config.state.history_len, config.state.seen_len)
        tables = Tables(layouts(config, schema))
        self._learner = TowerLearner(config, schema, tables, self.sources.catalogue)
        self.now_ms, self._clicks = START_MS, 0
        while self._clicks < num_clicks:
            self._step()
        self.scorer = Scorer(config, schema, _Direct(tables))
        self.scorer.adopt(build.ranker(config, schema).eval(), self._learner.model.eval())
        self.generations = Generations(config, self.sources.catalogue, self.scorer)
        self.pipeline = Pipeline(config, schema, self._store, self.sources, self.scorer, self.generations)

    def _step(self) -> None:
        user = self._world.any_user()
        name = self._world.users[user]
        looked = [f"item-{n}" for n in self._rng.integers(len(self.sources.catalogue), size=LOOKED_AT)]
        for item_id, clicked in zip(looked, self._world.clicks(user, looked), strict=True):
            self.now_ms += STEP_MS
            if not clicked:
                continue
            self._clicks += 1
            number = str(self._clicks)
            feedback = Feedback(event_id=number, user_id=name, item_id=item_id, type="click", time_ms=self.now_ms)
            event = HistoryEvent(time_ms=self.now_ms, event_id=number, item_id=item_id, type="click")
            self.sources.feedback(feedback, self._store.get(name).history, event, self.now_ms)
            self._learner.feedback(feedback, self.now_ms)
            self._store.apply([UserUpdate(user_id=name, events=(event,))], {})

    def any_user(self) -> str:
        """A user at random."""
        return self._world.users[self._world.any_user()]

    def work(self, user_id: str) -> Work:
        """A request whose history is loaded."""
        work = Work(request=Request(request_id="r", user_id=user_id), now_ms=self.now_ms, deadline=float("inf"))
        self.pipeline.load_state(work)
        return work

    def item_vectors(self) -> Float32:
        """Every item's vector by the towers [N, D]."""
        catalogue, size = self.sources.catalogue, len(self.sources.catalogue)
        parts = [slice(start, min(start + CHUNK, size)) for start in range(0, size, CHUNK)]
        towers = self.scorer.towers
        return np.concatenate(
            [self.scorer.item_vectors(catalogue.keys[part], catalogue.mask[part], towers) for part in parts]
        )

    def user_vectors(self, count: int) -> Float32:
        """Vectors of random users as they are now [n, D]."""
        users: list[UserFeatures] = [self.pipeline.user_of(self.work(self.any_user())) for _ in range(count)]
        vectors = (self.scorer.user_vector(user, self.scorer.towers) for user in users)
        return np.stack([vector for vector in vectors if vector is not None])
