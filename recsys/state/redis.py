"""User state in Redis: `<prefix>:h:<user>` history, `<prefix>:s:<user>` seen, `<prefix>:i:<user>` items to leave out;
`<prefix>:positions` and `<prefix>:logs` are hashes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import redis

from recsys.errors import ConfigError, StateUnavailable, masked
from recsys.state.base import check_after
from recsys.state.cache import UserCache
from recsys.state.merge import UserEntry
from recsys.types import HistoryEvent, UserState, UserUpdate

_TIMEOUT_S = 0.5
"""A request is worth 200 ms: twice this and one lost reply holds a worker for a second, half of it trips on a fork of Redis."""


class RedisState:
    """See StateStore. Needs one Redis (not a cluster): a transaction covers the keys of many users."""

    def __init__(self, url: str, prefix: str, history_len: int, seen_len: int, cache: UserCache | None = None) -> None:
        self._cache = cache or UserCache(0)
        self._url = masked(url)
        self._prefix = prefix
        self._history_len = history_len
        self._seen_len = seen_len
        try:
            # Once more, at once, when a pooled connection turns out dead; never after a time-out, which it would double.
            self._client: Any = redis.Redis.from_url(
                url,
                socket_timeout=_TIMEOUT_S,
                socket_connect_timeout=_TIMEOUT_S,
                retry=redis.retry.Retry(redis.backoff.NoBackoff(), 1, supported_errors=(redis.ConnectionError,)),
            )
        except ValueError as error:
            raise ConfigError(f"state.url = {self._url!r}: {masked(str(error))}") from None

    @contextlib.contextmanager
    def _mapped(self) -> Iterator[None]:
        try:
            yield
        except (redis.RedisError, OSError) as error:
            raise StateUnavailable(
                f"Redis at {self._url!r} cannot be used ({masked(str(error))}): check `state.url` and the server"
            ) from error

    def _keys(self, user_id: str) -> tuple[str, str, str]:
        return f"{self._prefix}:h:{user_id}", f"{self._prefix}:s:{user_id}", f"{self._prefix}:i:{user_id}"

    def apply(
        self, updates: Sequence[UserUpdate], positions: Mapping[str, int], after: Mapping[str, int] | None = None
    ) -> None:
        try:
            with self._mapped(), self._client.pipeline(transaction=True) as transaction:
                transaction.watch(f"{self._prefix}:positions")  # what happens to them from here on ends the transaction
                found = _numbers(transaction.hgetall(f"{self._prefix}:positions"))
                check_after(found, after or {})
                self._cache.stand_at(found)
                entries = self._entries({update.user_id: None for update in updates})
                for update in updates:
                    entries[update.user_id].apply(update, self._history_len, self._seen_len)
                transaction.multi()
                self._write(transaction, updates, entries)
                if positions:
                    transaction.hset(f"{self._prefix}:positions", mapping=dict(positions))
                transaction.execute()
        except BaseException:
            self._cache.clear()
            raise
        self._cache.written(entries, (), {**found, **positions})

    def _entries(self, user_ids: Iterable[str]) -> dict[str, UserEntry]:
        known = {user_id: self._cache.entry(user_id) for user_id in user_ids}
        unknown = [user_id for user_id, entry in known.items() if entry is None]
        values = self._client.mget([key for user_id in unknown for key in self._keys(user_id)]) if unknown else []
        read = map(UserEntry, values[::3], values[1::3], values[2::3])
        return {user_id: entry or next(read) for user_id, entry in known.items()}

    def _write(self, transaction: Any, updates: Sequence[UserUpdate], entries: Mapping[str, UserEntry]) -> None:
        for user_id in {update.user_id: None for update in updates if update.events or update.forget}:
            self._put(transaction, self._keys(user_id)[0], entries[user_id].packed_history())
        for user_id in {update.user_id: None for update in updates if update.seen or update.forget}:
            self._put(transaction, self._keys(user_id)[1], entries[user_id].packed_seen())
        for user_id, entry in entries.items():
            if entry.items_changed:
                self._put(transaction, self._keys(user_id)[2], entry.packed_items())

    def _put(self, transaction: Any, key: str, value: bytes) -> None:
        if value == b"[]":
            transaction.delete(key)
        else:
            transaction.set(key, value)

    def get(self, user_id: str) -> UserState:
        if (known := self._cache.state(user_id)) is not None:
            return known
        changes = self._cache.changes
        with self._mapped():
            entry = UserEntry(*self._client.mget(self._keys(user_id)))
        return self._cache.read(user_id, entry, changes)

    def history(self, user_id: str) -> tuple[HistoryEvent, ...]:
        known = self._cache.history(user_id)
        return self.get(user_id).history if known is None else known

    def positions(self) -> dict[str, int]:
        with self._mapped():
            found = _numbers(self._client.hgetall(f"{self._prefix}:positions"))
        self._cache.stand_at(found)
        return found

    def logs(self) -> dict[str, str]:
        with self._mapped():
            return {
                name.decode(): value.decode() for name, value in self._client.hgetall(f"{self._prefix}:logs").items()
            }

    def move(self, positions: Mapping[str, int], logs: Mapping[str, str]) -> None:
        self._cache.clear()
        with self._mapped(), self._client.pipeline(transaction=True) as transaction:
            for name, values in (("positions", positions), ("logs", logs)):
                if values:
                    transaction.hset(f"{self._prefix}:{name}", mapping=dict(values))
            transaction.execute()

    def close(self) -> None:
        self._client.close()


def _numbers(found: Mapping[bytes, bytes]) -> dict[str, int]:
    return {name.decode(): int(value) for name, value in found.items()}
