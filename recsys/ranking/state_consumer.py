"""The one writer of user state and counters: events from HTTP and Kafka alike, in log order."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from recsys import metrics
from recsys.clock import Clock
from recsys.config import Config
from recsys.errors import BadInput
from recsys.events import messages
from recsys.ranking.request import AsOf
from recsys.ranking.sources import Sources
from recsys.state.base import StateStore
from recsys.streams.base import EventLog
from recsys.types import FORGET, Feedback, HistoryEvent, Record, UserUpdate

Histories = dict[str, tuple[HistoryEvent, ...]]
TOPICS = ("impression", "feedback")
READ_LIMIT = 1000
"""Records of one transaction: half makes a backlog slower, double holds freshness back."""


class StateConsumer:
    """Applies impressions and feedback to the state store (position in the store) and the sources (position in a snapshot)."""

    def __init__(
        self,
        config: Config,
        log: EventLog,
        clock: Clock,
        store: StateStore,
        sources: Sources,
        on_bad: Callable[[Record, str], None],
    ) -> None:
        self._clock = clock
        self._log, self._store, self._sources, self._on_bad = log, store, sources, on_bad
        self._history_types = set(config.features.history_types)
        self._partitions = [(topic, p) for topic in TOPICS for p in range(log.partitions(topic))]
        self.counter_positions = {f"{t}/{p}": log.begin(t, p) for t, p in self._partitions}
        self.user_state = AsOf()
        self.counters = AsOf()

    def turn(self) -> int:
        """Read and apply what is new; returns how many records. Raises LogUnavailable, StateUnavailable: then call again."""
        started_ms = self._clock.now_ms()
        stored = self._store.positions()
        count, behind = 0, False
        for topic, partition in self._partitions:
            key = f"{topic}/{partition}"
            saved = stored.get(key)
            begin = self._log.begin(topic, partition) if saved is None else saved
            records = self._log.read(topic, partition, min(begin, self.counter_positions[key]), READ_LIMIT)
            if not records:
                continue
            end = records[-1].offset + 1
            self.apply(records, store_from=begin, count_from=self.counter_positions[key], key=key)
            self.counter_positions[key] = max(self.counter_positions[key], end)
            stored[key] = max(begin, end)
            count += len(records)
            behind |= len(records) == READ_LIMIT
        if not behind:
            # Every partition was read to its end: all that was appended before this turn began is in.
            self.user_state = AsOf(positions=stored, time_ms=started_ms - 1)
            self.counters = AsOf(positions=dict(self.counter_positions), time_ms=started_ms - 1)
        return count

    def apply(self, records: Sequence[Record], *, store_from: int, count_from: int, key: str) -> None:
        """Records of one partition: to the store from offset `store_from` on, to the counters from `count_from` on."""
        updates: list[UserUpdate] = []
        histories: Histories = {}
        for record in records:
            try:
                update = self._take(record, histories, counted=record.offset >= count_from)
            except BadInput as error:
                self._on_bad(record, str(error))
                continue
            if update is not None and record.offset >= store_from:
                updates.append(update)
        if records[-1].offset >= store_from:
            self._store.apply(updates, {key: records[-1].offset + 1})
        now_ms = self._clock.now_ms()
        for record in records:
            if record.topic == "feedback":
                age_s = max(0, now_ms - record.time_ms) / 1000
                if record.offset >= store_from:
                    metrics.FRESHNESS_SECONDS.labels("user_state").observe(age_s)
                if record.offset >= count_from:
                    metrics.FRESHNESS_SECONDS.labels("counters").observe(age_s)

    def _take(self, record: Record, histories: Histories, *, counted: bool) -> UserUpdate | None:
        if record.topic == "impression":
            impression = messages.parse_impression(record.value)
            if counted:
                self._sources.impression(impression, record.time_ms)
            if impression.activation == "deferred":
                return None
            seen = tuple(item.item_id for item in impression.items)
            return UserUpdate(user_id=impression.user_id, seen=seen, seen_ms=record.time_ms)
        feedback = messages.parse_feedback(record.value, internal=True)
        return self.feedback(feedback, record.time_ms, histories, counted=counted)

    def feedback(self, feedback: Feedback, now_ms: int, histories: Histories, *, counted: bool) -> UserUpdate | None:
        """One feedback at log time `now_ms`; `histories` is what the batch's users have when the store has what came before."""
        user_id = feedback.user_id
        if feedback.type == FORGET:
            histories[user_id] = ()
            if counted:
                self._sources.forget(user_id)
            return UserUpdate(user_id=user_id, forget=True)
        event = HistoryEvent(
            time_ms=messages.clamp_time(feedback.time_ms, now_ms),
            event_id=feedback.event_id,
            item_id=feedback.item_id,
            type=feedback.type,
            session_id=feedback.session_id,
        )
        kept = feedback.type in self._history_types
        if counted:
            history = histories.get(user_id)
            if history is None:
                history = self._store.get(user_id).history
            self._sources.feedback(feedback, history, event, now_ms)
            histories[user_id] = _with(history, event) if kept else history
        if kept:
            return UserUpdate(user_id=user_id, events=(event,))
        if feedback.type == "view":
            return UserUpdate(user_id=user_id, seen=(feedback.item_id,), seen_ms=now_ms)
        return None


def _with(history: tuple[HistoryEvent, ...], event: HistoryEvent) -> tuple[HistoryEvent, ...]:
    if not history or history[-1] < event:
        return (*history, event)
    return tuple(sorted({*history, event}))
