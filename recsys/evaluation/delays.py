"""What scoring knows in a replay whose services are behind, and from when on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np

from recsys.candidates.base import Parts
from recsys.candidates.contexts import Contexts
from recsys.candidates.counter_feed import CounterFeed
from recsys.capacity import bound_bytes
from recsys.events.seen_ids import SeenIds
from recsys.features.feature_kernels import Columns
from recsys.types import Feedback, Float32, Impression


class Timeline:
    """How old what scoring knows is. What happens is told to it, and applied once scoring may know of it."""

    def __init__(self, delay_s: float, sync_interval_s: float) -> None:
        """Exactly `delay_s` old; as at the last multiple of `sync_interval_s` since the origin (0: at any time)."""
        self._delay_ms, self.sync_ms = int(delay_s * 1000), int(sync_interval_s * 1000)
        self.is_old = bool(self._delay_ms or self.sync_ms)
        """Whether anything is seen later than it happens."""
        self.origin_ms: int | None = None
        """Of the first event that counts as one."""
        self.until_ms = -(2**62)
        """What came by then may be known."""
        self._later: deque[tuple[int, Callable[[], object]]] = deque()

    @property
    def is_late(self) -> bool:
        """Whether it is seen exactly a delay later, each step by itself."""
        return bool(self._delay_ms)

    def day(self, time_ms: int) -> int:
        """Days since the origin, from 1."""
        assert self.origin_ms is not None
        return 1 + (time_ms - self.origin_ms) // 86_400_000

    def visible_ms(self, now_ms: int) -> int:
        """Until when what came may be known now; the first call sets the origin."""
        if self.origin_ms is None:
            self.origin_ms = now_ms
        visible = now_ms - self._delay_ms
        if self.sync_ms:
            visible = min(visible, self.origin_ms + (now_ms - self.origin_ms) // self.sync_ms * self.sync_ms)
        return visible

    def when_visible(self, time_ms: int, apply: Callable[[], object]) -> None:
        """Apply what happened at `time_ms`: now, or when it may be known."""
        if self.is_old:
            self._later.append((time_ms, apply))
        else:
            apply()

    def move(self, until_ms: int) -> None:
        """Apply what came until then."""
        self.until_ms = until_ms
        while self._later and self._later[0][0] <= until_ms:
            self._later.popleft()[1]()


class Delayed:
    """Counters as a service would see them whose state consumer is behind: others' counts as old as the timeline says, and (`live`) the
    user's own as of now. The user's own are counted here, apart from those that serve."""

    def __init__(self, parts: Parts, timeline: Timeline, *, live: bool) -> None:
        self._catalogue, self._timeline = parts.catalogue, timeline
        memory = parts.config.capacity.memory_bytes
        self._own = CounterFeed(*parts, SeenIds(memory)) if live else None
        self._contexts = Contexts(parts.schema, bound_bytes(memory, "contexts"))

    def as_of_ms(self, now_ms: int) -> int:
        return min(now_ms, self._timeline.until_ms)

    def see_own(self, columns: Columns, counts: Float32, now_ms: int) -> None:
        if self._own is not None:
            counts[:, self._own.of_users] = self._own.counters.counts(columns, now_ms)[:, self._own.of_users]

    def shown(self, impression: Impression, now_ms: int) -> None:
        """An impression was shown."""
        if self._own is None:
            return
        shared = self._contexts.shared(impression, now_ms)
        if impression.activation != "deferred":
            rows = self._catalogue.rows([item.item_id for item in impression.items])
            self._own.counters.add(self._own.columns(shared, rows[rows >= 0]), ("shown",), now_ms)

    def happened(self, feedback: Feedback, later: bool, now_ms: int) -> None:
        """Feedback came; `later`: not its session's first event."""
        row = self._catalogue.row(feedback.item_id)
        if self._own is None or row is None:
            return
        if values := [*self._own.positives(feedback, now_ms), *self._own.others(feedback, later)]:
            columns = self._own.columns(self._contexts.of(feedback), np.array([row], np.int32))
            self._own.counters.add(columns, values, now_ms)
