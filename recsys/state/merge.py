"""One user's state while it is being changed, and its bytes: the same rules for every store."""

from __future__ import annotations

import logging
import zlib
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import Any, TypeVar

import orjson

from recsys import metrics
from recsys.types import HistoryEvent, UserState, UserUpdate

_log = logging.getLogger("recsys")
_T = TypeVar("_T")

Seen = dict[str, tuple[int, int]]
"""Item id → (log time when it was last shown, ms; how often it was), oldest first."""
SHOWING_MS = 60_000
"""An item seen again so soon was shown once: an impression and the view of it, a page loaded again, a record applied again."""


ACTED, HIDDEN = 1000, 5000
"""Items of a user kept beyond the history, about 40 bytes each: half shows a buyer what they bought a year ago, double slows the reading
of such users' states. Of too many the newest stay."""

Acted = dict[str, tuple[int, str | None]]
"""Item id → (time, session) of its last event."""


_STATE_BYTES, _EVENT_BYTES, _SEEN_BYTES, _HIDDEN_BYTES = 1000, 200, 200, 100
"""In memory, beside twice what the ids and numbers take in the store: of a user, an event, a seen item, a hidden one."""


class UserEntry:
    """History by time, then arrival, with the number of events of each type, seen items, oldest first, and items to leave out."""

    __slots__ = ("_lent", "_packed", "acted", "counts", "hidden", "history", "items_changed", "seen")

    def __init__(self, history: bytes | None = None, seen: bytes | None = None, items: bytes | None = None) -> None:
        """From what a store keeps; None: nothing."""
        self.acted, self.hidden = unpack_items(items)
        self.items_changed = False
        """Whether `acted` or `hidden` must be stored again."""
        self.history = unpack_history(history)
        self.counts: dict[str, int] = {}
        for event in self.history:
            self.counts[event.type] = self.counts.get(event.type, 0) + 1
        self.seen = unpack_seen(seen)
        self._packed = len(history or b""), len(seen or b""), len(items or b"")
        self._lent = False

    def copy(self) -> UserEntry:
        """Another one that can be changed alone, of which nothing must be stored yet. This one must not be changed any more: they share
        what no update touches."""
        other: UserEntry = UserEntry.__new__(UserEntry)
        other.history, other.counts, other.seen = self.history, self.counts, self.seen
        other.acted, other.hidden, other.items_changed = self.acted, self.hidden, False
        other._packed, other._lent = self._packed, True
        return other

    def _own(self, update: UserUpdate) -> None:
        """Copy what an update may change of a copy; a copy is changed by several, each of which copies what it touches."""
        if update.events:
            self.history, self.counts = self.history.copy(), self.counts.copy()
        if update.events or update.acted or update.hidden:
            self.acted, self.hidden = self.acted.copy(), self.hidden.copy()
        if update.seen:
            self.seen = self.seen.copy()

    @property
    def empty(self) -> bool:
        """Whether there is nothing to keep of this user."""
        return not (self.history or self.seen or self.acted or self.hidden)

    @property
    def memory_bytes(self) -> int:
        """About what it takes in memory, as last read or packed."""
        events, seen = len(self.history) + len(self.acted), len(self.seen)
        held = _EVENT_BYTES * events + _SEEN_BYTES * seen + _HIDDEN_BYTES * len(self.hidden)
        return _STATE_BYTES + 2 * sum(self._packed) + held

    def packed_history(self) -> bytes:
        """For the store."""
        data = pack_history(self.history)
        self._packed = len(data), *self._packed[1:]
        return data

    def packed_seen(self) -> bytes:
        """For the store."""
        data = pack_seen(self.seen)
        self._packed = self._packed[0], len(data), self._packed[2]
        return data

    def packed_items(self) -> bytes:
        """For the store."""
        data = pack_items(self.acted, self.hidden)
        self._packed = *self._packed[:2], len(data)
        return data

    def apply(self, update: UserUpdate, history_len: int, seen_len: int) -> None:
        """Add what an update says; see `StateStore.apply`."""
        if self._lent:
            self._own(update)
        if update.forget:
            self.history, self.counts, self.seen = [], {}, {}
            self.acted, self.hidden, self.items_changed = {}, {}, True
        for event in update.events:
            self._add(event, history_len)
        for event in update.acted:
            self._act(event)
        for item_id in update.hidden:
            self._hide(item_id)
        seen, now_ms = self.seen, update.seen_ms
        for item_id in update.seen:
            last_ms, count = seen.pop(item_id, (-SHOWING_MS, 0))
            again = now_ms >= last_ms + SHOWING_MS
            seen[item_id] = max(last_ms, now_ms), count + again
            if len(seen) > seen_len:
                del seen[next(iter(seen))]

    def _add(self, event: HistoryEvent, history_len: int) -> None:
        history = self.history
        if not history or event.time_ms > history[-1].time_ms:
            history.append(event)
        else:
            begin = bisect_left(history, event.time_ms, key=_time)
            end = bisect_right(history, event.time_ms, lo=begin, key=_time)
            for at in range(begin, end):
                if history[at].event_id == event.event_id:  # a copy: the one that came first stays
                    if history[at].arrival > event.arrival:
                        self.counts[history[at].type] -= 1
                        del history[at]
                        end -= 1
                        break
                    return
            history.insert(bisect_right(history, event.place, begin, end, key=_place), event)
        count = self.counts.get(event.type, 0)
        if count < history_len:
            self.counts[event.type] = count + 1
        else:
            self._act(history.pop(next(i for i, old in enumerate(history) if old.type == event.type)))

    def _act(self, event: HistoryEvent) -> None:
        acted, last = self.acted, (event.time_ms, event.session_id)
        before = acted.get(event.item_id)
        if before is not None and before[0] >= last[0]:
            return
        acted[event.item_id], self.items_changed = last, True
        if len(acted) > ACTED:
            del acted[min(acted, key=lambda item_id: acted[item_id][0])]

    def _hide(self, item_id: str) -> None:
        self.hidden.pop(item_id, None)
        self.hidden[item_id], self.items_changed = None, True
        if len(self.hidden) > HIDDEN:
            del self.hidden[next(iter(self.hidden))]

    def state(self) -> UserState:
        """As the others see it: no later change is seen there."""
        return UserState(
            history=tuple(self.history),
            seen=tuple(self.seen),
            shown=tuple(self.seen.values()),
            acted=tuple(_last_event(item_id, *last) for item_id, last in self.acted.items()) if self.acted else (),
            hidden=tuple(self.hidden),
        )


