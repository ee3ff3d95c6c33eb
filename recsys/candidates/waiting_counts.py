"""Counts that wait for their item: feedback may be read before the item that it is about."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import orjson

from recsys.types import Bool, Int64


class Count(NamedTuple):
    """One item's part of what a feedback or impression counts for, at log time `now_ms`."""

    now_ms: int
    weight: float = 1.0
    values: Sequence[str] = ()
    """Columns of the counters."""
    shared: tuple[Int64, Bool] | None = None
    """Shared columns of the impression or feedback; None: nothing of a user."""
    before: Sequence[str] | None = None
    """The session's earlier items, newest first; None: it is no event that trending and co-visits count."""
    follower: tuple[str, int] | None = None
    """The item whose feedback came after this one's, and how many came between."""


class Held:
    """Counts by the item they wait for; of more than `limit` those of the item that was first waited for are given up."""

    def __init__(self, limit: int) -> None:
        self._limit, self._size = limit, 0
        self._waiting: OrderedDict[str, list[Count]] = OrderedDict()

    def __len__(self) -> int:
        return self._size

    @property
    def full_ratio(self) -> float:
        """How full it is."""
        return self._size / self._limit

    def add(self, item_id: str, count: Count) -> int:
        """Keep a count until its item is known; how many others were given up."""
        self._waiting.setdefault(item_id, []).append(count)
        self._size += 1
        before = self._size
        while self._size > self._limit:
            self._size -= len(self._waiting.popitem(last=False)[1])
        return before - self._size

    def take(self, item_id: str) -> list[Count]:
        """What waited for an item that is known now."""
        counts = self._waiting.pop(item_id, [])
        self._size -= len(counts)
        return counts

    @property
    def item_ids(self) -> list[str]:
        """What is waited for."""
        return list(self._waiting)

    def forget(self, user_key: int) -> None:
        """Drop what is a user's."""
        for item_id in list(self._waiting):
            counts = [c for c in self.take(item_id) if c.shared is None or c.shared[0][0] != user_key]
            if counts:
                self._waiting[item_id] = counts
                self._size += len(counts)

    def state(self) -> dict[str, Any]:
        """Everything, as arrays."""
        return {"json": np.frombuffer(orjson.dumps(self._waiting, default=plain), np.uint8)}

    def restore(self, state: dict[str, Any], latest_ms: int) -> None:
        """Load `state`; times of a clock that was ahead are brought back to `latest_ms`."""
        found = orjson.loads(state["json"].tobytes())
        self._waiting = OrderedDict((i, [count_of(c, latest_ms) for c in counts]) for i, counts in found.items())
        self._size = sum(map(len, self._waiting.values()))


def plain(value: Any) -> Any:
    """Counts and arrays as JSON has them."""
    return list(value) if isinstance(value, tuple) else value.tolist()


def count_of(saved: Sequence[Any], latest_ms: int) -> Count:
    """A count as it was saved."""
    now_ms, weight, values, shared, before, follower = saved
    columns = None if shared is None else (np.array(shared[0], np.int64), np.array(shared[1], np.bool_))
    return Count(min(now_ms, latest_ms), weight, values, columns, before, follower and (follower[0], follower[1]))
