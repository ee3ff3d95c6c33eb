"""The sources and counters of one ranking process, fed by its state consumer or by replay."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from recsys import metrics
from recsys.candidates import mix
from recsys.candidates.base import Arrays, Counted, Parts
from recsys.candidates.covisited import CovisitedSource
from recsys.candidates.events import Events
from recsys.candidates.following import FollowingSource
from recsys.candidates.registry import made, one_of
from recsys.candidates.trending import TrendingSource
from recsys.candidates.visibility import EVERYTHING, Visibility
from recsys.clock import bounded_ms
from recsys.config import Config
from recsys.features.build import Signals, UserFeatures
from recsys.features.catalogue import Catalogue
from recsys.features.schema import Schema
from recsys.retrieval import select
from recsys.retrieval.covisits import CoVisits
from recsys.retrieval.top_counts import Trending
from recsys.types import Int32, Item

_POPULAR = 1000
"""Items that sources without a state of their own are told of after a restore."""
_LEAST = np.float32(0.001)
"""Added to what sources say together before its logarithm: a thousandth of a co-visit."""


class Sources:
    """Every source of candidates, and what they are fed with, over one catalogue. One writer; readers share its lock.

    Who changes anything holds `writing`, then `lock`. A snapshot holds `writing` alone: nothing changes meanwhile, and readers go on.
    """

    def __init__(
        self, config: Config, schema: Schema, catalogue: Catalogue, visibility: Visibility = EVERYTHING
    ) -> None:
        """`visibility`: how much of what was counted requests may know."""
        self.config, self._schema, self.catalogue = config, schema, catalogue
        self._visibility = visibility
        self.writing, self.lock = threading.RLock(), threading.RLock()
        select.warm_up()
        mix.warm_up()
        parts = Parts(config, schema, catalogue)
        self.by_name = made(parts)
        self._listed = list(self.by_name.values())
        self._trending, self._covisited = one_of(self.by_name, TrendingSource), one_of(self.by_name, CovisitedSource)
        self._following = one_of(self.by_name, FollowingSource)
        self.events = Events(parts, self.lock, self._counted)
        catalogue.on_free.append(self.forget_rows)
        self.on_counted: Callable[[int], None] = lambda row: None
        """Called with the row of each counted feedback."""

    @property
    def trending(self) -> Trending:
        """What is chosen most of late."""
        return self._trending.counts

    @property
    def covisits(self) -> CoVisits:
        """What is chosen together."""
        return self._covisited.counts

    def clear(self) -> None:
        """Begin to count anew. The catalogue and what its items are filed under stay."""
        with self.writing, self.lock:
            for source in self._listed:
                source.clear()
            self.events.clear()

    def _counted(self, event: Counted) -> None:
        if event.weight:
            self.on_counted(event.row)
        for source in self._listed:
            source.counted(event)

    def item(self, item: Item) -> int:
        """Upsert or delete in the catalogue and the attribute index; returns the row."""
        with self.writing, self.lock:
            row = self.catalogue.apply(item)
            if row >= 0:
                for source in self._listed:
                    if item.deleted:
                        source.deleted(row)
                    else:
                        source.changed(row)
                if not item.deleted:
                    self.events.items.release(item.item_id)
        return row

    def free_rows(self) -> None:
        """Let new items have the rows of items deleted long ago. The writer calls it, after changes."""
        with self.writing:
            self.catalogue.free_rows(self.lock)

    def forget_rows(self, rows: Int32) -> None:
        """These rows will be other items': nothing is kept by them. Called by the catalogue, which does not find them any more."""
        for source in self._listed:
            source.forget_rows(rows)

    def restore_catalogue(self, arrays: Mapping[str, Any]) -> None:
        """Load a catalogue's arrays, and file its items by their attributes."""
        with self.writing, self.lock:
            self.catalogue.restore(arrays)
            for source in self._listed:
                source.catalogue_restored()

    def signals(self, user: UserFeatures, history_rows: Sequence[int], rows: Int32, now_ms: int) -> Signals:
        """What the counters say about the items at `rows` for this user."""
        as_of_ms = self._visibility.as_of_ms(now_ms)
        with self.lock:
            trending, following = self.trending, self._following.following
            covisit = self.covisits.score(history_rows, rows, as_of_ms)
            follows = np.zeros((len(rows), 0), np.float32)
            if following is not None:
                quota = self.config.retrieval.sources.get(TrendingSource.name, 0)
                popular = TrendingSource.prior * trending.shares(rows, quota, as_of_ms) if quota else 0.0
                mixed = np.log(covisit + popular + _LEAST)[:, None]
                shared = user.shared_keys, user.shared_mask
                follows = np.concatenate([following.numbers(history_rows, shared, rows), mixed], 1)
            return Signals(
                counters=self.events.counting.numbers(user, rows, self._visibility, now_ms),
                popularity=trending.score(rows, as_of_ms),
                covisit=covisit,
                follows=follows,
            )

    def quotas_at(self, now_ms: int) -> dict[str, int]:
        """Most candidates of each source. From any thread."""
        with self.lock:
            return self.events.quotas.current(now_ms)

    def state(self) -> dict[str, Arrays]:
        """Everything but the catalogue, by rows of today's catalogue, for a snapshot. Its caller holds `writing`."""
        return {
            **{part: arrays for source in self._listed for part, arrays in source.state().items()},
            **self.events.state(),
        }

    def restore(self, state: dict[str, Arrays], row_map: Int32, now_ms: int, saved_ms: int = 0) -> None:
        """Load `state` of log time `saved_ms`; `row_map[old row]` is today's row, -1 where the item is gone. SnapshotCorrupt where it
        cannot be: then these sources are not to be used."""
        times = {"saved_ms": saved_ms, "latest_ms": bounded_ms(2**62, now_ms)}
        with self.writing, self.lock:
            for source in self._listed:
                source.restore(state, row_map, **times)
            self.events.restore(state, **times)
            popular = self.trending.top(_POPULAR, now_ms)
            for source in self._listed:
                source.popular(*popular)
            self.events.items.release_known()

    def tell(self) -> None:
        """Say how full what is bounded here is."""
        self.events.tell()
        metrics.COUNTERS_FULL.set(max(self.events.counting.counters.full_ratio, self.covisits.full_ratio))
