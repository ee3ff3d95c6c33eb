"""The generated world as ranking sees it after some clicks: counted, its towers trained, its bandit learning; no services."""

from __future__ import annotations

import numpy as np

from recsys.bandit.graph import Published
from recsys.candidates.explorer import Bandit
from recsys.candidates.generation import CHUNK, Generations, Located, usable
from recsys.candidates.sources import Sources
from recsys.config import Config
from recsys.features.build import UserFeatures
from recsys.features.catalogue import Catalogue
from recsys.features.schema import Schema
from recsys.model import fused, networks, scoring
from recsys.model.layouts import layouts
from recsys.parameters.in_process import OwnNetworks, OwnRows
from recsys.ranking.pipeline import Pipeline
from recsys.ranking.request import Request
from recsys.ranking.scorer import Scorer
from recsys.ranking.stages import Opened
from recsys.retrieval.item_index import ItemIndex
from recsys.state.memory_state import MemoryState
from recsys.table.tables import Tables
from recsys.testing.vectors import near
from recsys.testing.world import World
from recsys.training.bandit_learner import BanditLearner
from recsys.training.tower_learner import TowerLearner
from recsys.types import Feedback, Float32, HistoryEvent, UserUpdate

LOOKED_AT = 16
"""Items that a user looks at before the next user comes."""
STEP_MS = 1000
START_MS = 1_700_000_000_000


class _Placed(Generations):
    """Items lie at vectors [N, D] given, and each user near one of them, whatever the towers say."""

    def __init__(self, config: Config, catalogue: Catalogue, scorer: Scorer, bandit: Bandit, vectors: Float32) -> None:
        super().__init__(config, catalogue, scorer, bandit=bandit)
        self._vectors, self._of_user = vectors, dict[int, Float32]()

    def build(self, now_s: float) -> None:
        job = self.begin()
        self.finish(job, ItemIndex.build(*usable(job.rows, self._vectors)), now_s)

    def locate(self, user: UserFeatures) -> Located | None:
        located, key = super().locate(user), int(user.shared_keys[0])
        if key not in self._of_user:
            self._of_user[key] = near(self._vectors, 1, seed=len(self._of_user))[0]
        return located and located._replace(vector=self._of_user[key])


class TrainedWorld:
    """Users look at random items and click as the world says; each click is counted and learned from. `bandit` is a source."""

    def __init__(
        self,
        config: Config,
        *,
        num_items: int,
        num_clicks: int,
        num_users: int = 200,
        seed: int = 0,
        vectors: Float32 | None = None,
    ) -> None:
        """`vectors`: where items lie [num_items, tower_dim], and users near them, instead of where the towers say."""
        fused.warm_up()  # as a service does
        scoring.warm_up()
        self._world = World(seed, num_users=num_users, num_items=num_items)
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
        self._explorer = BanditLearner(config, tables)
        own = OwnNetworks(
            config,
            networks.arrays(networks.ranker(config, schema)),
            networks.arrays(self._learner.model),
            lambda: Published.of(self._explorer.published()),
        )
        self.scorer = Scorer(config, schema, OwnRows(tables), own)
        self._bandit = Bandit(config, self.sources.catalogue, self.scorer)
        parts = config, self.sources.catalogue, self.scorer
        self.generations = (
            Generations(*parts, bandit=self._bandit) if vectors is None else _Placed(*parts, self._bandit, vectors)
        )
        self.pipeline = Pipeline(config, schema, self._store, self.sources, self.scorer, self.generations, self._bandit)

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
            self.sources.events.feedback(feedback, self._store.history(name), event, self.now_ms)
            self._learner.feedback(feedback, self.now_ms)
            self._store.apply([UserUpdate(user_id=name, events=(event,))], {})

    def any_user(self) -> str:
        """A user at random."""
        return self._world.users[self._world.any_user()]

    def explore(self, num_requests: int) -> None:
        """Build a generation, answer random users over it, and let the bandit learn from what they click."""
        self.generations.build(self.now_ms / 1000)
        for number in range(num_requests):
            self._answer(f"explored-{number}")

    def _answer(self, request_id: str) -> None:
        self.now_ms += STEP_MS
        user = self._world.any_user()
        gathered = self.pipeline.gather(self.opened(self._world.users[user], request_id))
        # Without features: nobody trained the ranker, the sources' own scores rank.
        impression = self.pipeline.show(self.pipeline.score(gathered, None)).impression
        if (served := self._explorer.served(impression)) is None:
            return
        self._explorer.impression(impression, served, self.now_ms)
        shown = [item.item_id for item in impression.items]
        for item_id, clicked in zip(shown, self._world.clicks(user, shown), strict=True):
            if clicked:
                event = Feedback(
                    event_id=f"{request_id} {item_id}",
                    user_id=impression.user_id,
                    item_id=item_id,
                    type="click",
                    time_ms=self.now_ms,
                    request_id=request_id,
                )
                self._explorer.feedback(event, self.now_ms)
        self._explorer.step(self.now_ms, learn=True)
        self.scorer.refresh()
        self._bandit.refresh()

    def opened(self, user_id: str, request_id: str = "r") -> Opened:
        """A request whose history is loaded."""
        return self.pipeline.open(Request(request_id=request_id, user_id=user_id), self.now_ms)

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
        users: list[UserFeatures] = [self.pipeline.user_of(self.opened(self.any_user())) for _ in range(count)]
        vectors = (self.scorer.user_vector(user, self.scorer.towers) for user in users)
        return np.stack([vector for vector in vectors if vector is not None])
