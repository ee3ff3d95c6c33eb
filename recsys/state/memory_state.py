"""User state in this process's memory: for offline replay and tests."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

from recsys.state.base import check_after
from recsys.state.merge import UserEntry
from recsys.types import HistoryEvent, UserState, UserUpdate

_NOBODY = UserState()


class MemoryState:
    """See StateStore."""

    def __init__(self, history_len: int, seen_len: int) -> None:
        self._history_len = history_len
        self._seen_len = seen_len
        self._users: dict[str, UserEntry] = {}
        self._positions: dict[str, int] = {}
        self._logs: dict[str, str] = {}
        self._lock = threading.Lock()

    def apply(
        self, updates: Sequence[UserUpdate], positions: Mapping[str, int], after: Mapping[str, int] | None = None
    ) -> None:
        users, history_len, seen_len = self._users, self._history_len, self._seen_len
        with self._lock:
            check_after(self._positions, after or {})
            for update in updates:
                entry = users.get(update.user_id)
                if entry is None:
                    entry = users[update.user_id] = UserEntry()
                entry.apply(update, history_len, seen_len)
            self._positions.update(positions)

    def get(self, user_id: str) -> UserState:
        with self._lock:
            entry = self._users.get(user_id)
            return _NOBODY if entry is None else entry.state()

    def history(self, user_id: str) -> tuple[HistoryEvent, ...]:
        with self._lock:
            entry = self._users.get(user_id)
            return () if entry is None else tuple(entry.history)

    def positions(self) -> dict[str, int]:
        return dict(self._positions)

    def logs(self) -> dict[str, str]:
        return dict(self._logs)

    def move(self, positions: Mapping[str, int], logs: Mapping[str, str]) -> None:
        with self._lock:
            self._positions.update(positions)
            self._logs.update(logs)

    def close(self) -> None:
        return
