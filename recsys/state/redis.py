"""User state in Redis: `<prefix>:h:<user>` history, `<prefix>:s:<user>` seen, `<prefix>:i:<user>` items to leave out;
`<prefix>:positions` and `<prefix>:logs` are hashes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import redis

from recsys.errors import ConfigError, StateUnavailable, masked
from recsys.state.base import check_after
from recsys.state.merge import (
    UserEntry,
    pack_history,
    pack_items,
    pack_seen,
    state_of,
    unpack_history,
    unpack_items,
    unpack_seen,
)
from recsys.types import UserState, UserUpdate

_TIMEOUT_S = 0.5
"""A request is worth 200 ms: twice this and one lost reply holds a worker for a second, half of it trips on a fork of Redis."""


class RedisState:
    """See StateStore. Needs one Redis (not a cluster): a transaction covers the keys of many users."""

    def __init__(self, url: str, prefix: str, history_len: int, seen_len: int) -> None:
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
        user_ids = list(dict.fromkeys(update.user_id for update in updates))
        keys = [key for user_id in user_ids for key in self._keys(user_id)]
        with self._mapped(), self._client.pipeline(transaction=True) as transaction:
            if after:  # what happens to the positions from here on ends the transaction
                transaction.watch(f"{self._prefix}:positions")
                check_after(_numbers(transaction.hgetall(f"{self._prefix}:positions")), after)
            values = self._client.mget(keys) if keys else []
            entries = {
                user_id: UserEntry(unpack_history(history), unpack_seen(seen), unpack_items(items))
                for user_id, history, seen, items in zip(user_ids, values[::3], values[1::3], values[2::3], strict=True)
            }
            for update in updates:
                entries[update.user_id].apply(update, self._history_len, self._seen_len)
            transaction.multi()
            for user_id in {update.user_id: None for update in updates if update.events or update.forget}:
                self._put(transaction, self._keys(user_id)[0], pack_history(entries[user_id].history))
            for user_id in {update.user_id: None for update in updates if update.seen or update.forget}:
                self._put(transaction, self._keys(user_id)[1], pack_seen(entries[user_id].seen))
            for user_id, entry in entries.items():
                if entry.items_changed:
                    self._put(transaction, self._keys(user_id)[2], pack_items(entry.acted, entry.hidden))
            if positions:
                transaction.hset(f"{self._prefix}:positions", mapping=dict(positions))
            transaction.execute()

    def _put(self, transaction: Any, key: str, value: bytes) -> None:
        if value == b"[]":
            transaction.delete(key)
        else:
            transaction.set(key, value)

    def get(self, user_id: str) -> UserState:
        with self._mapped():
            history, seen, items = self._client.mget(self._keys(user_id))
        return state_of(unpack_history(history), unpack_seen(seen), unpack_items(items))

    def positions(self) -> dict[str, int]:
        with self._mapped():
            return _numbers(self._client.hgetall(f"{self._prefix}:positions"))

    def logs(self) -> dict[str, str]:
        with self._mapped():
            return {
                name.decode(): value.decode() for name, value in self._client.hgetall(f"{self._prefix}:logs").items()
            }

    def move(self, positions: Mapping[str, int], logs: Mapping[str, str]) -> None:
        with self._mapped(), self._client.pipeline(transaction=True) as transaction:
            for name, values in (("positions", positions), ("logs", logs)):
                if values:
                    transaction.hset(f"{self._prefix}:{name}", mapping=dict(values))
            transaction.execute()

    def close(self) -> None:
        self._client.close()


def _numbers(found: Mapping[bytes, bytes]) -> dict[str, int]:
    return {name.decode(): int(value) for name, value in found.items()}
