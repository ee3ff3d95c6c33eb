"""One user's state while it is being changed, and its bytes: the same rules for every store."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

import orjson

from recsys.types import HistoryEvent, UserState, UserUpdate


class UserEntry:
    """History in (time, event_id) order with the number of events of each type, and seen items, oldest first."""

    __slots__ = ("counts", "history", "seen")

    def __init__(self, history: Iterable[HistoryEvent] = (), seen: Iterable[str] = ()) -> None:
        self.history = list(history)
        self.counts: dict[str, int] = {}
        for event in self.history:
            self.counts[event.type] = self.counts.get(event.type, 0) + 1
        self.seen = dict.fromkeys(seen)

    def apply(self, update: UserUpdate, history_len: int, seen_len: int) -> None:
        if update.forget:
            self.history, self.counts, self.seen = [], {}, {}
        for event in update.events:
            self._add(event, history_len)
        seen = self.seen
        for item_id in update.seen:
            seen.pop(item_id, None)
            seen[item_id] = None
            if len(seen) > seen_len:
                del seen[next(iter(seen))]

    def _add(self, event: HistoryEvent, history_len: int) -> None:
        history = self.history
        if not history or event.time_ms > history[-1].time_ms:
            history.append(event)
        else:
            key = (event.time_ms, event.event_id)
            at = bisect_left(history, key, key=_identity)
            if at < len(history) and _identity(history[at]) == key:
                return
            history.insert(at, event)
        count = self.counts.get(event.type, 0)
        if count < history_len:
            self.counts[event.type] = count + 1
        else:
            del history[next(i for i, old in enumerate(history) if old.type == event.type)]

    def state(self) -> UserState:
        return UserState(history=tuple(self.history), seen=tuple(self.seen))


def _identity(event: HistoryEvent) -> tuple[int, str]:
    return event.time_ms, event.event_id


def pack_history(history: Iterable[HistoryEvent]) -> bytes:
    return orjson.dumps([(e.time_ms, e.event_id, e.item_id, e.type, e.session_id) for e in history])


def unpack_history(data: bytes | None) -> list[HistoryEvent]:
    return [
        HistoryEvent(time_ms=time_ms, event_id=event_id, item_id=item_id, type=kind, session_id=session_id)
        for time_ms, event_id, item_id, kind, session_id in orjson.loads(data or b"[]")
    ]


def pack_seen(seen: Iterable[str]) -> bytes:
    return orjson.dumps(list(seen))


def unpack_seen(data: bytes | None) -> list[str]:
    return orjson.loads(data or b"[]")
