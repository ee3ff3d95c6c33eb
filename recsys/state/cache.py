"""Users' states of late, parsed, in the memory of the process that writes them to a store."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping

from recsys.state.merge import UserEntry
from recsys.types import HistoryEvent, UserState


class UserCache:
    """Users as their store has them at certain log positions, within `max_bytes`: those longest not asked for go. Thread-safe.

    Every writer of a store moves its positions with each change. So what is here is what the store has, as long as the store's positions
    are the ones here; where they are others, another process wrote, or the store lost its data, and everything here goes (`stand_at`).
    Until the store's positions are looked at again, what is here may be older than the store, but no older than those positions.
    """

    def __init__(self, max_bytes: int) -> None:
        """0: nothing is kept."""
        self._max_bytes, self.bytes = max_bytes, 0
        self._users: OrderedDict[str, _User] = OrderedDict()
        self._positions: dict[str, int] = {}
        self._lock = threading.Lock()
        self.changes = 0
        """How often anything was written, or everything went: what was read from the store before that may be old."""

    def stand_at(self, positions: Mapping[str, int]) -> None:
        """The store is at these positions: where they are not those of what is here, it goes."""
        with self._lock:
            if positions != self._positions:
                self._clear()
                self._positions = dict(positions)

    def clear(self) -> None:
        """Nothing is known of the store any more."""
        with self._lock:
            self._clear()

    def _clear(self) -> None:
        self._users.clear()
        self.bytes = 0
        self.changes += 1

    def entry(self, user_id: str) -> UserEntry | None:
        """One that the caller may change, to be given to `written`."""
        with self._lock:
            found = self._users.get(user_id)
            return None if found is None else found.entry.copy()

    def state(self, user_id: str) -> UserState | None:
        """None: it is not here."""
        with self._lock:
            found = self._users.get(user_id)
            if found is None:
                return None
            self._users.move_to_end(user_id)
        if found.state is None:  # two threads may both make it: the same
            found.state = found.entry.state()
        return found.state

    def history(self, user_id: str) -> tuple[HistoryEvent, ...] | None:
        """None: it is not here."""
        with self._lock:
            found = self._users.get(user_id)
            return None if found is None else tuple(found.entry.history)

    def read(self, user_id: str, entry: UserEntry, changes: int) -> UserState:
        """Keep what was read from the store when there had been so many `changes`; nobody changes the entry any more."""
        state = entry.state()
        with self._lock:
            if changes == self.changes:
                self._keep(user_id, entry, state)
                self._make_room()
        return state

    def written(self, entries: Mapping[str, UserEntry], left: Iterable[str], positions: Mapping[str, int]) -> None:
        """These were written to the store, with its positions; those who `left` it are in it no more."""
        with self._lock:
            self.changes += 1
            self._positions = dict(positions)
            for user_id, entry in entries.items():
                self._keep(user_id, entry)
            for user_id in left:
                self._drop(user_id)
            self._make_room()

    def _keep(self, user_id: str, entry: UserEntry, state: UserState | None = None) -> None:
        self._drop(user_id)
        if self._max_bytes:
            self._users[user_id] = user = _User(entry, state)
            self.bytes += user.bytes

    def _drop(self, user_id: str) -> None:
        if (user := self._users.pop(user_id, None)) is not None:
            self.bytes -= user.bytes

    def _make_room(self) -> None:
        while self.bytes > self._max_bytes:
            self._drop(next(iter(self._users)))


class _User:
    __slots__ = ("bytes", "entry", "state")

    def __init__(self, entry: UserEntry, state: UserState | None) -> None:
        self.entry, self.bytes, self.state = entry, entry.memory_bytes, state
