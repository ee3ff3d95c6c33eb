"""Replay: the whole loop over event files, offline, in event time, through the same code as the services.

Test, then train: each impression is scored by what serving could have known, then learned from. A click log has no
impressions; there an answer is made before each click that is not a session's first.
"""

from __future__ import annotations

import hashlib
import resource
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from recsys.candidates.meaning import Meaning
from recsys.candidates.sources import Sources
from recsys.config import Config, parse
from recsys.evaluation.delays import Delayed
from recsys.evaluation.measures import NextItem, Progressive
from recsys.evaluation.serving import ServingCopy
from recsys.features.build import Features, encode
from recsys.features.catalogue import Catalogue
from recsys.features.schema import Schema
from recsys.keys import key_of, mix
from recsys.ranking.pipeline import Pipeline
from recsys.ranking.request import Request
from recsys.ranking.stages import Ranked
from recsys.state.memory_state import MemoryState
from recsys.training.steps import StepReport
from recsys.training.trainer import Trainer
from recsys.types import Bool, Feedback, Float32, HistoryEvent, Impression, Item, ShownItem, UserUpdate

_MOST_CONTEXTS = 200_000
"""Sessions of a click log whose last context is remembered."""
Event = tuple[int, str, Item | Impression | Feedback]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a replay sees the stream; seconds of event time."""

    report_from_ms: int = 0
    until_ms: int = 2**62
    """The replay ends before the first event at or after this time."""
    delay_s: float = 0.0
    """Scoring sees parameters and others' counters exactly this old; the user's own history live."""
    sync_interval_s: float = 0.0
    """Scoring sees them as at the last multiple of this since the first impression (or feedback)."""
    label_delay_s: float | None = None
    """Labels are final this long after their impression; None: after each task's window, in a click log at once, since the click
    that labels a pool also opens it."""
    freeze_user: bool = False
    """The user's own history and counters are as old, too."""
    sample: float = 1.0
    """Share of requests answered and scored, by a hash of the session (of the user where there are none)."""
    n: int = 20
    click_log: bool = True
    """Whether feedback without a request may be answered before it happens: not where the stream has impressions of its own."""


