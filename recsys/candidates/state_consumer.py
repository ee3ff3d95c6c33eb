"""The one writer of user state and counters: events from HTTP and Kafka alike, in log order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from recsys import metrics
from recsys.candidates.meaning import Meaning
from recsys.candidates.sources import Sources
from recsys.clock import Clock, bounded_ms
from recsys.config import Config
from recsys.errors import BadInput
from recsys.events import messages
from recsys.events.recent import digest_of
from recsys.events.seen_ids import Kind
from recsys.state.base import StateStore
from recsys.streams import positions
from recsys.streams.base import EventLog
from recsys.types import FORGET, AsOf, Batch, Feedback, HistoryEvent, Impression, Record, UserUpdate

Histories = dict[str, tuple[HistoryEvent, ...]]
_Read = tuple[str, int, Batch]
"""Of a partition: its name, where the store begins, records."""
TOPICS = ("impression", "feedback")
SLICE_MS = 600_000
"""Of what was missed, impressions and feedback are taken in slices of a sixth of the time that an impression is remembered."""
READ_LIMIT = 1000
"""Records of a topic in one turn: half makes a backlog slower, double holds freshness back."""
_OFFSET_BITS = 48
"""An arrival is a partition and an offset in one number; a user's events lie in one partition."""
_STATE_AGE, _COUNTERS_AGE = (metrics.FRESHNESS_SECONDS.labels(name) for name in ("user_state", "counters"))
MARK_MS, SLOWEST_MARK_MS, MARK_COST = 25, 100, 20
"""The log's ends are asked for this often while something comes, to know what time everything was read up to: double makes `as_of` older.
Where asking takes long (Kafka), at most a twentieth of the time is spent on it, up to the slowest."""
SETTLED_MS = 100
"""Who sent an event hears of it after it was read; the marks of so long tell that it is in."""


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
        self._meaning = Meaning(config)
        self._keys = positions.keys_of(log, TOPICS)
        self._most = max(1, READ_LIMIT * len(TOPICS) // len(self._keys))
        self.counter_positions = {key: log.begin(*positions.split(key)) for key in self._keys}
        self.counter_logs: dict[str, str] = {}
        """Which log each of the positions belongs to, as it was saved; after `resume`, as it is."""
        self._read_ms, self._mark_ms = 0, MARK_MS
        """When something was read last, and how often the ends are asked for."""
        self._marked_ms, self._marks = 0, dict[str, int]()
        """The partitions' ends at one time; once they are read, all that was appended before it is in."""
        self.caught_up = False
        """Whether everything was read that there was when the ends were first asked for."""
        self.behind = False
        """Whether the last turn left records that it could have read."""
        self._seen = sources.events.seen
        self._stored: dict[str, int] = {}
        self.on_feedback: Callable[[Feedback, int, int], None] = lambda feedback, digest, now_ms: None
        """Called with each feedback that is no copy, its id's digest and log time, after it is counted."""
        self.user_state = AsOf()
        self.counters = AsOf()

    def resume(self, *, accept_gap: bool = False) -> None:
        """Compare the store's and the counters' positions with the log. Raises LogTruncated for a gap, unless it is accepted."""
        stored, logs = self._store.positions(), self._store.logs()
        state = positions.resume(self._log, "state", TOPICS, stored, logs, accept_gap=accept_gap)
        counters = positions.resume(
            self._log, "counters", TOPICS, self.counter_positions, self.counter_logs, accept_gap=accept_gap
        )
        self.counter_positions = counters.positions
        self.counter_logs = positions.identities(self._log, self._keys)
        if state.positions != stored or logs != self.counter_logs:
            self._store.move(state.positions, self.counter_logs)

    def turn(self) -> int:
        """Read and apply what is new; returns how many records. Raises LogUnavailable, StateUnavailable: then call again."""
        stored = self._store.positions()
        if any(stored.get(key, 0) < position for key, position in self._stored.items()):
            self._seen.clear(Kind.STORED)  # the store lost what it had
        self._stored = dict(stored)
        self._mark(stored)
        count = 0
        read: list[_Read] = []
        for key in reversed(self._keys):  # feedback first: its impression was appended before it
            topic, partition = positions.split(key)
            if key not in stored:  # the store is new, or lost its data
                stored[key] = self._log.begin(topic, partition)
                self._store.move({key: stored[key]}, {key: self._log.identity(topic, partition)})
            start = min(stored[key], self.counter_positions[key])
            records = self._log.read(topic, partition, start, self._most)
            if records.next > start:
                read.append((key, stored[key], records))
        self.behind = any(len(records) >= self._most for _, _, records in read)
        for parts in _in_order(read[::-1], self._most):  # impressions first
            self._apply(parts, stored)
            for key, _, part in parts:
                stored[key] = max(stored[key], part.next)
                count += len(part)
        if count:
            self._read_ms = self._clock.now_ms()
        if all(min(stored[key], self.counter_positions[key]) >= end for key, end in self._marks.items()):
            self.caught_up = True
            self.user_state = AsOf(positions=stored, time_ms=self._marked_ms - 1)
            self.counters = AsOf(positions=dict(self.counter_positions), time_ms=self._marked_ms - 1)
        return count

    def rest_s(self, most_s: float) -> float:
        """How long to wait for the next record, at most: what was read lately is told of in `as_of` by a turn after the next mark."""
        now_ms = self._clock.now_ms()
        if self.counters.positions == self.counter_positions and now_ms > self._read_ms + SETTLED_MS:
            return most_s
        return min(most_s, max(0, self._marked_ms + self._mark_ms - now_ms) / 1000)

    def _mark(self, stored: Mapping[str, int]) -> None:
        """Ask for the ends again, once those of the last time were read: a read that found nothing does not tell."""
        now_ms = self._clock.now_ms()
        read = all(min(stored.get(k, 0), self.counter_positions[k]) >= end for k, end in self._marks.items())
        if read and (not self._marks or abs(now_ms - self._marked_ms) >= self._mark_ms):
            began_s = self._clock.monotonic_s()
            self._marks = positions.ends(self._log, self._keys)
            self._marked_ms, took_s = now_ms, self._clock.monotonic_s() - began_s
            self._mark_ms = min(SLOWEST_MARK_MS, max(MARK_MS, int(MARK_COST * took_s * 1000)))

    def _apply(self, parts: Sequence[_Read], stored: Mapping[str, int]) -> None:
        """Records of partitions, each to the store from where that stands on, and to the counters from where those do.

        1. Judge each: what it is, and whether it is a copy. 2. Write to the store, all in one transaction. 3. Count, and move on: one cut
        for snapshots. The store may fail, and then the same records come again: nothing is remembered before it has them.
        """
        batch, moved = _Batch(), dict[str, int]()
        counted_to = dict(self.counter_positions)
        for key, begin, records in parts:
            batch.store_from, batch.count_from = begin, self.counter_positions[key]
            for record in records:
                try:
                    self._judge(record, batch)
                except BadInput as error:
                    self._on_bad(record, str(error))
            if records.next > begin:
                moved[key] = records.next
        if moved:
            self._store.apply(batch.updates, moved, {key: stored[key] for key in moved})
        with self._sources.writing:
            for count in batch.counts:
                count()
            for key, _, records in parts:
                self.counter_positions[key] = max(self.counter_positions[key], records.next)
        self._tell_age(parts, counted_to)

    def _tell_age(self, parts: Sequence[_Read], counted_to: Mapping[str, int]) -> None:
        """How old feedback is now that it was applied; `counted_to`: where the counters stood before."""
        now_ms = self._clock.now_ms()
        for key, begin, records in parts:
            for record in records:
                if record.topic == "feedback":
                    age_s = max(0, now_ms - record.time_ms) / 1000
                    if record.offset >= begin:
                        _STATE_AGE.observe(age_s)
                    if record.offset >= counted_to[key]:
                        _COUNTERS_AGE.observe(age_s)

    def _judge(self, record: Record, batch: _Batch) -> None:
        now_ms = bounded_ms(record.time_ms, self._clock.now_ms())
        if record.topic == "impression":
            self._impression(messages.parse_impression(record.value), now_ms, record.offset, batch)
            return
        feedback = messages.parse_feedback(record.value, internal=True)
        if feedback.type == FORGET:
            self._forget(feedback.user_id, record.offset, batch)
            return
        messages.check_milliseconds(feedback.time_ms, now_ms)
        late, digest = self._seen.too_late(Kind.EVENT, feedback.time_ms, now_ms), digest_of(feedback.event_id)
        if late or self._first(digest, now_ms, record.offset, batch):
            self._feedback(feedback, now_ms, record, batch, late)
            if record.offset >= batch.count_from:
                batch.counts.append(lambda: self.on_feedback(feedback, digest, now_ms))

    def _impression(self, impression: Impression, now_ms: int, offset: int, batch: _Batch) -> None:
        """What came too late was seen when it says, and is not counted: it might be counted twice."""
        late = self._seen.too_late(Kind.EVENT, impression.time_ms, now_ms)
        if offset >= batch.count_from and not late:
            batch.counts.append(lambda: self._sources.events.impression(impression, now_ms))
        if impression.activation != "deferred":
            seen = tuple(item.item_id for item in impression.items)
            seen_ms = impression.time_ms if late else now_ms
            batch.update(offset, UserUpdate(user_id=impression.user_id, seen=seen, seen_ms=seen_ms))

    def _forget(self, user_id: str, offset: int, batch: _Batch) -> None:
        batch.histories[user_id] = ()
        batch.update(offset, UserUpdate(user_id=user_id, forget=True))
        if offset >= batch.count_from:
            batch.counts.append(lambda: self._sources.events.forget(user_id))

    def _first(self, digest: int, now_ms: int, offset: int, batch: _Batch) -> bool:
        """Whether no copy of it was read before, within the horizon."""
        again = offset < batch.count_from
        if digest in batch.events:
            return False
        # What is read again for the store alone the sources know already: it is told from what was read again.
        if self._seen.knows(Kind.STORED if again else Kind.EVENT, digest):
            return False
        batch.events.add(digest)
        if again:
            batch.counts.append(lambda: self._seen.first(Kind.STORED, digest, now_ms))
        return True

    def _feedback(self, feedback: Feedback, now_ms: int, record: Record, batch: _Batch, late: bool) -> None:
        """What came too late enters the history alone: counted, it might be counted twice."""
        user_id, offset = feedback.user_id, record.offset
        event = HistoryEvent(
            time_ms=min(feedback.time_ms, now_ms),
            event_id=feedback.event_id,
            item_id=feedback.item_id,
            type=feedback.type,
            session_id=feedback.session_id,
            arrival=(record.partition << _OFFSET_BITS) + offset + 1,
        )
        if offset >= batch.count_from and not late:
            history = batch.histories.get(user_id)
            if history is None:
                history = self._store.history(user_id)
            kept = self._meaning.enters_history(feedback.type)
            batch.histories[user_id] = _with(history, event) if kept else history
            batch.counts.append(lambda: self._sources.events.feedback(feedback, history, event, now_ms))
        if update := self._meaning.update(feedback, event, now_ms):
            batch.update(offset, update)


class _Batch:
    """What the records of one slice of time mean: for the store and for the counters, in order."""

    def __init__(self) -> None:
        self.store_from = self.count_from = 0
        """Of the partition that is looked at: what comes before is in there already."""
        self.updates: list[UserUpdate] = []
        self.counts: list[Callable[[], object]] = []
        self.histories: Histories = {}
        """What users have when the store has what came before."""
        self.events: set[int] = set()
        """Digests of their ids."""

    def update(self, offset: int, update: UserUpdate) -> None:
        if offset >= self.store_from:
            self.updates.append(update)


def _in_order(read: Sequence[_Read], most: int) -> Iterator[list[_Read]]:
    """What was read of the partitions, by time in slices, as far as those that are behind: feedback runs neither ahead of its impressions
    nor so far behind that they are forgotten."""
    if moved := [part for part in read if not part[2]]:  # nothing but a position
        yield moved
    rest = list(read)
    ends = [max(r.time_ms for r in records) for _, _, records in read if len(records) == most]
    while heads := [records[0].time_ms for _, _, records in rest if records]:
        until_ms, now = min([min(heads) + SLICE_MS, *ends]), list[_Read]()
        if until_ms < min(heads):
            return
        for place, (key, begin, records) in enumerate(rest):
            size = next((i for i, record in enumerate(records) if record.time_ms > until_ms), len(records))
            if size:
                whole = size == len(records)
                rest[place] = key, begin, Batch(records[size:], records.next)
                now.append((key, begin, Batch(records[:size], records.next if whole else records[size].offset)))
        yield now


def _with(history: tuple[HistoryEvent, ...], event: HistoryEvent) -> tuple[HistoryEvent, ...]:
    if not history or history[-1].place < event.place:
        return (*history, event)
    return tuple(sorted({*history, event}, key=lambda one: one.place))
