"""One request: state → candidates → features → score → slate, each stage a value. The same code in service and replay."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import numpy as np

from recsys import metrics
from recsys.candidates.base import Asked, Deadline
from recsys.candidates.explorer import Bandit
from recsys.candidates.find import Finder
from recsys.candidates.generation import Generations
from recsys.candidates.sources import Sources
from recsys.config import Config
from recsys.errors import StateUnavailable
from recsys.features.build import Features, UserFeatures, item_features, user_features, warm_up
from recsys.features.schema import Schema
from recsys.ranking.request import Request
from recsys.ranking.rules import RuleBook
from recsys.ranking.scorer import Scorer
from recsys.ranking.shown import Presenter, Shown
from recsys.ranking.stages import Gathered, Opened, Ranked
from recsys.state.base import StateStore
from recsys.types import HistoryEvent, Int32, UserState


class Pipeline:
    """Answers requests over one catalogue. Thread-safe as far as its parts are."""

    def __init__(
        self,
        config: Config,
        schema: Schema,
        store: StateStore,
        sources: Sources,
        scorer: Scorer,
        generations: Generations | None,
        bandit: Bandit | None = None,
    ) -> None:
        warm_up(schema)
        self._config, self._schema, self._store = config, schema, store
        self._sources, self._scorer = sources, scorer
        self._catalogue = sources.catalogue
        self._finder = Finder(sources, generations, bandit)
        self._use_model = config.ranking.scorer == "model"
        self.rules = RuleBook(config, sources.catalogue)
        self._presenter = Presenter(config, schema, self.rules, self._finder, scorer, sources.catalogue)
        self.policy = self._presenter.policy

    def recommend(self, request: Request, now_ms: int) -> Shown:
        """The answer as of log time `now_ms`. Nothing missing is fatal: the answer says `degraded` and why."""
        with self._catalogue.reading():
            ranked = self.rank(request, now_ms)
            with metrics.STAGE_SECONDS.labels("slate").time():
                return self.show(ranked)

    def rank(self, request: Request, now_ms: int) -> Ranked:
        """Every stage but the last: candidates with features and scores."""
        timed = metrics.STAGE_SECONDS.labels
        deadline = Deadline(time.perf_counter() + self._config.ranking.deadline_ms / 1000)
        with timed("state").time():
            opened = self.open(request, now_ms, deadline)
        with timed("candidates").time():
            gathered = self.gather(opened)
        with timed("features").time():
            features = self.describe(gathered)
        with timed("score").time():
            return self.score(gathered, features)

    def open(self, request: Request, now_ms: int, deadline: Deadline | None = None) -> Opened:
        """History and seen items; none when the store is away."""
        degraded: tuple[str, ...] = ()
        try:
            state = self._store.get(request.user_id)
        except StateUnavailable:
            state, degraded = UserState(), ("no_user_state",)
        events = self._session(request, state.history, now_ms) or state.history
        rows = dict.fromkeys(self._catalogue.row(e.item_id) for e in reversed(events))
        return Opened(
            request=request,
            now_ms=now_ms,
            deadline=deadline or Deadline(math.inf),
            state=state,
            history_rows=[r for r in rows if r is not None][: self._config.retrieval.covisit_history],
            degraded=degraded,
        )

    def gather(self, opened: Opened) -> Gathered:
        """Every source's candidates, mixed, without what rules forbid."""
        asked = self._asked(opened)
        return Gathered(opened=opened, asked=asked, candidates=self._finder.find(asked))

    def _asked(self, opened: Opened) -> Asked:
        request, catalogue, user = opened.request, self._catalogue, None
        located, active = None, None
        if self._use_model or self._finder.needs_user:
            user = self.user_of(opened)
            located, active = self._finder.place(user)
        filters = self.rules.filters + request.filters
        listed = None
        if request.candidates is not None:
            rows = catalogue.rows(list(dict.fromkeys(request.candidates)))
            listed = rows[rows >= 0]
        return Asked(
            request_id=request.request_id,
            now_ms=opened.now_ms,
            deadline=opened.deadline,
            n=request.n,
            user=user,
            history_rows=opened.history_rows,
            allowed=catalogue.matching(filters) if filters else None,
            left_out=self._left_out(opened),
            listed=listed,
            pinned=self.rules.pins(request),
            located=located,
            active=active,
            bandit=self._finder.bandit,
        )

    def user_of(self, opened: Opened) -> UserFeatures:
        """The shared block of the request's features."""
        request, history = opened.request, opened.state.history
        return user_features(self._schema, self._catalogue, request.user_id, history, request.context, opened.now_ms)

    def _left_out(self, opened: Opened) -> Int32:
        """Rows never shown in this answer, ascending: excluded by the caller or by the `exclude` rule, hidden, or seen."""
        rule, state, items = self._config.ranking.exclude, opened.state, {*opened.request.exclude, *opened.state.hidden}
        if rule == "history":
            items.update(event.item_id for event in (*state.history, *state.acted))
        elif rule == "session":
            events = sorted((*state.acted, *state.history), key=lambda event: event.time_ms)
            items.update(event.item_id for event in self._session(opened.request, events, opened.now_ms))
        items |= self.rules.seen(state, opened.now_ms)
        rows = np.sort(self._catalogue.rows(list(items)))
        return rows[np.searchsorted(rows, 0) :]

    def _session(self, request: Request, history: Sequence[HistoryEvent], now_ms: int) -> list[HistoryEvent]:
        """The user's events of the running session, oldest first."""
        if request.session_id is not None:
            return [event for event in history if event.session_id == request.session_id]
        gap_ms, last_ms, events = self._config.retrieval.session_gap_s * 1000, now_ms, []
        for event in reversed(history):
            if last_ms - event.time_ms > gap_ms:
                break
            events.append(event)
            last_ms = event.time_ms
        return events[::-1]

    def describe(self, gathered: Gathered) -> Features | None:
        """Keys and numbers of every candidate; None where nothing ranks by them."""
        user, opened = gathered.asked.user, gathered.opened
        if not self._use_model or user is None:
            return None
        return self.features_of(user, opened.history_rows, gathered.candidates.rows, opened.now_ms)

    def features_of(self, user: UserFeatures, history_rows: Sequence[int], rows: Int32, now_ms: int) -> Features:
        """The feature function over these rows, with the counters as they are now."""
        signals = self._sources.signals(user, history_rows, rows, now_ms)
        decay = self._config.features.affinity_decay
        return item_features(self._schema, self._catalogue, user, rows, signals, decay, now_ms)

    def score(self, gathered: Gathered, features: Features | None) -> Ranked:
        """The value that ranks: the model's, or the sources' own when there is no model to be had."""
        found, opened = gathered.candidates, gathered.opened
        if features is None or not len(found.rows) or opened.deadline.passed("score"):
            scores = found.scores.astype(np.float64)
            return Ranked(gathered=gathered, kept=found, features=features, scored=None, scores=scores)
        most = max(self._config.ranking.full_candidates, opened.request.n + self._config.slate.draw_pool)
        pinned = np.flatnonzero(np.isin(found.rows, list(gathered.asked.pinned.values())))
        scored = self._scorer.rank(features, most, pinned)
        if len(scored.kept) < len(found.rows):
            found, features = found.take(scored.kept), features.take(scored.kept)
        scores = self._scorer.value(scored.predictions)
        return Ranked(gathered=gathered, kept=found, features=features, scored=scored, scores=scores)

    def show(self, ranked: Ranked) -> Shown:
        """Fill the slate, and write down what is shown and why."""
        return self._presenter.show(ranked)
