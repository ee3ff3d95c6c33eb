"""Retrieval generations: frozen towers and an index of every item's vector, swapped whole; new and changed items in an exact buffer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from recsys import metrics
from recsys.candidates.explorer import Bandit
from recsys.candidates.model_vectors import Vectors
from recsys.config import Config
from recsys.features.build import UserFeatures
from recsys.features.catalogue import Catalogue
from recsys.features.item_columns import set_rows
from recsys.model.tower_scoring import Towers
from recsys.retrieval.item_index import ItemIndex
from recsys.retrieval.searcher import Searcher
from recsys.types import Bool, Float32, Int32, Int64

CHUNK = 2000
"""Items whose vectors are computed at once: half doubles the look-ups, double holds a scoring core for longer."""
NEW_SHARE = 0.01
"""New items that call for the next generation, as a share of the catalogue."""
LOADING_S = 5.0
"""While a catalogue is being loaded generations follow each other this fast: its items fill the exact buffer, which is searched one by one."""
TOUCHED_S = 10.0
"""Items that were acted upon are placed anew this often: half doubles the look-ups, double lets them lie where they were for longer."""

ItemVectors = Callable[[Int64, Bool, Towers], Float32]
"""Item columns [n, I] and their mask to vectors [n, tower_dim]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a generation is built from: towers that no longer change, and the columns of the items alive."""

    name: str
    towers: Towers
    rows: Int32
    keys: Int64
    mask: Bool
    num_alive: int
    """How many rows there are to place: `rows` may be let go once they are handed over."""
    arrivals: int
    """How many items had ever come by then."""
    hubness: float
    """How sharply hubs are corrected; 0: not at all."""


def build_index(job: Job, item_vectors: ItemVectors) -> ItemIndex:
    """Every item's vector, and the index over them; without items whose vector has no direction."""
    vectors = np.empty((len(job.rows), job.towers.spec.tower_dim), np.float32)
    for start in range(0, len(job.rows), CHUNK):
        part = slice(start, start + CHUNK)
        vectors[part] = item_vectors(job.keys[part], job.mask[part], job.towers)
    return ItemIndex.build(*usable(job.rows, vectors), job.hubness)


def usable(rows: Int32, vectors: Float32) -> tuple[Int32, Float32]:
    """Without items whose vector has no direction."""
    norms = np.linalg.norm(vectors, axis=1)
    kept = np.isfinite(norms) & (norms > 0)
    return (rows, vectors) if kept.all() else (rows[kept], vectors[kept])


@dataclass(frozen=True, slots=True)
class Generation:
    """What users and items are compared in: one version of the towers, and the items' vectors by it."""

    name: str
    towers: Towers
    searcher: Searcher
    built_s: float
    num_items: int
    recall: float
    arrivals: int


class Placer:
    """Puts items beside an index, where their vectors by its towers are."""

    def __init__(self, catalogue: Catalogue, vectors: Vectors) -> None:
        self._catalogue, self._model = catalogue, vectors

    def living(self, rows: Iterable[int]) -> list[int]:
        """Those whose items are not deleted, in order."""
        return [row for row in sorted(rows) if self._catalogue.alive[row]]

    def put(self, searcher: Searcher, rows: Iterable[int], towers: Towers) -> None:
        """Into the exact buffer, those that are deleted or have no direction left out."""
        living = self.living(rows)
        for start in range(0, len(living), CHUNK):
            part = np.array(living[start : start + CHUNK], np.int32)
            vectors = self._model.item_vectors(self._catalogue.keys[part], self._catalogue.mask[part], towers)
            kept, vectors = usable(part, vectors)
            metrics.UNUSABLE_VECTORS.labels("item").inc(len(part) - len(kept))
            searcher.put(kept, vectors)
            for row in set(part.tolist()) - set(self.living(part.tolist())):
                searcher.delete(row)  # deleted while its vector was computed


class Located(NamedTuple):
    """A user's vector [tower_dim] in a generation (of several interests [K, tower_dim])."""

    generation: Generation
    vector: Float32

    def search(
        self, k: int, exclude: Collection[int] | Int32 = (), allowed: Bool | None = None
    ) -> tuple[Int32, Float32]:
        """The k allowed items nearest to the user."""
        rows, scores = self.generation.searcher.search(self.vector, k, exclude, allowed)
        return rows.astype(np.int32), scores.astype(np.float32)


