"""What the counters count: impressions, positives of their items in the impression's context, events of a click log."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import numpy as np

from recsys.config import Config
from recsys.events.recent import Recent, recent_limit
from recsys.features.build import UserFeatures, shared_columns
from recsys.features.catalogue import Catalogue
from recsys.features.counters import Counters, columns_of
from recsys.features.kernels import Columns
from recsys.features.schema import Schema
from recsys.keys import joined, split
from recsys.types import Bool, Feedback, Float32, Impression, Int32, Int64

Arrays = dict[str, Any]
HORIZON_MS = 3_600_000
"""An impression's context is kept this long for its positives: half loses the slow ones, double doubles the memory."""
MAX_CONTEXTS = 200_000
"""Impressions whose context is kept at most: about 60 MB."""


class Contexts:
    """Shared columns of the impressions of the last hour, by request."""

    def __init__(self, schema: Schema) -> None:
        self._schema = schema
        self._wanted = bool(schema.transition_context) or any(
            name in schema.context for names in schema.counters.slots for name in names
        )
        self._open: OrderedDict[str, tuple[int, Int64, Bool]] = OrderedDict()

    def columns(self, impression: Impression, now_ms: int) -> tuple[Int64, Bool]:
        """The shared columns of an impression, remembered."""
        keys, mask = shared_columns(self._schema, impression.user_id, impression.context)
        if self._wanted:
            self._open[impression.request_id] = now_ms, keys, mask
            while len(self._open) > MAX_CONTEXTS or next(iter(self._open.values()))[0] < now_ms - HORIZON_MS:
                self._open.popitem(last=False)
        return keys, mask

    def of(self, feedback: Feedback) -> tuple[Int64, Bool]:
        """The shared columns of the feedback's impression; its own context where that is not known."""
        found = self._open.get(feedback.request_id or "")
        return found[1:] if found else shared_columns(self._schema, feedback.user_id, feedback.context or {})

    def state(self) -> Arrays:
        """Everything, as arrays."""
        entries = list(self._open.values())
        width = len(self._schema.shared_slots)
        return {
            "ids": joined(self._open),
            "times": np.array([time_ms for time_ms, _, _ in entries], np.int64),
            "keys": np.array([keys for _, keys, _ in entries], np.int64).reshape(-1, width),
            "masks": np.array([mask for _, _, mask in entries], np.bool_).reshape(-1, width),
        }

    def restore(self, state: Arrays, latest_ms: int) -> None:
        """Load `state`; times of a clock that was ahead are brought back to `latest_ms`."""
        ids = split(state["ids"])
        rows = zip(
            np.minimum(state["times"], latest_ms).tolist(), state["keys"], state["masks"].astype(np.bool_), strict=True
        )
        self._open = OrderedDict(zip(ids, rows, strict=True))