def _time(event: HistoryEvent) -> int:
    return event.time_ms


def _place(event: HistoryEvent) -> tuple[int, int, str]:
    return event.place


_NOTHING = b"[]"
_SEAL_BYTES = 9


def _seal(body: bytes) -> bytes:
    return b"#%08x" % zlib.crc32(body)


def _sealed(value: Any) -> bytes:
    """JSON and its checksum; nothing stays `[]`, which stores do not keep."""
    body = orjson.dumps(value)
    return body if body == _NOTHING else body + _seal(body)


def _opened(data: bytes | None, what: str, build: Callable[[Any], _T]) -> _T:
    """What was sealed; of bytes that are not what was written, aloud, what nothing gives. Earlier versions wrote no checksum."""
    body, seal = data or _NOTHING, b""
    if body[-_SEAL_BYTES:-8] == b"#":
        body, seal = body[:-_SEAL_BYTES], body[-_SEAL_BYTES:]
    try:
        if seal and seal != _seal(body):
            raise ValueError("its checksum is another one")
        return build(orjson.loads(body))
    except (ValueError, TypeError, AttributeError) as error:
        metrics.DAMAGED_RECORDS.labels("state").inc()
        _log.error(
            "the %s of a user are damaged (%s) and begin anew: to read all users from the log, delete the store",
            what,
            error,
        )
        return build([])


def pack_history(history: Iterable[HistoryEvent]) -> bytes:
    return _sealed([(e.time_ms, e.event_id, e.item_id, e.type, e.session_id, e.arrival) for e in history])


def unpack_history(data: bytes | None) -> list[HistoryEvent]:
    """As packed; of rows without arrival, as earlier versions wrote them, it is not known."""
    return _opened(data, "events", _history)


def _history(rows: Any) -> list[HistoryEvent]:
    return [
        HistoryEvent(
            time_ms=time_ms,
            event_id=event_id,
            item_id=item_id,
            type=kind,
            session_id=session_id,
            arrival=arrival[0] if arrival else 0,
        )
        for time_ms, event_id, item_id, kind, session_id, *arrival in rows
    ]


def pack_seen(seen: Seen) -> bytes:
    """Ids, times as differences (most are 0: one answer's items share theirs), counts; nothing for nobody."""
    if not seen:
        return _NOTHING
    times = [time_ms for time_ms, _ in seen.values()]
    steps = [after - before for before, after in zip([0, *times], times, strict=False)]
    return _sealed([list(seen), steps, [count for _, count in seen.values()]])


def unpack_seen(data: bytes | None) -> Seen:
    """As packed; of a plain list of ids, as earlier versions wrote it, no time is known and each was shown once."""
    return _opened(data, "seen items", _seen)


def _seen(found: Any) -> Seen:
    if not found or isinstance(found[0], str):
        return dict.fromkeys(found, (0, 1))
    ids, steps, counts = found
    return dict(zip(ids, zip(accumulate(steps), counts, strict=True), strict=True))


def pack_items(acted: Acted, hidden: Iterable[str]) -> bytes:
    """Items acted upon, with time and session of the last event, and hidden ones; nothing for nobody."""
    items = [[item_id, *last] for item_id, last in acted.items()], list(hidden)
    return _sealed(items) if any(items) else _NOTHING


def unpack_items(data: bytes | None) -> tuple[Acted, dict[str, None]]:
    return _opened(data, "items", _items)


def _items(found: Any) -> tuple[Acted, dict[str, None]]:
    acted, hidden = found or ((), ())
    return {item_id: (time_ms, session) for item_id, time_ms, session in acted}, dict.fromkeys(hidden)


def _last_event(item_id: str, time_ms: int, session_id: str | None) -> HistoryEvent:
    return HistoryEvent(time_ms=time_ms, event_id="", item_id=item_id, type="", session_id=session_id)
