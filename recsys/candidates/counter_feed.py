"""What the counters count: impressions, positives of their items in the impression's context, events of a click log."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from recsys.candidates.visibility import Visibility
from recsys.candidates.waiting_counts import Count
from recsys.capacity import entries
from recsys.config import Config
from recsys.events.seen_ids import Kind, SeenIds
from recsys.features.build import UserFeatures
from recsys.features.catalogue import Catalogue
from recsys.features.counters import Counters, columns_of
from recsys.features.feature_kernels import Columns
from recsys.features.schema import Schema
from recsys.keys import joined, split
from recsys.types import Bool, Feedback, Float32, Int32, Int64

Arrays = dict[str, Any]
_LAST_BYTES = 300
"""Of a user's last event elsewhere."""
_FEWEST_ROWS = 4096


class CounterFeed:
    """The counters of one ranking process, and what they are fed with. Its owner's lock makes one cut of them."""

    def __init__(self, config: Config, schema: Schema, catalogue: Catalogue, seen: SeenIds) -> None:
        """`seen`: knows which positives were counted."""
        self._config, self._schema, self._catalogue, self._seen = config, schema, catalogue, seen
        self.counters = self._empty()
        self._most_last = entries(config.capacity.memory_bytes, "contexts", 4 * _LAST_BYTES)
        self._tasks: dict[str, list[int]] = {}
        for index, task in enumerate(config.tasks):
            for kind in task.types:
                self._tasks.setdefault(kind, []).append(index)
        self._types = set(config.retrieval.count_types)
        self.counts_events = any("events" in counter.values for counter in config.features.counters)
        self._elsewhere = config.features.elsewhere_types
        self._last = OrderedDict[str, str]()
        """Item of each user's last event of the first type elsewhere."""

    def _empty(self) -> Counters:
        """Counters of nothing, within half of the bytes of all counters; co-visits have a quarter."""
        config, layout = self._config, self._schema.counters
        row_bytes = 28 + 4 * len(layout.half_lives_s) * len(layout.columns)
        rows = entries(config.capacity.memory_bytes, "counters", 2 * row_bytes)
        return Counters(self._schema, max(_FEWEST_ROWS, min(config.features.counter_rows, rows)))

    @property
    def of_users(self) -> Bool:
        """[C] Which counters are a user's own."""
        return self._schema.counters.of_users

    def columns(self, shared: tuple[Int64, Bool], rows: Int32) -> Columns:
        """Keys of the items at `rows` beside those of a user and a context."""
        return columns_of(*shared, self._catalogue.keys[rows], self._catalogue.mask[rows])

    def count(self, count: Count, rows: Int32) -> None:
        """Add a count to the counters of the items at `rows`."""
        assert count.shared is not None
        self.counters.add(self.columns(count.shared, rows), count.values, count.now_ms, count.weight)

    def may_count(self, feedback: Feedback) -> bool:
        """Whether feedback of this kind could count for anything here."""
        if feedback.request_id:
            return feedback.type in self._tasks
        return feedback.type in self._elsewhere

    def positives(self, feedback: Feedback, now_ms: int) -> list[str]:
        """The columns of the tasks whose label a feedback makes 1, each once of an item of a request."""
        return [
            f"positive {self._schema.tasks[task]}"
            for task in self._positive_tasks(feedback)
            if self._seen.first(Kind.POSITIVE, f"{feedback.request_id}\n{feedback.item_id}\n{task}", now_ms)
        ]

    def others(self, feedback: Feedback, later: bool) -> list[str]:
        """The other columns that a feedback counts for; `later`: not its session's first event."""
        values: list[str] = []
        if self.counts_events and feedback.type in self._types:
            values += ["events", "later"] if later else ["events"]
        if feedback.request_id is None and feedback.type in self._elsewhere:
            values += self._elsewhere_values(feedback)
        return values

    def _positive_tasks(self, feedback: Feedback) -> list[int]:
        if not feedback.request_id:
            return []
        least = {task: self._config.tasks[task].min_value for task in self._tasks.get(feedback.type, ())}
        return [t for t, low in least.items() if low is None or (feedback.value is not None and feedback.value >= low)]

    def _elsewhere_values(self, feedback: Feedback) -> list[str]:
        """A type counts on its own, and once more if its item is the one of the user's last event of the first type."""
        kind, last = feedback.type, self._last
        if kind == self._elsewhere[0]:
            last[feedback.user_id] = feedback.item_id
            last.move_to_end(feedback.user_id)
            if len(last) > self._most_last:
                last.popitem(last=False)
            return [f"elsewhere {kind}"]
        follows = last.get(feedback.user_id) == feedback.item_id
        return [f"elsewhere {kind}", f"followed {kind}"] if follows else [f"elsewhere {kind}"]

    def numbers(self, user: UserFeatures, rows: Int32, visibility: Visibility, now_ms: int) -> Float32:
        """The counter numbers of the items at `rows` [K, N], as far as they may be known."""
        columns = self.columns((user.shared_keys, user.shared_mask), rows)
        counts = self.counters.counts(columns, visibility.as_of_ms(now_ms))
        visibility.see_own(columns, counts, now_ms)
        return self.counters.numbers(counts)

    def forget(self, user_key: int) -> None:
        """Drop what is counted of a user as a person; anonymous counts stay."""
        self.counters.forget(user_key)

    def state(self) -> dict[str, Arrays]:
        """Everything, as arrays."""
        return {
            "counters": self.counters.state(),
            "last": {"users": joined(self._last), "items": joined(self._last.values())},
        }

    def restore(self, state: dict[str, Arrays], **times: int) -> None:
        """Load `state`; `times`: see `ForwardDecay.restore`."""
        self.counters.restore(state["counters"], **times)
        self._last = OrderedDict(zip(split(state["last"]["users"]), split(state["last"]["items"]), strict=True))
