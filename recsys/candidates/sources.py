"""The sources and counters of one ranking process, fed by its state consumer or by replay."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from recsys import metrics
from recsys.candidates import mix
from recsys.candidates.base import Arrays, Counted, Parts
from recsys.candidates.contexts import Shared
from recsys.candidates.counter_feed import CounterFeed
from recsys.candidates.covisited import CovisitedSource
from recsys.candidates.following import FollowingSource
from recsys.candidates.limits import NEWCOMER, Limits, is_newcomer
from recsys.candidates.quotas import Quotas
from recsys.candidates.registry import made, one_of
from recsys.candidates.trending import TrendingSource
from recsys.candidates.visibility import Everything, Visibility
from recsys.candidates.waiting_counts import Count, Held
from recsys.capacity import entries
from recsys.clock import bounded_ms
from recsys.config import Config
from recsys.events.recent import Recent, recent_limit
from recsys.features.build import Signals, UserFeatures
from recsys.features.catalogue import Catalogue
from recsys.features.schema import Schema
from recsys.keys import key_of
from recsys.retrieval import select
from recsys.retrieval.covisits import CoVisits
from recsys.retrieval.top_counts import Trending
from recsys.types import Feedback, HistoryEvent, Impression, Int32, Item

_POPULAR = 1000
"""Items that sources without a state of their own are told of after a restore."""
_NO_ROW = -2
_HELD_BYTES = 1500
"""Of a count that waits for its item."""
_LEAST = np.float32(0.001)
"""Added to what sources say together before its logarithm: a thousandth of a co-visit."""


class Sources:
    """Every source of candidates, and the counters, over one catalogue. One writer; readers share its lock."""

    def __init__(self, config: Config, schema: Schema, catalogue: Catalogue) -> None:
        self.config, self._schema, self.catalogue = config, schema, catalogue
        self._types = set(config.retrieval.count_types)
        self._gap_ms = int(config.retrieval.session_gap_s * 1000)
        self.lock = threading.RLock()
        select.warm_up()
        mix.warm_up()
        self.by_name = made(Parts(config, schema, catalogue))
        self._listed = list(self.by_name.values())
        self._trending, self._covisited = one_of(self.by_name, TrendingSource), one_of(self.by_name, CovisitedSource)
        self._following = one_of(self.by_name, FollowingSource)
        self._count_anew()
        catalogue.on_free.append(self.forget_rows)
        self.visibility: Visibility = Everything()
        """How much of what was counted requests may know."""
        self.on_counted: Callable[[int], None] = lambda row: None
        """Called with the row of each counted feedback."""
        self.on_forgotten: Callable[[int], None] = lambda user_key: None
        """Called with the key of each user to be forgotten."""

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
        with self.lock:
            for source in self._listed:
                source.clear()
            self._count_anew()

    def _count_anew(self) -> None:
        config, memory = self.config, self.config.capacity.memory_bytes
        self.counting = CounterFeed(config, self._schema, self.catalogue)
        self.quotas = Quotas(config.retrieval.sources, learn=config.retrieval.learn_quotas)
        self._seen = Recent(limit=recent_limit(memory))
        self._acted, self._showed = Limits(recent_limit(memory)), Limits(recent_limit(memory))
        self._held = Held(entries(memory, "held", _HELD_BYTES))

    def item(self, item: Item) -> int:
        """Upsert or delete in the catalogue and the attribute index; returns the row."""
        with self.lock:
            row = self.catalogue.apply(item)
            if row >= 0:
                for source in self._listed:
                    if item.deleted:
                        source.deleted(row)
                    else:
                        source.changed(row)
                if not item.deleted:
                    self._release(item.item_id)
        return row

    def free_rows(self) -> None:
        """Let new items have the rows of items deleted long ago. The writer calls it, after changes."""
        self.catalogue.free_rows(self.lock)

    def forget_rows(self, rows: Int32) -> None:
        """These rows will be other items': nothing is kept by them. Called by the catalogue, which does not find them any more."""
        for source in self._listed:
            source.forget_rows(rows)

    def _release(self, item_id: str) -> None:
        """Count what waited for an item that is known now."""
        for count in self._held.take(item_id):
            self._count(item_id, count)

    def restore_catalogue(self, arrays: Mapping[str, Any]) -> None:
        """Load a catalogue's arrays, and file its items by their attributes."""
        with self.lock:
            self.catalogue.restore(arrays)
            for source in self._listed:
                source.catalogue_restored()

    def feedback(self, feedback: Feedback, history: Sequence[HistoryEvent], event: HistoryEvent, now_ms: int) -> bool:
        """Count one feedback; `history` is the user's, `event` this feedback in it. False for a duplicate."""
        with self.lock:  # one cut for snapshots: remembered and counted, or neither
            if not self._seen.add(feedback.event_id, now_ms):
                return False
            if feedback.type == "view":
                self._viewed(feedback, now_ms)
            counted, counting = feedback.type in self._types, self.counting
            if not counted and not counting.may_count(feedback):
                return True
            weight = self._weight(feedback, history, now_ms)
            if not weight:
                metrics.NOT_COUNTED.labels("user_limit").inc()
                return True
            before = self._session(history, event) if counted else None
            count = Count(now_ms, weight, counting.positives(feedback, now_ms), counting.contexts.of(feedback))
            if count.values and counting.contexts.wait(feedback, count):
                count = count._replace(values=())
            others = counting.others(feedback, bool(before))
            self._count(feedback.item_id, count._replace(values=[*count.values, *others], before=before))
            if counted:
                self.quotas.acted(feedback.request_id, feedback.item_id, now_ms)
        return True

    def _weight(self, feedback: Feedback, history: Sequence[HistoryEvent], now_ms: int) -> float:
        """How much of a count this feedback is; 0 where its user had their say on the item."""
        item_id, new = feedback.item_id, is_newcomer(history, feedback.item_id)
        most = 1 if new else self.config.feedback.user_limit
        if not self._acted.admit(key_of(f"{feedback.user_id}\n{item_id}"), most, now_ms):
            return 0.0
        return NEWCOMER if new else 1.0

    def _count(self, item_id: str, count: Count) -> None:
        """Count at the item; where it is not known yet, when it is."""
        row = self.catalogue.row(item_id)
        if row is None:
            metrics.NOT_COUNTED.labels("unknown_item").inc(self._held.add(item_id, count))
            return
        if count.follower is not None:
            later = self.catalogue.row(count.follower[0])
            if later is not None:
                self._tell(Counted(later, [*[-1] * count.follower[1], row], count.now_ms, 0.0, None))
            return
        if count.values:
            self.counting.count(count, np.array([row], np.int32))
        if count.before is not None:
            self._event(item_id, row, count, count.before)

    def _event(self, item_id: str, row: int, count: Count, before: Sequence[str]) -> None:
        """An event that trending and co-visits count, after the session's earlier ones."""
        now_ms, known = count.now_ms, [self.catalogue.row(earlier) for earlier in before]
        self.on_counted(row)
        self._tell(Counted(row, [-1 if r is None else r for r in known], now_ms, count.weight, count.shared))
        for place, earlier in enumerate(before):
            if known[place] is None:
                self._count(earlier, Count(now_ms, follower=(item_id, place)))

    def _tell(self, event: Counted) -> None:
        for source in self._listed:
            source.counted(event)

    def impression(self, impression: Impression, now_ms: int) -> bool:
        """Count one impression's items as shown, the deferred ones once they are viewed; False for a duplicate."""
        with self.lock:
            if not self.counting.first(impression.request_id, now_ms):
                return False
            deferred = impression.activation == "deferred"
            items = ((item.item_id, item.sources) for item in impression.items)
            self.quotas.shown(impression.request_id, items, now_ms, deferred=deferred)
            shared = self.counting.contexts.shared(impression, now_ms)
            if not deferred:
                self._shown([item.item_id for item in impression.items], shared, now_ms)
            return True

    def _shown(self, item_ids: Sequence[str], shared: Shared, now_ms: int) -> None:
        """Count items as shown to a user, each so often within an hour as one user counts."""
        keys = np.fromiter(map(key_of, item_ids), np.int64, len(item_ids))
        most = self.config.feedback.user_limit
        admitted = self._showed.admit_items(int(shared[0][0]), keys, most, now_ms)
        count, rows = Count(now_ms, values=("shown",), shared=shared), self.catalogue.rows_of(keys)
        if not all(admitted):
            rows = np.where(admitted, rows, _NO_ROW).astype(np.int32)
        self.counting.count(count, rows[rows >= 0])
        for place in np.flatnonzero(rows == -1).tolist():
            self._count(item_ids[place], count)

    def _viewed(self, feedback: Feedback, now_ms: int) -> None:
        """A view: where the impression was deferred, now the item counts as shown, and so does what already happened to it."""
        contexts = self.counting.contexts
        waited = contexts.viewed(feedback)
        if waited is not None:
            self.quotas.viewed(feedback.request_id, feedback.item_id, now_ms)
            self._shown([feedback.item_id], contexts.of(feedback), now_ms)
            for count in waited:
                self._count(feedback.item_id, count)

    def forget(self, user_id: str) -> None:
        """Drop what is counted of a user as a person; anonymous item counts stay."""
        with self.lock:
            self.counting.forget(key_of(user_id))
            self._held.forget(key_of(user_id))
        self.on_forgotten(key_of(user_id))

    def session_rows(self, history: Sequence[HistoryEvent], event: HistoryEvent) -> list[int]:
        """Catalogue rows of the same session's earlier counted events, newest first, without the event's own item."""
        rows = (self.catalogue.row(item_id) for item_id in self._session(history, event))
        return [row for row in rows if row is not None]

    def _session(self, history: Sequence[HistoryEvent], event: HistoryEvent) -> list[str]:
        """Items of the same session's earlier counted events, newest first, without the event's own item."""
        item_ids: list[str] = []
        last_ms = event.time_ms
        for past in reversed(history):
            if past.place >= event.place:
                continue
            if event.session_id is not None and past.session_id is not None:
                if past.session_id != event.session_id:
                    break
            elif last_ms - past.time_ms > self._gap_ms:
                break
            last_ms = past.time_ms
            if past.item_id != event.item_id and past.type in self._types:
                item_ids.append(past.item_id)
            if len(item_ids) == self.config.retrieval.covisit_window:
                break
        return item_ids

    def signals(self, user: UserFeatures, history_rows: Sequence[int], rows: Int32, now_ms: int) -> Signals:
        """What the counters say about the items at `rows` for this user."""
        as_of_ms = self.visibility.as_of_ms(now_ms)
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
                counters=self.counting.numbers(user, rows, self.visibility, now_ms),
                popularity=trending.score(rows, as_of_ms),
                covisit=covisit,
                follows=follows,
            )

    def quotas_at(self, now_ms: int) -> dict[str, int]:
        """Most candidates of each source. From any thread."""
        with self.lock:
            return self.quotas.current(now_ms)

    def knows(self, event_id: str | int) -> bool:
        """Whether this feedback was read within the horizon. From any thread."""
        return self._seen.contains(event_id)

    def too_late(self, own_ms: int, now_ms: int) -> bool:
        """Whether what happened at `own_ms` may be a copy of what nobody remembers. From any thread."""
        return not self._seen.covers(own_ms, now_ms)

    @property
    def full_ratio(self) -> float:
        """How full the fullest set of ids is."""
        return max(part.full_ratio for part in (self._seen, self._acted, self._showed, self.counting))

    def answered(self, request_id: str | int) -> bool:
        """Whether the impression of this request was read within the horizon. From any thread."""
        return self.counting.knows(request_id)

    def seen(self) -> Arrays:
        """Digests of the feedback events counted of late, as `Recent.restore` takes them."""
        with self.lock:
            return dict(self._seen.state())

    def state(self) -> dict[str, Arrays]:
        """Everything but the catalogue, by rows of today's catalogue, for a snapshot."""
        with self.lock:
            return {
                **{part: arrays for source in self._listed for part, arrays in source.state().items()},
                "seen": self.seen(),
                "acted": self._acted.state(),
                "showed": self._showed.state(),
                "held": self._held.state(),
                **self.counting.state(),
            }

    def restore(self, state: dict[str, Arrays], row_map: Int32, now_ms: int, saved_ms: int = 0) -> None:
        """Load `state` of log time `saved_ms`; `row_map[old row]` is today's row, -1 where the item is gone. SnapshotCorrupt where it
        cannot be: then these sources are not to be used."""
        times = {"saved_ms": saved_ms, "latest_ms": bounded_ms(2**62, now_ms)}
        with self.lock:
            for source in self._listed:
                source.restore(state, row_map, **times)
            self._seen.restore(state["seen"])
            self.counting.restore(state, **times)
            popular = self.trending.top(_POPULAR, now_ms)
            for source in self._listed:
                source.popular(*popular)
            for name, part in (("acted", self._acted), ("showed", self._showed), ("held", self._held)):
                if name in state:  # earlier versions had none
                    part.restore(state[name], times["latest_ms"])
            for item_id in self._held.item_ids:
                if self.catalogue.row(item_id) is not None:
                    self._release(item_id)

    def tell(self) -> None:
        """Say how full what is bounded here is."""
        metrics.CONTEXTS_FULL.set(self.counting.contexts.full_ratio)
        metrics.COUNTERS_FULL.set(max(self.counting.counters.full_ratio, self.covisits.full_ratio))
        metrics.HELD_FULL.set(self._held.full_ratio)
