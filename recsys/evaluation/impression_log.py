"""A replay of logged impressions: each is scored by what serving could have known, then learned from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from recsys.evaluation.measures import Progressive
from recsys.evaluation.replayed_loop import Loop, event_of
from recsys.features.build import Features, encode
from recsys.keys import key_of
from recsys.ranking.request import Request
from recsys.training.opened import Emission
from recsys.types import Bool, Feedback, Float32, Impression


class ImpressionLog:
    """Scores impressions as they were shown."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        loop.before_change, loop.on_labels = self._score_waiting, self._labelled
        self.progressive = Progressive(loop.schema.tasks)
        self.on_scored: Callable[[Emission], None] = lambda emission: None
        """Called with labels of a prediction, before these are added to `progressive`."""
        self._has_begun = False
        self._waiting: list[tuple[Impression, Features]] = []
        self._predictions: dict[str, tuple[str, Float32, Bool]] = {}
        """Of each request with labels to come: user, predictions [K, T], tasks [T] that are not final yet."""

    @property
    def num_open(self) -> int:
        """Predictions that wait for a label."""
        return len(self._predictions)

    def impression(self, impression: Impression, now_ms: int) -> None:
        """Compute its features as of now, score it later with today's parameters, open it, count it."""
        loop = self._loop
        if not self._has_begun:  # days and synchronisations count from the first of them
            self._has_begun, loop.timeline.origin_ms = True, now_ms
        loop.advance(now_ms)
        if loop.chosen(impression.session_id, impression.user_id):
            features = self._features_of(impression, now_ms)
            if features is not None:
                self._waiting.append((impression, features))
                loop.open(replace(impression, schema=loop.schema.hash, features=encode(features)), now_ms)
        loop.shown(impression, now_ms)

    def _features_of(self, impression: Impression, now_ms: int) -> Features | None:
        loop = self._loop
        if loop.trainer is None:
            return None
        request = Request(request_id=impression.request_id, user_id=impression.user_id, context=impression.context)
        opened = loop.pipeline.open(request, now_ms)
        rows = loop.sources.catalogue.rows([item.item_id for item in impression.items])
        if (rows < 0).any():
            return None
        return loop.pipeline.features_of(loop.pipeline.user_of(opened), opened.history_rows, rows, now_ms)

    def feedback(self, feedback: Feedback, now_ms: int) -> None:
        """What happened to an impression's item, or elsewhere."""
        self._loop.advance(now_ms)
        history = self._loop.store.history(feedback.user_id)
        self._loop.feedback(feedback, feedback, event_of(feedback, now_ms), history)

    def _score_waiting(self) -> None:
        """Score every waiting impression: no parameter has changed since it was shown."""
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, []
        predictions = self._loop.copy.scorer.predict([features for _, features in waiting])
        for (impression, _), predicted in zip(waiting, predictions, strict=True):
            if impression.time_ms >= self._loop.options.report_from_ms:
                left = np.ones(len(self._loop.schema.tasks), np.bool_)
                self._predictions[impression.request_id] = impression.user_id, predicted, left

    def _labelled(self, emission: Emission) -> None:
        if emission.request_id not in self._predictions:
            return
        self.on_scored(emission)
        user_id, predicted, left = self._predictions[emission.request_id]
        day, final = self._loop.timeline.day(emission.time_ms), emission.final
        for task in np.flatnonzero(final.any(0)):
            known = final[:, task]
            users, days = np.full(known.sum(), key_of(user_id)), np.full(known.sum(), day)
            name = self._loop.schema.tasks[task]
            self.progressive.add(name, predicted[known, task], emission.labels[known, task], users, days)
        left &= ~final.all(0)
        if not left.any():
            del self._predictions[emission.request_id]

    def report(self) -> dict[str, Any]:
        """How good the predictions were."""
        return self.progressive.report()
