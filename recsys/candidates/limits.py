"""How much of one user counts: so often within an hour on one item, and less where nothing else is known of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from recsys.types import HistoryEvent, Int64

WINDOW_MS = 3_600_000
NEWCOMER = 0.1
"""What the first action of a user without another item in the history weighs; the next on the same item weigh nothing. Half makes new
sites slower to see what is popular, double lets forty new users outdo four known ones."""
MOST = 255
_COUNT_BITS = 8
_OF_ITEMS, _OF_USERS = np.int64(0x5851F42D4C957F2D), 0x14057B7EF767814F
"""Large odd numbers: ids that are small numbers do not meet in one pair."""


class Limits:
    """How often each pair of user and item counted in the hour since its first time. Beyond `limit` pairs the older half is forgotten."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._young: dict[int, int] = {}
        self._old: dict[int, int] = {}
        """Pair → (first time, how often), packed: of this hour of log time, and of the one before."""
        self._since_ms = 0

    @property
    def full_ratio(self) -> float:
        """How full it is."""
        return (len(self._young) + len(self._old)) / self._limit

    def admit(self, pair: int, most: int, now_ms: int) -> bool:
        """Whether one more of a pair counts; then it is remembered."""
        return self._admit([pair], most, now_ms)[0]

    def admit_items(self, user_key: int, item_keys: Int64, most: int, now_ms: int) -> list[bool]:
        """Whether one more of a user counts, for each of these items [n]."""
        of_user = np.int64((user_key * _OF_USERS + 2**63) % 2**64 - 2**63)
        return self._admit((item_keys * _OF_ITEMS + of_user).tolist(), most, now_ms)

    def _admit(self, chosen: list[int], most: int, now_ms: int) -> list[bool]:
        if now_ms - self._since_ms >= WINDOW_MS or 2 * (len(self._young) + len(chosen)) > self._limit:
            self._old, self._young, self._since_ms = self._young, {}, max(now_ms, self._since_ms)
        young, old = self._young, self._old
        since, fresh = (now_ms - WINDOW_MS) << _COUNT_BITS | MOST, now_ms << _COUNT_BITS | 1
        admitted = []
        for pair in chosen:
            known = young.get(pair) or old.get(pair, 0)
            if known <= since:
                young[pair] = fresh
            elif known & MOST < most:
                young[pair] = known + 1
            else:
                admitted.append(False)
                continue
            admitted.append(True)
        return admitted

    def state(self) -> dict[str, Any]:
        """Everything, as arrays."""
        old = {pair: known for pair, known in self._old.items() if pair not in self._young}
        pairs = old | self._young
        return {
            "pairs": np.fromiter(pairs, np.int64, len(pairs)),
            "counts": np.fromiter(pairs.values(), np.int64, len(pairs)),
            "size": np.array([len(old), self._since_ms], np.int64),
        }

    def restore(self, state: dict[str, Any], latest_ms: int) -> None:
        """Load `state`; times of a clock that was ahead are brought back to `latest_ms`."""
        counts = np.minimum(state["counts"], latest_ms << _COUNT_BITS | MOST)
        size, since_ms = state["size"].tolist()
        self._since_ms = min(since_ms, latest_ms)
        pairs = list(zip(state["pairs"].tolist(), counts.tolist(), strict=True))
        self._old, self._young = dict(pairs[:size]), dict(pairs[size:])


def is_newcomer(history: Sequence[HistoryEvent], item_id: str) -> bool:
    """Whether a user acted upon no other item."""
    return all(past.item_id == item_id for past in history)
