"""Retrieval generations: frozen towers and an index of every item's vector, swapped whole; new and changed items in an exact buffer."""

from __future__ import annotations

import copy
import threading
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from recsys.config import Config
from recsys.features.build import UserFeatures
from recsys.features.catalogue import Catalogue
from recsys.features.schema import Schema
from recsys.model.two_tower import TwoTower
from recsys.ranking.scorer import Scorer
from recsys.retrieval.index import ItemIndex
from recsys.retrieval.searcher import Searcher
from recsys.types import Bool, Float32, Int32

CHUNK = 2000
"""Items whose vectors are computed at once: half doubles the look-ups, double holds a scoring core for longer."""
NEW_SHARE = 0.01
"""New items that call for the next generation, as a share of the catalogue."""

LOADING_S = 5.0
"""While a catalogue is being loaded generations follow each other this fast: its items fill the exact buffer, which is searched one by one."""


@dataclass(frozen=True, slots=True)
class _Generation:
    name: str
    towers: TwoTower
    searcher: Searcher
    built_s: float
    num_items: int


class Generations:
    """The generation in use. `build` and `refresh` belong to one thread; `changed` and `search` may run beside it."""

    def __init__(self, config: Config, schema: Schema, catalogue: Catalogue, scorer: Scorer) -> None:
        self._schema, self._catalogue, self._scorer = schema, catalogue, scorer
        self._rebuild_s, self._buffer = config.retrieval.rebuild_s, config.retrieval.exact_buffer
        self._wanted = bool(config.retrieval.sources.get("nearest")) and config.training.two_tower
        self._current: _Generation | None = None
        self._changed: set[int] = set()
        self._lock = threading.Lock()
        self._count = 0

    @property
    def name(self) -> str:
        return self._current.name if self._current else ""

    @property
    def num_items(self) -> int:
        return self._current.num_items if self._current else 0

    def age_s(self, now_s: float) -> float:
        """Seconds since the generation in use was built; 0 before the first."""
        return now_s - self._current.built_s if self._current else 0.0

    def due(self, now_s: float) -> bool:
        """Whether a (first or next) generation should be built: there are trained towers and items, and time or growth call for it."""
        if not self._wanted or not self._scorer.dense_version or not self._catalogue.num_alive:
            return False
        current = self._current
        if current is None:
            return True
        grown = len(self._catalogue) - current.num_items > max(100, NEW_SHARE * current.num_items)
        outgrown = len(self._catalogue) > 1.5 * current.num_items + 100
        wait_s = LOADING_S if outgrown else self._rebuild_s / 10 if grown else self._rebuild_s
        return now_s - current.built_s >= wait_s

    def build(self, now_s: float) -> None:
        """Build the next generation beside the one in use, then swap."""
        towers = copy.deepcopy(self._scorer.towers).eval()
        rows = np.flatnonzero(self._catalogue.alive[: len(self._catalogue)]).astype(np.int32)
        with self._lock:
            self._changed.clear()
        vectors = [self._vectors(rows[start : start + CHUNK], towers) for start in range(0, len(rows), CHUNK)]
        kept, unit = self._usable(rows, np.concatenate(vectors)) if vectors else (rows, np.zeros((0, 1), np.float32))
        self._count += 1
        index = ItemIndex.build(kept, unit)
        self._current = _Generation(
            f"g{self._count}", towers, Searcher(index, self._buffer), now_s, len(self._catalogue)
        )

    def _vectors(self, rows: Int32, towers: TwoTower) -> Float32:
        return self._scorer.item_vectors(self._catalogue.keys[rows], self._catalogue.mask[rows], towers)

    @staticmethod
    def _usable(rows: Int32, vectors: Float32) -> tuple[Int32, Float32]:
        """Without items whose vector has no direction."""
        norms = np.linalg.norm(vectors, axis=1)
        usable = np.isfinite(norms) & (norms > 0)
        return rows[usable], vectors[usable]

    def changed(self, row: int) -> None:
        """An item was upserted or deleted: a delete holds at once, a vector follows with `refresh`."""
        if row < 0 or self._current is None:
            return
        if not self._catalogue.alive[row]:
            self._current.searcher.delete(row)
            return
        with self._lock:
            self._changed.add(row)

    def refresh(self) -> None:
        """Vectors of new and changed items into the exact buffer."""
        with self._lock:
            changed, self._changed = sorted(self._changed), set()
        current = self._current
        if current is None or not changed:
            return
        for start in range(0, len(changed), CHUNK):
            rows = np.array(changed[start : start + CHUNK], np.int32)
            rows = rows[self._catalogue.alive[rows]]
            current.searcher.put(*self._usable(rows, self._vectors(rows, current.towers)))

    def search(
        self, user: UserFeatures, k: int, exclude: Collection[int] = (), allowed: Bool | None = None
    ) -> tuple[Int32, Float32] | None:
        """The k allowed items nearest to the user in the generation in use; None when there is none, or nothing is known of the user."""
        current = self._current
        if current is None:
            return None
        vector = self._scorer.user_vector(user, current.towers)
        if vector is None or not np.isfinite(vector).all():
            return None
        rows, scores = current.searcher.search(vector, k, exclude, allowed)
        return rows.astype(np.int32), scores.astype(np.float32)