class Generations:
    """The generation in use. `begin`, `finish`, `build` and `refresh` belong to one thread; all else may run beside it."""

    def __init__(
        self, config: Config, catalogue: Catalogue, vectors: Vectors, prefix: str = "g", bandit: Bandit | None = None
    ) -> None:
        self._catalogue, self._model, self._bandit = catalogue, vectors, bandit
        self._placer = Placer(catalogue, vectors)
        self._rebuild_s, self._buffer = config.retrieval.rebuild_s, config.retrieval.exact_buffer
        nearest = bool(config.retrieval.sources.get("nearest")) and config.training.two_tower
        self._wanted = nearest or config.explores
        self._hubness = config.retrieval.hubness
        self._current: Generation | None = None
        self._changed: set[int] = set()
        self._since: set[int] | None = None
        """Rows changed since the job under way began; None: there is none."""
        self._touched: set[int] = set()
        self._touched_s = 0.0
        self._lock = threading.Lock()
        self._prefix, self._count = prefix, 0

    @property
    def name(self) -> str:
        return self._current.name if self._current else ""

    @property
    def num_items(self) -> int:
        return self._current.num_items if self._current else 0

    @property
    def num_buffered(self) -> int:
        """Items compared exactly beside the index."""
        return self._current.searcher.num_buffered if self._current else 0

    @property
    def recall(self) -> float:
        """The recall@100 that the index in use had when it was built; 0 before the first."""
        return self._current.recall if self._current else 0.0

    def age_s(self, now_s: float) -> float:
        """Seconds since the generation in use was built; 0 before the first."""
        return now_s - self._current.built_s if self._current else 0.0

    def due(self, now_s: float) -> bool:
        """Whether a (first or next) generation should be built: there are trained towers and items, and time or growth call for it."""
        if not self._wanted or not self._model.dense_version or not self._catalogue.num_alive:
            return False
        current = self._current
        if current is None:
            return True
        new = self._catalogue.arrivals - current.arrivals
        grown = new > max(100, NEW_SHARE * current.num_items)
        outgrown = new > 0.5 * current.num_items + 100
        wait_s = LOADING_S if outgrown else self._rebuild_s / 10 if grown else self._rebuild_s
        return now_s - current.built_s >= wait_s

    def begin(self) -> Job:
        """What the next generation is to be built from; from now on `finish` knows what changed meanwhile."""
        with self._lock:
            self._since = set()
            self._count += 1
        arrivals, size = self._catalogue.arrivals, len(self._catalogue)
        with self._catalogue.reading():
            rows = set_rows(self._catalogue.alive[:size]).astype(np.int32)
            every = slice(0, size) if len(rows) == size else rows
            keys, mask = self._catalogue.keys[every], self._catalogue.mask[every]
        return Job(
            name=f"{self._prefix}{self._count}",
            towers=self._model.towers.copied(),
            rows=rows,
            keys=keys,
            mask=mask,
            num_alive=len(rows),
            arrivals=arrivals,
            hubness=self._hubness,
        )

    def finish(self, job: Job, index: ItemIndex, now_s: float) -> None:
        """Put what changed since `begin` beside the index, then use it with the job's towers from the next search on."""
        searcher = Searcher(index, self._buffer)
        with self._catalogue.reading():
            self._finish(job, index, searcher, now_s)

    def _finish(self, job: Job, index: ItemIndex, searcher: Searcher, now_s: float) -> None:
        with self._lock:
            since, self._since = self._since or set(), set()
        for row in since:
            searcher.delete(row)  # it may be another item's by now
        metrics.UNUSABLE_VECTORS.labels("item").inc(job.num_alive - len(index))
        self._placer.put(searcher, since, job.towers)
        if self._bandit is not None:
            self._bandit.prepare(job.name, searcher, job.towers, self._placer.living(since))
        with self._lock:
            missed, self._since = self._since, None
            self._changed = missed  # the next `refresh` brings them
            for row in missed:
                searcher.delete(row)
            self._current = Generation(job.name, job.towers, searcher, now_s, job.num_alive, index.recall, job.arrivals)

    def build(self, now_s: float) -> None:
        """Build the next generation here and now, then swap: in a replay. Live, a process of its own does it."""
        job = self.begin()
        self.finish(job, build_index(job, self._model.item_vectors), now_s)

    def changed(self, row: int) -> None:
        """An item was upserted or deleted: a delete holds at once, a vector follows with `refresh`."""
        if row < 0:
            return
        with self._lock:
            if self._since is not None:
                self._since.add(row)
            if self._current is None:
                return
            if self._catalogue.alive[row]:
                self._changed.add(row)
            else:
                self._current.searcher.delete(row)

    def touched(self, row: int) -> None:
        """An item was acted upon, so that its rows are being trained: it is placed anew before long, unless too many were."""
        with self._lock:
            if len(self._touched) < self._buffer // 2:
                self._touched.add(row)

    def refresh(self, now_s: float) -> None:
        """Vectors of new and changed items into the exact buffer, at times also of touched ones while half of it is free."""
        with self._lock:
            current, changed, self._changed = self._current, self._changed, set()
            new = list(changed)
            if current is not None and now_s - self._touched_s >= TOUCHED_S:
                room = max(0, self._buffer // 2 - current.searcher.num_buffered - len(changed))
                changed.update(sorted(self._touched)[:room])
                self._touched, self._touched_s = set(), now_s
        if current is not None and changed:
            with self._catalogue.reading():
                self._placer.put(current.searcher, changed, current.towers)
                if self._bandit is not None:
                    self._bandit.arrived(current.name, self._placer.living(new), current.towers)

    def locate(self, user: UserFeatures) -> Located | None:
        """Where the user is in the generation in use; None when there is none, nothing is known of the user, or their vector has no
        direction."""
        current = self._current
        if current is None:
            return None
        vector = self._model.user_vector(user, current.towers)
        if vector is not None and not (np.isfinite(vector).all() and vector.any(-1).all()):
            metrics.UNUSABLE_VECTORS.labels("user").inc()
            return None
        return None if vector is None else Located(current, vector)
