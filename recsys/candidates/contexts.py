"""Impressions of the last hour, for what happens to their items: their context, what is not viewed yet, what brought what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from recsys.candidates.waiting_counts import Count, count_of, plain
from recsys.events.open_requests import OpenRequests
from recsys.features.build import shared_columns
from recsys.features.schema import Schema
from recsys.keys import joined, split
from recsys.types import Bool, Feedback, Impression, Int64

Arrays = dict[str, Any]
Shared = tuple[Int64, Bool]
HORIZON_MS = 3_600_000
"""An impression's context is kept this long for its positives: half loses the slow ones, double doubles the memory."""
_ENTRY_BYTES, _SLOT_BYTES, _ITEM_BYTES, _SOURCES_BYTES = 700, 9, 300, 150
"""Of an impression, of each of its shared columns, of each item that waits to be viewed, and of the sources of each item."""


@dataclass(slots=True)
class _Open:
    time_ms: int
    shared: Shared
    unseen: dict[str, list[Count]]
    """Deferred: items that were not viewed yet, and the positives that wait for it."""
    sources: dict[str, tuple[str, ...]]
    """What brought each item that was not acted upon yet."""
    num_bytes: int


class Contexts:
    """Impressions of the last hour by request, within `limit` bytes: of too many the newest stay."""

    def __init__(self, schema: Schema, limit: int, *, sources: bool = False) -> None:
        """`sources`: whether anybody asks for what brought an item."""
        self._schema, self._sources = schema, sources
        self._wanted = (
            sources
            or bool(schema.transition_context)
            or any(name in schema.context for names in schema.counters.slots for name in names)
        )
        self._open = OpenRequests[_Open](limit)

    @property
    def full_ratio(self) -> float:
        """How full it is."""
        return self._open.full_ratio

    def shared(self, impression: Impression, now_ms: int) -> Shared:
        """The shared columns of an impression, remembered."""
        shared = shared_columns(self._schema, impression.user_id, impression.context)
        deferred = impression.activation == "deferred"
        if self._wanted or deferred:
            unseen: dict[str, list[Count]] = {i.item_id: [] for i in impression.items} if deferred else {}
            sources = {i.item_id: i.sources for i in impression.items} if self._sources else {}
            self._keep(impression.request_id, now_ms, shared, unseen, sources)
            self._open.make_room()
            self._open.drop_before(now_ms - HORIZON_MS)
        return shared

    def _keep(
        self,
        request_id: str,
        time_ms: int,
        shared: Shared,
        unseen: dict[str, list[Count]],
        sources: dict[str, tuple[str, ...]],
    ) -> None:
        size = _ENTRY_BYTES + _SLOT_BYTES * len(shared[0]) + _ITEM_BYTES * len(unseen) + _SOURCES_BYTES * len(sources)
        self._open.add(request_id, _Open(time_ms, shared, unseen, sources, size))

    def of(self, feedback: Feedback) -> Shared:
        """The shared columns of the feedback's impression; its own context where that is not known."""
        found = self._open.get(feedback.request_id)
        return found.shared if found else shared_columns(self._schema, feedback.user_id, feedback.context or {})

    def wait(self, feedback: Feedback, count: Count) -> bool:
        """Whether the feedback's item was not viewed yet; then this count of it waits until it is."""
        found = self._open.get(feedback.request_id)
        if found is None or feedback.item_id not in found.unseen:
            return False
        found.unseen[feedback.item_id].append(count)
        return True

    def viewed(self, feedback: Feedback) -> list[Count] | None:
        """What waited for this view; None where its item counts as shown already, or was not shown."""
        found = self._open.get(feedback.request_id)
        if found is None or feedback.item_id not in found.unseen:
            return None
        self._open.shrink(found, _ITEM_BYTES)
        return found.unseen.pop(feedback.item_id)

    def sources_of(self, feedback: Feedback) -> tuple[str, ...]:
        """What brought the feedback's item; nothing where it was not shown, or acted upon already."""
        found = self._open.get(feedback.request_id)
        return () if found is None or feedback.item_id in found.unseen else found.sources.get(feedback.item_id, ())

    def acted(self, feedback: Feedback) -> tuple[str, ...]:
        """The same, of the first action on it: it is asked once."""
        sources = self.sources_of(feedback)
        if sources and (found := self._open.get(feedback.request_id)) is not None:
            del found.sources[feedback.item_id]
            self._open.shrink(found, _SOURCES_BYTES)
        return sources

    def state(self) -> Arrays:
        """Everything, as arrays."""
        entries = [entry for _, entry in self._open.items()]
        width = len(self._schema.shared_slots)
        unseen = {request_id: entry.unseen for request_id, entry in self._open.items() if entry.unseen}
        return {
            "ids": joined(self._open),
            "times": np.array([entry.time_ms for entry in entries], np.int64),
            "keys": np.array([entry.shared[0] for entry in entries], np.int64).reshape(-1, width),
            "masks": np.array([entry.shared[1] for entry in entries], np.bool_).reshape(-1, width),
            "unseen": np.frombuffer(orjson.dumps(unseen, default=plain), np.uint8),
        }

    def restore(self, state: Mapping[str, Any], latest_ms: int) -> None:
        """Load `state`, which does not say what brought an item; times of a clock that was ahead are brought back to `latest_ms`."""
        found = orjson.loads(state["unseen"].tobytes()) if "unseen" in state else {}
        times = np.minimum(state["times"], latest_ms).tolist()
        for request_id, time_ms, keys, mask in zip(
            split(state["ids"]), times, state["keys"], state["masks"].astype(np.bool_), strict=True
        ):
            items = found.get(request_id, {})
            unseen = {i: [count_of(count, latest_ms) for count in counts] for i, counts in items.items()}
            self._keep(request_id, time_ms, (keys, mask), unseen, {})
