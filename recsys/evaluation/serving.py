"""The serving copy of a replay: the trainer's own parameters when live, else a copy fed with deltas as they become visible."""

from __future__ import annotations

from collections import deque

from recsys.bandit.graph import Published
from recsys.candidates.explorer import Bandit
from recsys.candidates.generation import Generations
from recsys.config import Config
from recsys.features.catalogue import Catalogue
from recsys.features.schema import Schema
from recsys.model import networks, scoring, specs, weights
from recsys.model.layouts import layouts
from recsys.parameters.deltas import Delta, Version
from recsys.parameters.in_process import OwnNetworks, OwnRows
from recsys.parameters.store import ParameterStore
from recsys.ranking.scorer import Scorer
from recsys.training.checkpoint import network_bytes
from recsys.training.publish import row_deltas
from recsys.training.trainer import Trainer


class ServingCopy:
    """Scorer and generations over what scoring may know."""

    def __init__(
        self,
        config: Config,
        schema: Schema,
        catalogue: Catalogue,
        trainer: Trainer | None,
        *,
        live: bool,
        each_step: bool,
    ) -> None:
        scoring.warm_up()  # so that no score depends on when compiling was done
        self._trainer, self._live, self._each_step = trainer, live, each_step
        self._store = ParameterStore(layouts(config, schema), schema.hash, config.table.implementation)
        self._later: deque[tuple[int, Delta]] = deque()
        self._captured = 0
        self.scorer = (
            Scorer(config, schema, OwnRows(trainer.tables), _networks_of(trainer))
            if live and trainer is not None
            else Scorer(config, schema, self._store)
        )
        self.bandit = Bandit(config, catalogue, self.scorer) if trainer is not None and config.explores else None
        wanted = trainer is not None and (config.explores or bool(config.retrieval.sources.get("nearest")))
        self.generations = Generations(config, catalogue, self.scorer, bandit=self.bandit) if wanted else None
        self._rebuild_ms = int(config.retrieval.rebuild_s * 1000)
        self._built_ms: int | None = None

    def learned(self, now_ms: int) -> None:
        """The trainer stepped at `now_ms`."""
        if not self._live and self._each_step:
            self.capture(now_ms)
        elif self._live:
            self.scorer.refresh()
            self._follow(now_ms)

    def capture(self, now_ms: int) -> None:
        """Remember what changed since the last capture, until it may be seen."""
        trainer = self._trainer
        if trainer is None or trainer.steps == self._captured:
            return
        self._captured = trainer.steps
        rows, acknowledge = row_deltas(trainer)
        delta = Delta(
            version=Version(epoch=1, step=trainer.steps),
            covers_ms=now_ms,
            schema=trainer.schema.hash,
            rows=rows,
            dense=network_bytes(trainer),
            dense_version=trainer.steps,
        )
        acknowledge()
        self._later.append((now_ms, delta))

    def _rebuild_due(self, now_ms: int) -> bool:
        due = self._built_ms is None or now_ms - self._built_ms >= self._rebuild_ms
        if due:
            self._built_ms = now_ms
        return due

    def behind(self, visible_ms: int) -> bool:
        """Whether `advance` would change anything."""
        return bool(self._later) and self._later[0][0] <= visible_ms

    def advance(self, visible_ms: int) -> None:
        """Apply every delta up to `visible_ms`."""
        while self.behind(visible_ms):
            self._store.apply(self._later.popleft()[1])
        self.scorer.poll()
        self.scorer.refresh()
        self._follow(visible_ms)

    def _follow(self, now_ms: int) -> None:
        """Generations and the bandit's graph go with the parameters."""
        if self.generations is not None and self._rebuild_due(now_ms):
            self.generations.build(now_ms / 1000)
        if self.bandit is not None:
            self.bandit.refresh()


def _networks_of(trainer: Trainer) -> OwnNetworks:
    spec = specs.two_tower(trainer.config, trainer.schema)
    untrained = weights.of_towers(spec, seed=trainer.config.seed)
    towers = networks.arrays(trainer.towers.model) if trainer.towers else untrained
    learner = trainer.bandit
    told = (lambda: Published.of(learner.published())) if learner else None
    return OwnNetworks(trainer.config, networks.arrays(trainer.learner.model), towers, told)
