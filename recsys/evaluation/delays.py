"""Counters as a service would see them whose state consumer is behind: others' counts old, the user's own live."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from recsys.candidates.counter_feed import CounterFeed
from recsys.features.catalogue import Catalogue
from recsys.features.feature_kernels import Columns
from recsys.types import Feedback, Float32, Impression


class Delayed:
    """`until_ms` moves on with the replay. Events are told to it as they happen, to the counters when they become visible."""

    def __init__(self, feed: CounterFeed, catalogue: Catalogue, *, live: bool) -> None:
        """`live`: what is counted of a user as a person is known at once."""
        self._feed, self._catalogue, self._of_users = feed, catalogue, feed.of_users
        self._live = feed.empty() if live else None
        self._last = OrderedDict[str, str]()
        self.until_ms = -(2**62)

    def as_of_ms(self, now_ms: int) -> int:
        return min(now_ms, self.until_ms)

    def see_own(self, columns: Columns, counts: Float32, now_ms: int) -> None:
        if self._live is not None:
            counts[:, self._of_users] = self._live.counts(columns, now_ms)[:, self._of_users]

    def shown(self, impression: Impression, now_ms: int) -> None:
        """An impression was shown."""
        if self._live is not None and impression.activation != "deferred":
            rows = self._catalogue.rows([item.item_id for item in impression.items])
            shared = self._feed.contexts.shared(impression, now_ms)
            self._live.add(self._feed.columns(shared, rows[rows >= 0]), ("shown",), now_ms)

    def happened(self, feedback: Feedback, later: bool, now_ms: int) -> None:
        """Feedback came; `later`: not its session's first event."""
        row = self._catalogue.row(feedback.item_id)
        if self._live is None or row is None:
            return
        if values := [*self._feed.labels(feedback), *self._feed.others(feedback, later, self._last)]:
            columns = self._feed.columns(self._feed.contexts.of(feedback), np.array([row], np.int32))
            self._live.add(columns, values, now_ms)