class Replay:
    """One run. Feed events in time order, then take `result`."""

    def __init__(self, config: Config, options: Options, folder: Path) -> None:
        unhurried = config.ranking.model_copy(update={"deadline_ms": float("inf")})
        wait_s = 0.0 if options.label_delay_s is None and options.click_log else options.label_delay_s
        if wait_s is not None:
            raw = config.model_dump(mode="json")
            config = parse(raw | {"tasks": [task | {"window_s": wait_s} for task in raw["tasks"]]})
        self.config = config = config.model_copy(update={"ranking": unhurried})
        self.options = options
        self.schema = Schema.of(config)
        self.store = MemoryState(config.state.history_len, config.state.seen_len)
        self.sources = Sources(config, self.schema, Catalogue(self.schema))
        self.trainer = (
            Trainer(config, folder)
            if config.ranking.scorer == "model" or config.retrieval.sources.get("nearest") or config.explores
            else None
        )
        self.copy = ServingCopy(
            config,
            self.schema,
            self.sources.catalogue,
            self.trainer,
            live=not (options.delay_s or options.sync_interval_s),
            each_step=bool(options.delay_s),
        )
        self.pipeline = Pipeline(
            config,
            self.schema,
            self.store,
            self.sources,
            self.copy.scorer,
            self.copy.generations,
            self.copy.bandit,
        )
        self._is_old = bool(options.delay_s or options.sync_interval_s)
        counting, live = self.sources.events.counting, not options.freeze_user and self._is_old
        self._visibility = Delayed(counting, self.sources.catalogue, live=live)
        if self._is_old:
            self.sources.visibility = self._visibility
        self._meaning = Meaning(config)
        self._click_types = set(config.retrieval.count_types)
        self._later: deque[tuple[int, Callable[[], None]]] = deque()
        self._origin_ms: int | None = None
        self._visible_ms = -(2**62)
        self.progressive = Progressive(self.schema.tasks)
        self.next_item = NextItem()
        self._context: OrderedDict[str, Mapping[str, Any]] = OrderedDict()
        self._waiting: list[tuple[Impression, Features]] = []
        self._predictions: dict[str, tuple[str, Float32, Bool]] = {}
        """Of each request with labels to come: user, predictions [K, T], tasks [T] that are not final yet."""
        self._untrained = 0
        self._step_examples = max(1, config.training.batch_size // 4)
        """Examples between two steps. A service steps whenever labels are final; a quarter of a batch took 8% more time than a
        whole one on KuaiRand, half of it costs more again, double knows later what it could."""
        self._requests = 0
        self.events = 0
        self._now_ms = 0
        self._examples = 0
        self._has_impressions = False
        self._started = time.perf_counter()

    def run(self, events: Iterable[Event], on_progress: Callable[[int, int], None] = lambda *_: None) -> dict[str, Any]:
        """Replay all of them; `on_progress(events, event time)` now and then."""
        for event in events:
            if not self.step(*event):
                break
            if self.events % 2000 == 0:
                on_progress(self.events, event[0])
        return self.finish()

    def step(self, now_ms: int, kind: str, message: Item | Impression | Feedback) -> bool:
        """Replay one event; False: it lies beyond the end, and so do all that follow."""
        if now_ms >= self.options.until_ms:
            return False
        self._now_ms = now_ms
        if kind == "item":
            self.item(message)  # type: ignore[arg-type]
        else:
            self._advance(now_ms, kind)
            if kind == "impression":
                self.impression(message, now_ms)  # type: ignore[arg-type]
            else:
                self.feedback(message, now_ms)  # type: ignore[arg-type]
        self.events += 1
        return True

    def finish(self) -> dict[str, Any]:
        """Learn what is left, when every label is final; the report."""
        self._train(self._now_ms + 1 + int(max(task.window_s for task in self.config.tasks) * 1000))
        return self.result()

    def item(self, item: Item) -> None:
        """An upsert or delete, effective at once everywhere."""
        self.sources.item(item)
        if self.trainer:
            self.trainer.item(item)

    def _advance(self, now_ms: int, kind: str) -> None:
        """Apply what has become visible to scoring by `now_ms`."""
        options = self.options
        if kind == "impression" and not self._has_impressions:
            self._has_impressions = True
            self._origin_ms = now_ms
        if self._origin_ms is None:
            self._origin_ms = now_ms
        visible = now_ms - int(options.delay_s * 1000)
        if options.sync_interval_s:
            step = int(options.sync_interval_s * 1000)
            visible = min(visible, self._origin_ms + (now_ms - self._origin_ms) // step * step)
        if visible > self._visible_ms:
            if options.sync_interval_s:
                if self._untrained:
                    self._train(visible + 1)
                if not options.delay_s:
                    self.copy.capture(visible)
            self._visible_ms = visible
            self._visibility.until_ms = visible
            while self._later and self._later[0][0] <= visible:
                self._later.popleft()[1]()
            if self.copy.behind(visible):
                self._score_waiting()
                self.copy.advance(visible)

    def _when_visible(self, time_ms: int, apply: Callable[[], None]) -> None:
        if not self._is_old:
            apply()
        else:
            self._later.append((time_ms, apply))

    def impression(self, impression: Impression, now_ms: int) -> None:
        """Compute its features as of now, score it later with today's parameters, open it, count it."""
        if self._chosen(impression.session_id, impression.user_id):
            features = self._features_of(impression, now_ms)
            if features is not None:
                self._waiting.append((impression, features))
                self._open(replace(impression, schema=self.schema.hash, features=encode(features)), now_ms)
        self._count_impression(impression, now_ms)

    def _features_of(self, impression: Impression, now_ms: int) -> Features | None:
        if self.trainer is None:
            return None
        request = Request(request_id=impression.request_id, user_id=impression.user_id, context=impression.context)
        opened = self.pipeline.open(request, now_ms)
        rows = self.sources.catalogue.rows([item.item_id for item in impression.items])
        if (rows < 0).any():
            return None
        return self.pipeline.features_of(self.pipeline.user_of(opened), opened.history_rows, rows, now_ms)

    def _open(self, impression: Impression, now_ms: int) -> None:
        assert self.trainer is not None
        self.trainer.impression(impression, now_ms, StepReport())
        self._learnable(len(impression.items), now_ms)

    def _learnable(self, examples: int, now_ms: int) -> None:
        """So many examples more wait to be learned: step now and then."""
        self._untrained += examples
        self._examples += examples
        if self._untrained >= self._step_examples:
            self._train(now_ms)

    def _count_impression(self, impression: Impression, now_ms: int) -> None:
        if self.pipeline.rules.uses_seen:
            seen = tuple(item.item_id for item in impression.items)
            update = UserUpdate(user_id=impression.user_id, seen=seen, seen_ms=now_ms)
            if self.options.freeze_user:
                self._when_visible(now_ms, lambda: self.store.apply((update,), {}))
            else:
                self.store.apply((update,), {})
        self._visibility.shown(impression, now_ms)
        self._when_visible(now_ms, lambda: _ignore(self.sources.events.impression(impression, now_ms)))

    def feedback(self, feedback: Feedback, now_ms: int) -> None:
        """Answer first if this is a click log's next click; then history, counters, joiner."""
        event = HistoryEvent(
            time_ms=now_ms,
            event_id=feedback.event_id,
            item_id=feedback.item_id,
            type=feedback.type,
            session_id=feedback.session_id,
        )
        history = self.store.get(feedback.user_id).history
        may_answer = self.options.click_log and not self._has_impressions and feedback.request_id is None
        learned = feedback
        if may_answer and feedback.type in self._click_types:
            feedback, learned = self._answer_before(feedback, event, history, now_ms)
            self._remember_context(feedback)
        if update := self._meaning.update(feedback, event, now_ms):
            if self.options.freeze_user:
                self._when_visible(now_ms, lambda: self.store.apply((update,), {}))
            else:
                self.store.apply((update,), {})
        self._count_feedback(feedback, history, event, now_ms)
        if self.trainer:
            self.trainer.feedback(learned, now_ms, StepReport())
            if self.config.ranking.scorer != "model":  # towers and bandit alone learn
                self._learnable(1, now_ms)

    def _count_feedback(
        self, feedback: Feedback, history: tuple[HistoryEvent, ...], event: HistoryEvent, now_ms: int
    ) -> None:
        if self._is_old:
            events = self.sources.events
            later = events.counting.counts_events and bool(events.sessions.rows(history, event))
            self._visibility.happened(feedback, later, now_ms)
        self._when_visible(now_ms, lambda: _ignore(self.sources.events.feedback(feedback, history, event, now_ms)))

    def _answer_before(
        self, feedback: Feedback, event: HistoryEvent, history: tuple[HistoryEvent, ...], now_ms: int
    ) -> tuple[Feedback, Feedback]:
        """Show a list before the click: the click as counted belongs to it if its item was shown, as learned if it was a candidate."""
        if not self.sources.events.sessions.rows(history, event) and not self._in_session(history, event):
            return feedback, feedback
        learning = self.config.ranking.scorer == "model"
        reported = now_ms >= self.options.report_from_ms
        if not (learning or reported) or not self._chosen(feedback.session_id, feedback.user_id):
            return feedback, feedback
        self._requests += 1
        request = Request(
            request_id=f"replay-{self._requests}",
            user_id=feedback.user_id,
            n=self.options.n,
            session_id=feedback.session_id,
            context=self._context.get(feedback.session_id or feedback.user_id, {}),
        )
        ranked = self.pipeline.rank(request, now_ms)
        impression = self.pipeline.show(ranked).impression
        shown = [item.item_id for item in impression.items]
        if reported:
            found = self.sources.catalogue.keys[ranked.gathered.candidates.rows, 0] == key_of(feedback.item_id)
            self.next_item.add(shown, feedback.item_id, key_of(feedback.user_id), found)
        self._count_impression(impression, now_ms)
        if self.trainer:
            self.trainer.explored(impression, now_ms)
        joined = replace(feedback, request_id=request.request_id)
        opened = learning and self._open_pool(ranked, impression, feedback.item_id, now_ms)
        return joined if feedback.item_id in shown else feedback, joined if opened else feedback

    def _open_pool(self, ranked: Ranked, impression: Impression, clicked: str, now_ms: int) -> bool:
        """Learn from the candidates: the one that is clicked next, and others drawn by a hash. False without the clicked one."""
        row, rows = self.sources.catalogue.row(clicked), ranked.kept.rows
        if ranked.features is None or row is None or not (chosen := np.flatnonzero(rows == row)).size:
            return False
        draws = mix(np.arange(len(rows)) + (self._requests << 20))
        draws[chosen[0]] = 0
        pool = np.argsort(draws, kind="stable")[: 1 + self.config.training.pool_negatives]
        ids = self.sources.catalogue.ids
        items = tuple(ShownItem(item_id=ids[r], position=n) for n, r in enumerate(rows[pool].tolist(), start=1))
        features = encode(ranked.features.take(pool))
        self._open(replace(impression, items=items, features=features, bandit=b""), now_ms)
        return True

    def _remember_context(self, feedback: Feedback) -> None:
        """The next request of the session comes from where this click came from: what it will be clicked from is not known."""
        name = feedback.session_id or feedback.user_id
        self._context[name] = feedback.context or {}
        self._context.move_to_end(name)
        if len(self._context) > _MOST_CONTEXTS:
            self._context.popitem(last=False)

    def _in_session(self, history: tuple[HistoryEvent, ...], event: HistoryEvent) -> bool:
        return event.session_id is not None and any(past.session_id == event.session_id for past in history)

    def _chosen(self, session_id: str | None, user_id: str) -> bool:
        if self.options.sample >= 1.0:
            return True
        digest = hashlib.blake2b((session_id or user_id).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") < self.options.sample * 2.0**64

    def _score_waiting(self) -> None:
        """Score every waiting impression: no parameter has changed since it was shown."""
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, []
        for (impression, _), predicted in zip(waiting, self.copy.scorer.predict([f for _, f in waiting]), strict=True):
            if impression.time_ms >= self.options.report_from_ms:
                left = np.ones(len(self.schema.tasks), np.bool_)
                self._predictions[impression.request_id] = impression.user_id, predicted, left

    def _train(self, now_ms: int) -> None:
        """Score what waits, learn what is final, report it."""
        if self.trainer is None:
            return
        self._score_waiting()
        report = StepReport()
        self.trainer.train(report, now_ms)
        self._untrained = 0
        self.trainer.joiner.sweep_spill(())
        for emission in report.emissions:
            self._report(emission.request_id, emission.time_ms, emission.labels, emission.final)
        self.copy.learned(now_ms - 1)

    def _report(self, request_id: str, time_ms: int, labels: Any, final: Any) -> None:
        if request_id not in self._predictions:
            return
        user_id, predicted, left = self._predictions[request_id]
        assert self._origin_ms is not None
        day = 1 + (time_ms - self._origin_ms) // 86_400_000
        for task in np.flatnonzero(final.any(0)):
            known = final[:, task]
            users, days = np.full(known.sum(), key_of(user_id)), np.full(known.sum(), day)
            self.progressive.add(self.schema.tasks[task], predicted[known, task], labels[known, task], users, days)
        left &= ~final.all(0)
        if not left.any():
            del self._predictions[request_id]

    def result(self) -> dict[str, Any]:
        """The report's JSON."""
        seconds = time.perf_counter() - self._started
        result: dict[str, Any] = {
            "events": self.events,
            "seconds": round(seconds, 3),
            "events_per_second": round(self.events / seconds, 1),
            "examples_per_second": round(self._examples / seconds, 1),
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
        if self._has_impressions:
            result |= self.progressive.report()
        else:
            result["next_item"] = self.next_item.report()
        return result


def _ignore(_: object) -> None:
    pass
