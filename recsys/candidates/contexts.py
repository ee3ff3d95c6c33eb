"""Impressions of the last hour, for what happens to their items: their context, and which of their items are not viewed yet."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from recsys.candidates.waiting_counts import Count, count_of, plain
from recsys.features.build import shared_columns
from recsys.features.schema import Schema
from recsys.keys import joined, split
from recsys.types import Bool, Feedback, Impression, Int64

Arrays = dict[str, Any]
Shared = tuple[Int64, Bool]
HORIZON_MS = 3_600_000
"""An impression's context is kept this long for its positives: half loses the slow ones, double doubles the memory."""
_ENTRY_BYTES, _SLOT_BYTES, _ITEM_BYTES = 700, 9, 300
"""Of an impression, of each of its shared columns, and of each item that waits to be viewed."""


@dataclass(slots=True)
class _Open:
    time_ms: int
    shared: Shared
    unseen: dict[str, list[Count]] | None
    """Deferred: items that were not viewed yet, and the positives that wait for it."""


class Contexts:
    """Impressions of the last hour by request, within `limit` bytes: of too many the newest stay."""

    def __init__(self, schema: Schema, limit: int) -> None:
        self._schema, self._limit, self._bytes = schema, limit, 0
        self._wanted = bool(schema.transition_context) or any(
            name in schema.context for names in schema.counters.slots for name in names
        )
        self._open: OrderedDict[str, _Open] = OrderedDict()

    @property
    def full_ratio(self) -> float:
        """How full it is."""
        return self._bytes / self._limit

    def shared(self, impression: Impression, now_ms: int) -> Shared:
        """The shared columns of an impression, remembered."""
        shared = shared_columns(self._schema, impression.user_id, impression.context)
        deferred = impression.activation == "deferred"
        if self._wanted or deferred:
            unseen: dict[str, list[Count]] | None = {i.item_id: [] for i in impression.items} if deferred else None
            self._keep(impression.request_id, _Open(now_ms, shared, unseen))
            while self._bytes > self._limit or next(iter(self._open.values())).time_ms < now_ms - HORIZON_MS:
                self._drop(next(iter(self._open)))
        return shared

    def _keep(self, request_id: str, entry: _Open) -> None:
        self._drop(request_id)
        self._open[request_id] = entry
        self._bytes += self._size(entry)

    def _drop(self, request_id: str) -> None:
        if (entry := self._open.pop(request_id, None)) is not None:
            self._bytes -= self._size(entry)

    def _size(self, entry: _Open) -> int:
        return _ENTRY_BYTES + _SLOT_BYTES * len(entry.shared[0]) + _ITEM_BYTES * len(entry.unseen or ())

    def of(self, feedback: Feedback) -> Shared:
        """The shared columns of the feedback's impression; its own context where that is not known."""
        found = self._open.get(feedback.request_id or "")
        return found.shared if found else shared_columns(self._schema, feedback.user_id, feedback.context or {})

    def wait(self, feedback: Feedback, count: Count) -> bool:
        """Whether the feedback's item was not viewed yet; then this count of it waits until it is."""
        found = self._open.get(feedback.request_id or "")
        if found is None or not found.unseen or feedback.item_id not in found.unseen:
            return False
        found.unseen[feedback.item_id].append(count)
        return True

    def viewed(self, feedback: Feedback) -> list[Count] | None:
        """What waited for this view; None where its item counts as shown already, or was not shown."""
        found = self._open.get(feedback.request_id or "")
        if found is None or not found.unseen or feedback.item_id not in found.unseen:
            return None
        self._bytes -= _ITEM_BYTES
        return found.unseen.pop(feedback.item_id)

    def state(self) -> Arrays:
        """Everything, as arrays."""
        entries = list(self._open.values())
        width = len(self._schema.shared_slots)
        unseen = {request_id: entry.unseen for request_id, entry in self._open.items() if entry.unseen}
        return {
            "ids": joined(self._open),
            "times": np.array([entry.time_ms for entry in entries], np.int64),
            "keys": np.array([entry.shared[0] for entry in entries], np.int64).reshape(-1, width),
            "masks": np.array([entry.shared[1] for entry in entries], np.bool_).reshape(-1, width),
            "unseen": np.frombuffer(orjson.dumps(unseen, default=plain), np.uint8),
        }

    def restore(self, state: Arrays, latest_ms: int) -> None:
        """Load `state`; times of a clock that was ahead are brought back to `latest_ms`."""
        found = orjson.loads(state["unseen"].tobytes()) if "unseen" in state else {}
        times = np.minimum(state["times"], latest_ms).tolist()
        for request_id, time_ms, keys, mask in zip(
            split(state["ids"]), times, state["keys"], state["masks"].astype(np.bool_), strict=True
        ):
            items = found.get(request_id)
            unseen = items and {i: [count_of(count, latest_ms) for count in counts] for i, counts in items.items()}
            self._keep(request_id, _Open(time_ms, (keys, mask), unseen))
