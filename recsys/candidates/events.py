"""What happens, in log order: judged once, counted at items that are known, held for those that are not."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from recsys import metrics
from recsys.candidates.base import Arrays, Counted, Parts
from recsys.candidates.contexts import Contexts, Shared
from recsys.candidates.counter_feed import CounterFeed
from recsys.candidates.item_counts import ItemCounts
from recsys.candidates.limits import NEWCOMER, Limits, is_newcomer
from recsys.candidates.quotas import Quotas
from recsys.candidates.sessions import Sessions
from recsys.candidates.waiting_counts import Count
from recsys.capacity import bound_bytes
from recsys.events.recent import recent_limit
from recsys.events.seen_ids import Kind, SeenIds
from recsys.keys import key_of, key_of_once
from recsys.types import Feedback, HistoryEvent, Impression

_NO_ROW = -2
COUNTED = (Kind.EVENT, Kind.REQUEST, Kind.POSITIVE)
"""Of these ids the counters hold what they are of: they are saved and cleared together."""


class Events:
    """Impressions and feedback of one ranking process. One writer; readers share its owner's lock."""

    def __init__(self, parts: Parts, lock: threading.RLock, tell: Callable[[Counted], None]) -> None:
        """`tell`: called with each event that sources count."""
        self._parts, self._lock, self._tell = parts, lock, tell
        self._config, self._catalogue = parts.config, parts.catalogue
        self.seen = SeenIds(parts.config.capacity.memory_bytes)
        """What the process saw of late. Reading from the log, this one remembers events, requests and positives."""
        self.sessions = Sessions(parts.config, parts.catalogue)
        self.on_forgotten: Callable[[int], None] = lambda user_key: None
        """Called with the key of each user to be forgotten."""
        self.clear()

    def clear(self) -> None:
        """Begin anew: nothing was seen or counted."""
        retrieval, memory = self._config.retrieval, self._config.capacity.memory_bytes
        self.seen.clear(*COUNTED)
        self.counting = CounterFeed(*self._parts, self.seen)
        contexts = bound_bytes(memory, "contexts") * 3 // 4
        self.contexts = Contexts(self._parts.schema, contexts, sources=retrieval.learn_quotas)
        self.quotas = Quotas(retrieval.sources, learn=retrieval.learn_quotas)
        self._acted, self._showed = Limits(recent_limit(memory)), Limits(recent_limit(memory))
        self.items = ItemCounts(self._parts, self.counting, self._tell)

    def feedback(self, feedback: Feedback, history: Sequence[HistoryEvent], event: HistoryEvent, now_ms: int) -> bool:
        """Count one feedback; `history` is the user's, `event` this feedback in it. False for a duplicate."""
        with self._lock:
            if not self.seen.first(Kind.EVENT, feedback.event_id, now_ms):
                return False
            if feedback.type == "view":
                self._viewed(feedback, now_ms)
            counted, counting = feedback.type in self.sessions.types, self.counting
            if not counted and not counting.may_count(feedback):
                return True
            weight = self._weight(feedback, history, now_ms)
            if not weight:
                metrics.NOT_COUNTED.labels("user_limit").inc()
                return True
            before = self.sessions.before(history, event) if counted else None
            values, shared = counting.positives(feedback, now_ms), self.contexts.of(feedback)
            if values and self.contexts.wait(feedback, Count(now_ms, weight, values, shared)):
                values = []
            values += counting.others(feedback, bool(before))
            self.items.count(feedback.item_id, Count(now_ms, weight, values, shared, before))
            if counted:
                self.quotas.acted(self.contexts.acted(feedback), now_ms)
        return True

    def _weight(self, feedback: Feedback, history: Sequence[HistoryEvent], now_ms: int) -> float:
        """How much of a count this feedback is; 0 where its user had their say on the item."""
        item_id, new = feedback.item_id, is_newcomer(history, feedback.item_id)
        most = 1 if new else self._config.feedback.user_limit
        if not self._acted.admit(key_of_once(f"{feedback.user_id}\n{item_id}"), most, now_ms):
            return 0.0
        return NEWCOMER if new else 1.0

    def impression(self, impression: Impression, now_ms: int) -> bool:
        """Count one impression's items as shown, the deferred ones once they are viewed; False for a duplicate."""
        with self._lock:
            if not self.seen.first(Kind.REQUEST, impression.request_id, now_ms):
                return False
            shared = self.contexts.shared(impression, now_ms)
            if impression.activation != "deferred":
                for item in impression.items:
                    self.quotas.shown(item.sources, now_ms)
                self._shown([item.item_id for item in impression.items], shared, now_ms)
            return True

    def _shown(self, item_ids: Sequence[str], shared: Shared, now_ms: int) -> None:
        """Count items as shown to a user, each so often within an hour as one user counts."""
        keys = np.fromiter(map(key_of, item_ids), np.int64, len(item_ids))
        most = self._config.feedback.user_limit
        admitted = self._showed.admit_items(int(shared[0][0]), keys, most, now_ms)
        count, rows = Count(now_ms, values=("shown",), shared=shared), self._catalogue.rows_of(keys)
        if not all(admitted):
            rows = np.where(admitted, rows, _NO_ROW).astype(np.int32)
        self.counting.count(count, rows[rows >= 0])
        for place in np.flatnonzero(rows == -1).tolist():
            self.items.count(item_ids[place], count)

    def _viewed(self, feedback: Feedback, now_ms: int) -> None:
        """A view: where the impression was deferred, now the item counts as shown, and so does what already happened to it."""
        waited = self.contexts.viewed(feedback)
        if waited is not None:
            self.quotas.shown(self.contexts.sources_of(feedback), now_ms)
            self._shown([feedback.item_id], self.contexts.of(feedback), now_ms)
            for count in waited:
                self.items.count(feedback.item_id, count)

    def forget(self, user_id: str) -> None:
        """Drop what is counted of a user as a person; anonymous item counts stay."""
        with self._lock:
            self.counting.forget(key_of(user_id))
            self.items.held.forget(key_of(user_id))
        self.on_forgotten(key_of(user_id))

    @property
    def full_ratio(self) -> float:
        """How full the fullest set of ids is."""
        return max(part.full_ratio for part in (self.seen, self._acted, self._showed))

    def state(self) -> dict[str, Arrays]:
        """Everything, as arrays."""
        return {
            **{kind.value: dict(self.seen.state(kind)) for kind in COUNTED},
            "contexts": self.contexts.state(),
            "acted": self._acted.state(),
            "showed": self._showed.state(),
            "held": self.items.held.state(),
            **self.counting.state(),
        }

    def restore(self, state: Mapping[str, Arrays], **times: int) -> None:
        """Load `state`; `times`: see `ForwardDecay.restore`. Then `items.release_known`."""
        for kind in COUNTED:
            self.seen.restore(kind, state[kind.value])
        self.seen.set_back(times["latest_ms"])
        self.contexts.restore(state["contexts"], times["latest_ms"])
        self.counting.restore(dict(state), **times)
        for name, part in (("acted", self._acted), ("showed", self._showed), ("held", self.items.held)):
            if name in state:  # earlier versions had none
                part.restore(state[name], times["latest_ms"])

    def tell(self) -> None:
        """Say how full what is bounded here is."""
        metrics.CONTEXTS_FULL.set(self.contexts.full_ratio)
        metrics.HELD_FULL.set(self.items.held.full_ratio)
