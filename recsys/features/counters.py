"""Decayed impressions and positives per task, by user and by item: the rates that the ranker sees as numbers."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from recsys.types import Float32, Int32

_SMOOTHING = 10.0
"""Impressions' worth of prior in each rate: half of it doubles the noise of new items, double hides a hundred impressions."""


class RateCounters:
    """Counts with exponential forgetting, for T tasks. One writer; readers may run beside it.

    Each entity keeps (time of last update, impressions, positives [T]); decay is applied when it is read or updated, so a
    count is what an exact decayed sum would be, whatever the order of updates.
    """

    def __init__(self, half_life_s: float, priors: tuple[float, ...]) -> None:
        self._half_life_ms = half_life_s * 1000.0
        self._priors = np.array(priors)
        self._width = 1 + len(priors)
        self._users: dict[str, npt.NDArray[np.float64]] = {}
        self._items = np.zeros((1024, 1 + self._width))

    def impression(self, user_id: str, rows: Int32, now_ms: int) -> None:
        """Count shown items (rows ≥ 0, distinct)."""
        self._touch_user(user_id, now_ms)[1] += len(rows)
        self._touch_items(rows, now_ms)
        self._items[rows, 1] += 1.0

    def positive(self, user_id: str, row: int, task: int, now_ms: int) -> None:
        """Count one positive of a task, once per (impression, item, task): the caller drops duplicates."""
        self._touch_user(user_id, now_ms)[2 + task] += 1.0
        if row >= 0:
            self._touch_items(np.array([row], np.int32), now_ms)
            self._items[row, 2 + task] += 1.0

    def forget(self, user_id: str) -> None:
        """Drop what is counted of a user; the items keep their counts."""
        self._users.pop(user_id, None)

    def user_rates(self, user_id: str, now_ms: int) -> Float32:
        """log(smoothed rate / prior) [T]; 0 for an unknown user."""
        entry = self._users.get(user_id)
        if entry is None:
            return np.zeros(len(self._priors), np.float32)
        return self._log_ratio(entry[None, :], now_ms)[0]

    def item_rates(self, rows: Int32, now_ms: int) -> Float32:
        """log(smoothed rate / prior) [n, T]; 0 for an item never shown."""
        if len(rows) and rows.max() >= len(self._items):
            known = np.where(rows < len(self._items), rows, 0)
            return np.where((rows < len(self._items))[:, None], self._log_ratio(self._items[known], now_ms), 0).astype(
                np.float32
            )
        return self._log_ratio(self._items[rows], now_ms)

    def _log_ratio(self, entries: npt.NDArray[np.float64], now_ms: int) -> Float32:
        decay = np.exp2((entries[:, 0] - now_ms) / self._half_life_ms)
        decay = np.minimum(decay, 1.0)[:, None]
        shown = entries[:, 1:2] * decay + _SMOOTHING
        positives = entries[:, 2:] * decay + _SMOOTHING * self._priors
        return np.log(np.minimum(positives / shown, 1.0) / self._priors).astype(np.float32)

    def _touch_user(self, user_id: str, now_ms: int) -> npt.NDArray[np.float64]:
        entry = self._users.get(user_id)
        if entry is None:
            entry = self._users[user_id] = np.zeros(1 + self._width)
            entry[0] = now_ms
        elif now_ms > entry[0]:
            entry[1:] *= 2.0 ** ((entry[0] - now_ms) / self._half_life_ms)
            entry[0] = now_ms
        return entry

    def _touch_items(self, rows: Int32, now_ms: int) -> None:
        if len(rows) and (size := int(rows.max()) + 1) > len(self._items):
            grown = np.zeros((max(size, 2 * len(self._items)), 1 + self._width))
            grown[: len(self._items)] = self._items
            self._items = grown
        last = self._items[rows, 0]
        later = np.maximum(last, now_ms)
        self._items[rows, 1:] *= np.exp2((last - later) / self._half_life_ms)[:, None]
        self._items[rows, 0] = later

    def state(self) -> dict[str, npt.NDArray[np.generic]]:
        """Everything, as arrays; user ids as UTF-8 with a newline after each (ids hold no control characters)."""
        users = list(self._users)
        return {
            "users": np.frombuffer("".join(u + "\n" for u in users).encode(), np.uint8),
            "user_counts": np.array([self._users[u] for u in users]).reshape(len(users), 1 + self._width),
            "items": self._items,
        }

    def restore(self, state: dict[str, npt.NDArray[np.generic]], row_map: Int32) -> None:
        """Load `state`; `row_map[old row]` is today's row, -1 where the item is gone."""
        users = state["users"].tobytes().decode().split("\n")[:-1]
        self._users = dict(zip(users, state["user_counts"].astype(np.float64), strict=True))
        items = state["items"][: len(row_map)]
        kept = row_map[: len(items)] >= 0
        self._items = np.zeros((max(1024, int(row_map.max(initial=0)) + 1), 1 + self._width))
        self._items[row_map[: len(items)][kept]] = items[kept]