class Counting:
    """The counters of one ranking process. Its owner's lock makes one cut of them."""

    def __init__(self, config: Config, schema: Schema, catalogue: Catalogue) -> None:
        self._config, self._schema, self._catalogue = config, schema, catalogue
        self.counters = self._new()
        self.live: Counters | None = None
        """Replay: where a user's own counts come from, live while the others' are delayed."""
        self._contexts = Contexts(schema)
        self._tasks: dict[str, list[int]] = {}
        for index, task in enumerate(config.tasks):
            for kind in task.types:
                self._tasks.setdefault(kind, []).append(index)
        self._types = set(config.retrieval.count_types)
        self.counts_events = any("events" in counter.values for counter in config.features.counters)
        self._elsewhere = config.features.elsewhere_types
        self._last: dict[bool, OrderedDict[str, str]] = {live: OrderedDict() for live in (False, True)}
        """Item of each user's last event of the first type elsewhere; those that are counted live on their own."""
        most = recent_limit(config.capacity.memory_bytes)
        self._shown, self._positives = Recent(limit=most), Recent(limit=most)

    def _new(self) -> Counters:
        return Counters(self._schema, self._config.features.counter_rows)

    def split(self) -> None:
        """Replay: count users' own on their own, at once, by `shown_live` and `happened_live`."""
        self.live = self._new()

    def _columns(self, shared: tuple[Int64, Bool], rows: Int32) -> Columns:
        return columns_of(*shared, self._catalogue.keys[rows], self._catalogue.mask[rows])

    def shared_of(self, feedback: Feedback) -> tuple[Int64, Bool]:
        """The shared columns of the feedback's impression; its own context where that is not known."""
        return self._contexts.of(feedback)

    def shown(self, impression: Impression, now_ms: int) -> bool:
        """Count one impression's items as shown; False for a duplicate."""
        if not self._shown.add(impression.request_id, now_ms):
            return False
        self._count_shown(self.counters, impression, now_ms)
        return True

    @property
    def full_ratio(self) -> float:
        """How full the fuller set of ids is."""
        return max(self._shown.full_ratio, self._positives.full_ratio)

    def knows(self, request_id: str | int) -> bool:
        """Whether an impression of this request was counted of late. From any thread."""
        return self._shown.contains(request_id)

    def shown_live(self, impression: Impression, now_ms: int) -> None:
        """The same in the counters that are live."""
        if self.live is not None:
            self._count_shown(self.live, impression, now_ms)

    def _count_shown(self, counters: Counters, impression: Impression, now_ms: int) -> None:
        rows = self._catalogue.rows([item.item_id for item in impression.items])
        counters.add(self._columns(self._contexts.columns(impression, now_ms), rows[rows >= 0]), ("shown",), now_ms)

    def happened(self, feedback: Feedback, row: int, later: bool, now_ms: int) -> None:
        """Count one feedback on the item at `row`, each positive once; `later`: not its session's first event."""
        tasks = [
            task
            for task in self._positive_tasks(feedback)
            if self._positives.add(f"{feedback.request_id}\n{feedback.item_id}\n{task}", now_ms)
        ]
        self._count(self.counters, feedback, row, tasks, later, now_ms)

    def happened_live(self, feedback: Feedback, row: int, later: bool, now_ms: int) -> None:
        """The same in the counters that are live."""
        if self.live is not None:
            self._count(self.live, feedback, row, self._positive_tasks(feedback), later, now_ms)

    def _positive_tasks(self, feedback: Feedback) -> list[int]:
        if not feedback.request_id:
            return []
        least = {task: self._config.tasks[task].min_value for task in self._tasks.get(feedback.type, ())}
        return [t for t, low in least.items() if low is None or (feedback.value is not None and feedback.value >= low)]

    def _count(
        self, counters: Counters, feedback: Feedback, row: int, tasks: Iterable[int], later: bool, now_ms: int
    ) -> None:
        values = [f"positive {self._schema.tasks[task]}" for task in tasks]
        if self.counts_events and feedback.type in self._types:
            values += ["events", "later"] if later else ["events"]
        if feedback.request_id is None and feedback.type in self._elsewhere:
            values += self._elsewhere_values(feedback, counters is self.live)
        if values:
            counters.add(self._columns(self._contexts.of(feedback), np.array([row], np.int32)), values, now_ms)

    def _elsewhere_values(self, feedback: Feedback, live: bool) -> list[str]:
        """A type counts on its own, and once more if its item is the one of the user's last event of the first type."""
        kind, last = feedback.type, self._last[live]
        if kind == self._elsewhere[0]:
            last[feedback.user_id] = feedback.item_id
            last.move_to_end(feedback.user_id)
            if len(last) > MAX_CONTEXTS:
                last.popitem(last=False)
            return [f"elsewhere {kind}"]
        follows = last.get(feedback.user_id) == feedback.item_id
        return [f"elsewhere {kind}", f"followed {kind}"] if follows else [f"elsewhere {kind}"]

    def numbers(self, user: UserFeatures, rows: Int32, as_of_ms: int, now_ms: int) -> Float32:
        """The counter numbers of the items at `rows` [K, N]: others' as of `as_of_ms`, the user's own, where they are live, as of now."""
        columns = self._columns((user.shared_keys, user.shared_mask), rows)
        counts = self.counters.counts(columns, as_of_ms)
        if self.live is not None:
            own = self._schema.counters.of_users
            counts[:, own] = self.live.counts(columns, now_ms)[:, own]
        return self.counters.numbers(counts)

    def forget(self, user_key: int) -> None:
        """Drop what is counted of a user as a person; anonymous counts stay."""
        self.counters.forget(user_key)

    def state(self) -> dict[str, Arrays]:
        """Everything, as arrays."""
        return {
            "counters": self.counters.state(),
            "contexts": self._contexts.state(),
            "last": {"users": joined(self._last[False]), "items": joined(self._last[False].values())},
            "shown": dict(self._shown.state()),
            "positives": dict(self._positives.state()),
        }

    def restore(self, state: dict[str, Arrays], **times: int) -> None:
        """Load `state`; `times`: see `ForwardDecay.restore`."""
        self.counters.restore(state["counters"], **times)
        self._contexts.restore(state["contexts"], times.get("latest_ms", 2**62))
        self._last[False] = OrderedDict(zip(split(state["last"]["users"]), split(state["last"]["items"]), strict=True))
        self._shown.restore(state["shown"])
        self._positives.restore(state["positives"])
