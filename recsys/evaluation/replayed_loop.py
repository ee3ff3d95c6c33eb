"""The whole loop of a replay: the services' own code over one catalogue, in event time, and what scoring may know of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from recsys.candidates.base import Parts
from recsys.candidates.meaning import Meaning
from recsys.candidates.sources import Sources
from recsys.candidates.visibility import EVERYTHING
from recsys.config import Config, parse
from recsys.evaluation.delays import Delayed, Timeline
from recsys.evaluation.serving import ServingCopy
from recsys.features.catalogue import Catalogue
from recsys.features.schema import Schema
from recsys.ranking.pipeline import Pipeline
from recsys.state.memory_state import MemoryState
from recsys.training.opened import Emission
from recsys.training.steps import StepReport
from recsys.training.trainer import Trainer
from recsys.types import Feedback, HistoryEvent, Impression, Item, UserUpdate

Event = tuple[int, str, Item | Impression | Feedback]
"""Event time, topic and message."""
History = tuple[HistoryEvent, ...]


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
    """The stream has no impressions: an answer is made before each click that is not a session's first."""


class Loop:
    """State, sources, pipeline, trainer and serving copy of one replay. A driver tells it what happens, in time order."""

    def __init__(self, config: Config, options: Options, folder: Path) -> None:
        unhurried = config.ranking.model_copy(update={"deadline_ms": float("inf")})
        wait_s = 0.0 if options.label_delay_s is None and options.click_log else options.label_delay_s
        if wait_s is not None:
            raw = config.model_dump(mode="json")
            config = parse(raw | {"tasks": [task | {"window_s": wait_s} for task in raw["tasks"]]})
        self.config = config = config.model_copy(update={"ranking": unhurried})
        self.options, self.schema = options, Schema.of(config)
        self.timeline = Timeline(options.delay_s, options.sync_interval_s)
        catalogue, is_old = Catalogue(self.schema), self.timeline.is_old
        parts = Parts(config, self.schema, catalogue)
        self._delayed = Delayed(parts, self.timeline, live=not options.freeze_user) if is_old else None
        self.store = MemoryState(config.state.history_len, config.state.seen_len)
        self.sources = Sources(config, self.schema, catalogue, self._delayed or EVERYTHING)
        learns = config.ranking.scorer == "model" or config.retrieval.sources.get("nearest") or config.explores
        self.trainer = Trainer(config, folder) if learns else None
        self.copy = copy = ServingCopy(
            config, self.schema, catalogue, self.trainer, live=not is_old, each_step=self.timeline.is_late
        )
        self.pipeline = Pipeline(
            config, self.schema, self.store, self.sources, copy.scorer, copy.generations, copy.bandit
        )
        self._meaning = Meaning(config)
        self._unread = StepReport()
        """Of what is taken, nobody reads what became of it."""
        self._untrained = 0
        self._step_examples = max(1, config.training.batch_size // 4)
        """Examples between two steps. A service steps whenever labels are final; a quarter of a batch took 8% more time than a
        whole one on KuaiRand, half of it costs more again, double knows later what it could."""
        self.examples = 0
        self.before_change: Callable[[], None] = lambda: None
        """Called before parameters that score become others."""
        self.on_labels: Callable[[Emission], None] = lambda emission: None
        """Called with labels that were learned."""

    def item(self, item: Item) -> None:
        """An upsert or delete, effective at once everywhere."""
        self.sources.item(item)
        if self.trainer:
            self.trainer.item(item)

    def advance(self, now_ms: int) -> None:
        """Apply what has become visible to scoring by `now_ms`."""
        visible = self.timeline.visible_ms(now_ms)
        if visible <= self.timeline.until_ms or not self.timeline.is_old:
            return
        if self.timeline.sync_ms:
            if self._untrained:
                self.train(visible + 1)
            if not self.timeline.is_late:
                self.copy.capture(visible)
        self.timeline.move(visible)
        if self.copy.behind(visible):
            self.before_change()
            self.copy.advance(visible)

    def _user(self, update: UserUpdate, now_ms: int) -> None:
        """What a user did, in what is kept of them."""
        if self.options.freeze_user:
            self.timeline.when_visible(now_ms, lambda: self.store.apply((update,), {}))
        else:
            self.store.apply((update,), {})

    def shown(self, impression: Impression, now_ms: int) -> None:
        """Count an impression's items as seen and shown."""
        if self.pipeline.rules.uses_seen:
            seen = tuple(item.item_id for item in impression.items)
            self._user(UserUpdate(user_id=impression.user_id, seen=seen, seen_ms=now_ms), now_ms)
        if self._delayed is not None:
            self._delayed.shown(impression, now_ms)
        self.timeline.when_visible(now_ms, lambda: self.sources.events.impression(impression, now_ms))

    def feedback(self, counted: Feedback, learned: Feedback, event: HistoryEvent, history: History) -> None:
        """Feedback, as counted and as learned, into history, counters and joiner; `event`: the same in its user's history, after these."""
        events, now_ms = self.sources.events, event.time_ms
        if update := self._meaning.update(counted, event, now_ms):
            self._user(update, now_ms)
        if self._delayed is not None:
            later = events.counting.counts_events and bool(events.sessions.rows(history, event))
            self._delayed.happened(counted, later, now_ms)
        self.timeline.when_visible(now_ms, lambda: events.feedback(counted, history, event, now_ms))
        if self.trainer:
            self.trainer.traffic.feedback(learned, now_ms, self._unread)
            if self.config.ranking.scorer != "model":  # towers and bandit alone learn
                self._learnable(1, now_ms)

    def open(self, impression: Impression, now_ms: int) -> None:
        """Let an impression's items, with their features, be learned once their labels are final."""
        assert self.trainer is not None
        self.trainer.traffic.impression(impression, now_ms, self._unread)
        self._learnable(len(impression.items), now_ms)

    def _learnable(self, examples: int, now_ms: int) -> None:
        """So many examples more wait to be learned: step now and then."""
        self._untrained += examples
        self.examples += examples
        if self._untrained >= self._step_examples:
            self.train(now_ms)

    def train(self, now_ms: int) -> None:
        """Learn what is final."""
        if self.trainer is None:
            return
        self.before_change()
        report = StepReport()
        self.trainer.train(report, now_ms)
        self._untrained = 0
        self.trainer.joiner.spill.sweep(())
        for emission in report.emissions:
            self.on_labels(emission)
        self.copy.learned(now_ms - 1)

    def chosen(self, session_id: str | None, user_id: str) -> bool:
        """Whether requests of this session (of this user without one) are in the sample."""
        if self.options.sample >= 1.0:
            return True
        digest = hashlib.blake2b((session_id or user_id).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") < self.options.sample * 2.0**64


def event_of(feedback: Feedback, now_ms: int) -> HistoryEvent:
    """Feedback as one of its user's history."""
    return HistoryEvent(
        time_ms=now_ms,
        event_id=feedback.event_id,
        item_id=feedback.item_id,
        type=feedback.type,
        session_id=feedback.session_id,
    )
