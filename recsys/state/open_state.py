"""Choose the user-state store that the configuration names."""

from __future__ import annotations

from recsys.config import Config
from recsys.state.base import StateStore
from recsys.state.cache import UserCache
from recsys.state.redis import RedisState
from recsys.state.sqlite_state import SqliteState


def open_state(config: Config, cache: UserCache | None = None) -> StateStore:
    """Open the store; with Redis nothing is sent until the first call. `cache`: of the process that writes to it."""
    state = config.state
    if state.kind == "redis":
        return RedisState(state.url, state.prefix, state.history_len, state.seen_len, cache)
    most = config.log.retention_bytes
    return SqliteState(config.data_dir / "state.db", state.history_len, state.seen_len, most, cache)
