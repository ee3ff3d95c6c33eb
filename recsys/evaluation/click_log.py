"""A replay of clicks alone: an answer is made before each click that is not a session's first, then learned from."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from recsys.errors import BadInput
from recsys.evaluation.measures import NextItem
from recsys.evaluation.replayed_loop import History, Loop, event_of
from recsys.features.build import encode
from recsys.keys import key_of, mix
from recsys.ranking.request import Request
from recsys.ranking.stages import Ranked
from recsys.types import Feedback, HistoryEvent, Impression, ShownItem

_MOST_CONTEXTS = 200_000
"""Sessions whose last context is remembered."""


class ClickLog:
    """Answers, and learns from the candidates of each answer."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._types = set(loop.config.retrieval.count_types)
        self._learns = loop.config.ranking.scorer == "model"
        self.next_item = NextItem()
        self._context: OrderedDict[str, Mapping[str, Any]] = OrderedDict()
        self._requests = 0

    def impression(self, impression: Impression, now_ms: int) -> None:
        """There is none."""
        raise BadInput(
            f"impression {impression.request_id!r} among the events of a click log: replay it with click_log off",
            field="events",
        )

    def feedback(self, feedback: Feedback, now_ms: int) -> None:
        """Answer first if this is a session's next click; then history, counters, joiner."""
        loop, event = self._loop, event_of(feedback, now_ms)
        loop.advance(now_ms)
        history = loop.store.history(feedback.user_id)
        counted = learned = feedback
        if feedback.request_id is None and feedback.type in self._types:
            if self._wanted(feedback, now_ms) and self._goes_on(event, history):
                counted, learned = self._answer_before(feedback, now_ms)
            self._remember_context(feedback)
        loop.feedback(counted, learned, event, history)

    def _wanted(self, feedback: Feedback, now_ms: int) -> bool:
        """Whether an answer would be used, and is in the sample."""
        options = self._loop.options
        used = self._learns or now_ms >= options.report_from_ms
        return used and self._loop.chosen(feedback.session_id, feedback.user_id)

    def _answer_before(self, feedback: Feedback, now_ms: int) -> tuple[Feedback, Feedback]:
        """Show a list before the click: the click as counted belongs to it if its item was shown, as learned if it was a candidate."""
        loop, options = self._loop, self._loop.options
        self._requests += 1
        request = Request(
            request_id=f"replay-{self._requests}",
            user_id=feedback.user_id,
            n=options.n,
            session_id=feedback.session_id,
            context=self._context.get(feedback.session_id or feedback.user_id, {}),
        )
        ranked = loop.pipeline.rank(request, now_ms)
        impression = loop.pipeline.show(ranked).impression
        shown = [item.item_id for item in impression.items]
        if now_ms >= options.report_from_ms:
            found = loop.sources.catalogue.keys[ranked.gathered.candidates.rows, 0] == key_of(feedback.item_id)
            self.next_item.add(shown, feedback.item_id, key_of(feedback.user_id), found)
        loop.shown(impression, now_ms)
        if loop.trainer:
            loop.trainer.traffic.explored(impression, now_ms)
        joined = replace(feedback, request_id=request.request_id)
        opened = self._learns and self._open_pool(ranked, impression, feedback.item_id, now_ms)
        return joined if feedback.item_id in shown else feedback, joined if opened else feedback

    def _goes_on(self, event: HistoryEvent, history: History) -> bool:
        """Whether it is not its session's first."""
        if self._loop.sources.events.sessions.rows(history, event):
            return True
        return event.session_id is not None and any(past.session_id == event.session_id for past in history)

    def _open_pool(self, ranked: Ranked, impression: Impression, clicked: str, now_ms: int) -> bool:
        """Learn from the candidates: the one that is clicked next, and others drawn by a hash. False without the clicked one."""
        catalogue = self._loop.sources.catalogue
        row, rows = catalogue.row(clicked), ranked.kept.rows
        if ranked.features is None or row is None or not (chosen := np.flatnonzero(rows == row)).size:
            return False
        draws = mix(np.arange(len(rows)) + (self._requests << 20))
        draws[chosen[0]] = 0
        pool = np.argsort(draws, kind="stable")[: 1 + self._loop.config.training.pool_negatives]
        positions = enumerate(rows[pool].tolist(), start=1)
        items = tuple(ShownItem(item_id=catalogue.ids[r], position=n) for n, r in positions)
        features = encode(ranked.features.take(pool))
        self._loop.open(replace(impression, items=items, features=features, bandit=b""), now_ms)
        return True

    def _remember_context(self, feedback: Feedback) -> None:
        """The next request of the session comes from where this click came from: what it will be clicked from is not known."""
        name = feedback.session_id or feedback.user_id
        self._context[name] = feedback.context or {}
        self._context.move_to_end(name)
        if len(self._context) > _MOST_CONTEXTS:
            self._context.popitem(last=False)

    def report(self) -> dict[str, Any]:
        """How good the answers were."""
        return {"next_item": self.next_item.report()}
