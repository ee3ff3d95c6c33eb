"""One request: state → candidates → rules → features → score → slate → impression. The same code in service and replay."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence

import numpy as np

from recsys import metrics
from recsys.candidates.bandit import Bandit
from recsys.candidates.generation import Generations
from recsys.candidates.mix import mix
from recsys.candidates.sources import Sources
from recsys.config import Config, SlateConfig
from recsys.errors import StateUnavailable
from recsys.features.build import Features, UserFeatures, encode, item_features, user_features, warm_up
from recsys.features.catalogue import Catalogue
from recsys.features.schema import Schema
from recsys.ranking import slate
from recsys.ranking.filters import described
from recsys.ranking.reasons import Reasons
from recsys.ranking.request import Answer, Request
from recsys.ranking.rules import RuleBook
from recsys.ranking.scorer import Scorer
from recsys.ranking.work import Work
from recsys.state.base import StateStore
from recsys.types import AsOf, Bool, Float32, HistoryEvent, Impression, Int32, ShownItem

Found = tuple[str, Int32, Float32]
MIX_LIMIT = 500
"""Most candidates that are scored: the budget of scoring (6 ms) holds for this many."""


def policy_name(config: Config) -> str:
    """What chose an answer, for its log: scorer, drawn positions, and a digest of the slate's options where they are not the default."""
    places = config.slate.draw_positions
    drawn = places if isinstance(places, str) else ",".join(map(str, places))
    plain = SlateConfig(draw_positions=places)
    rules = hashlib.blake2b(config.slate.model_dump_json().encode(), digest_size=4).hexdigest()
    return config.ranking.scorer + (f"-draw{drawn}" if drawn else "") + (f"-{rules}" if config.slate != plain else "")


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
        self._bandit = bandit
        self._config, self._schema, self._store = config, schema, store
        self._sources, self._scorer, self._generations = sources, scorer, generations
        self._catalogue: Catalogue = sources.catalogue
        self._reasons = Reasons(schema, sources.catalogue)
        self._quotas = config.retrieval.sources
        self._use_model = config.ranking.scorer == "model"
        self._needs_user = self._use_model or bool(self._quotas.keys() & {"followed", "nearest", "bandit"})
        self.rules = RuleBook(config, sources.catalogue)
        self.policy = policy_name(config)

    def recommend(self, request: Request, now_ms: int) -> Answer:
        """The answer as of log time `now_ms`. Nothing missing is fatal: the answer says `degraded` and why."""
        with self._catalogue.reading():
            work = self.work(request, now_ms)
            with metrics.STAGE_SECONDS.labels("slate").time():
                return self.answer(work)

    def work(self, request: Request, now_ms: int) -> Work:
        """Every stage but the last: candidates with features and scores."""
        work = Work(
            request=request, now_ms=now_ms, deadline=time.perf_counter() + self._config.ranking.deadline_ms / 1000
        )
        for name, stage in (
            ("state", self.load_state),
            ("candidates", self.find_candidates),
            ("features", self.build_features),
            ("score", self.score),
        ):
            with metrics.STAGE_SECONDS.labels(name).time():
                stage(work)
        return work

    def load_state(self, work: Work) -> None:
        """History and seen items; none when the store is away."""
        try:
            work.state = self._store.get(work.request.user_id)
        except StateUnavailable:
            work.degraded.append("no_user_state")
        limit = self._config.retrieval.covisit_history
        events = self._session(work, work.state.history) or work.state.history
        rows = dict.fromkeys(self._catalogue.row(e.item_id) for e in reversed(events))
        work.history_rows = [r for r in rows if r is not None][:limit]

    def find_candidates(self, work: Work) -> None:
        """Every source's candidates, mixed, without what rules forbid."""
        if self._needs_user:
            work.user = self.user_of(work)
            self._locate(work)
        if filters := self.rules.filters + work.request.filters:
            work.allowed = self._catalogue.matching(filters)
        work.forbidden = self.forbidden(work)
        with self._sources.lock:
            work.quotas = self._sources.quotas.current(work.now_ms)
        if work.request.candidates is not None:
            rows = self._catalogue.rows(list(dict.fromkeys(work.request.candidates)))
            found = [("caller", rows[rows >= 0], np.zeros(int((rows >= 0).sum()), np.float32))]
        else:
            found = [(name, *self._source(name, quota, work)) for name, quota in work.quotas.items()]
        allowed = self._allowed(found, work)
        work.rows, work.source_scores, masks = mix(allowed, limit=MIX_LIMIT)
        if len(work.rows) < work.request.n and work.request.candidates is None:
            # Nothing is known yet, or all that is known was excluded: the newest items fill the list.
            taken = {*work.forbidden, *work.rows.tolist()}
            allowed.append(("newest", *self._newest(work.request.n - len(work.rows), taken, work.allowed)))
            work.rows, work.source_scores, masks = mix(allowed, limit=MIX_LIMIT)
        work.names, work.masks = tuple(name for name, _, _ in allowed), masks
        self._add_pinned(work)
        work.candidates = work.rows

    def _add_pinned(self, work: Work) -> None:
        """Pinned items that the rules allow become candidates of the source `pinned`; the caller's own list is not added to."""
        pinned = self.rules.pins(work.request)
        if not pinned:
            return
        rows = np.array(list(pinned.values()), np.int32)
        ((_, rows, _),) = self._allowed([("pinned", rows, np.zeros(len(rows), np.float32))], work)
        if work.request.candidates is not None:
            rows = rows[np.isin(rows, work.rows)]
        work.pinned = {position: row for position, row in pinned.items() if row in rows}
        more = rows[~np.isin(rows, work.rows)]
        work.rows = np.concatenate([work.rows, more])
        work.source_scores = np.concatenate([work.source_scores, np.zeros(len(more), np.float32)])
        work.names = (*work.names, "pinned")
        bits = np.isin(work.rows, rows).astype(np.int64) << (len(work.names) - 1)
        work.masks = np.concatenate([work.masks, np.zeros(len(more), np.int64)]) | bits

    def _allowed(self, found: Sequence[Found], work: Work) -> list[Found]:
        """Each source's rows that are alive, pass the filters and are not forbidden, up to its quota."""
        if not found:
            return []
        passing, forbidden = work.allowed, work.forbidden
        every = np.concatenate([rows for _, rows, _ in found])
        keep = self._catalogue.alive[every]
        if passing is not None:
            keep &= every < len(passing)
            keep[keep] = passing[every[keep]]
        if forbidden:
            keep &= ~np.isin(every, np.fromiter(forbidden, np.int32, len(forbidden)))
        kept = np.split(keep, np.cumsum([len(rows) for _, rows, _ in found])[:-1])
        quotas = [work.quotas.get(name) for name, _, _ in found]
        return [(n, rows[k][:q], scores[k][:q]) for (n, rows, scores), k, q in zip(found, kept, quotas, strict=True)]

    def user_of(self, work: Work) -> UserFeatures:
        """The shared block of the request's features."""
        return user_features(
            self._schema,
            self._catalogue,
            work.request.user_id,
            work.state.history,
            work.request.context,
            work.now_ms,
        )

    def forbidden(self, work: Work) -> set[int]:
        """Rows never shown in this answer: excluded by the caller or by the `exclude` rule."""
        rule, state, items = self._config.ranking.exclude, work.state, {*work.request.exclude, *work.state.hidden}
        if rule == "history":
            items.update(event.item_id for event in (*state.history, *state.acted))
        elif rule == "session":
            events = sorted((*state.acted, *state.history), key=lambda event: event.time_ms)
            items.update(event.item_id for event in self._session(work, events))
        items |= self.rules.seen(state, work.now_ms)
        rows = self._catalogue.rows(list(items))
        return set(rows[rows >= 0].tolist())

    def _session(self, work: Work, history: Sequence[HistoryEvent]) -> list[HistoryEvent]:
        """The user's events of the running session, oldest first."""
        session = work.request.session_id
        if session is not None:
            return [event for event in history if event.session_id == session]
        gap_ms, last_ms, events = self._config.retrieval.session_gap_s * 1000, work.now_ms, []
        for event in reversed(history):
            if last_ms - event.time_ms > gap_ms:
                break
            events.append(event)
            last_ms = event.time_ms
        return events[::-1]

    def _source(self, name: str, quota: int, work: Work) -> tuple[Int32, Float32]:
        """A source's best candidates among the allowed ones; with room for those that are forbidden."""
        sources, now_ms = self._sources, work.now_ms
        if name == "nearest":
            return self._nearest(quota, work)
        if name == "bandit":
            return self._explore(quota, work)
        allowed = self._catalogue.alive if work.allowed is None else work.allowed
        left_out = np.fromiter(work.forbidden, np.int32, len(work.forbidden))
        with sources.lock:
            if name == "following":
                if sources.following is None or work.user is None:
                    return np.zeros(0, np.int32), np.zeros(0, np.float32)
                shared = work.user.shared_keys, work.user.shared_mask
                return sources.following.candidates(work.history_rows, shared, quota + len(left_out), allowed)
            if name == "trending":
                return sources.trending.top(quota, now_ms, work.allowed, left_out)
            if name == "covisited":
                return sources.covisits.candidates(work.history_rows, quota + len(left_out), now_ms, allowed)
            return sources.followed.query(self._followed(work), quota, work.allowed, left_out)

    def _newest(self, count: int, taken: set[int], passing: Bool | None) -> tuple[Int32, Float32]:
        """The `count` items that came last into the catalogue, pass the filters and are not `taken`."""
        newest = self._catalogue.newest(count + len(taken), passing)
        rows = newest[~np.isin(newest, list(taken))][:count] if taken else newest
        return rows.astype(np.int32), np.zeros(len(rows), np.float32)

    def _locate(self, work: Work) -> None:
        """The user's vector, and the clusters nearest to it."""
        if self._generations is None or work.user is None:
            return
        work.located = self._generations.locate(work.user)
        if self._bandit is not None and work.located is not None:
            work.active = self._bandit.activate(work.located.generation.name, work.user, work.located.vector)

    def _nearest(self, quota: int, work: Work) -> tuple[Int32, Float32]:
        if work.located is None or work.late("nearest"):
            return np.zeros(0, np.int32), np.zeros(0, np.float32)
        return work.located.search(quota, work.forbidden, work.allowed)

    def _explore(self, quota: int, work: Work) -> tuple[Int32, Float32]:
        if self._bandit is None or work.active is None or work.late("bandit"):
            return np.zeros(0, np.int32), np.zeros(0, np.float32)
        return self._bandit.candidates(
            work.active, quota, work.request.request_id, work.now_ms, work.forbidden, work.allowed
        )

    def _followed(self, work: Work) -> list[tuple[int, int, float]]:
        """(attribute, key, weight) of the newest history events, recent ones heavier."""
        assert work.user is not None
        weights: dict[tuple[int, int], float] = {}
        decay = self._config.features.affinity_decay
        for age, (keys, mask) in enumerate(zip(work.user.history_keys[:10], work.user.history_mask[:10], strict=True)):
            for attribute, (name, _) in enumerate(self._schema.item_fields[1 : self._schema.num_history_fields]):
                where = self._catalogue.columns(name)
                for key in keys[where][mask[where]].tolist():
                    weights[attribute, key] = weights.get((attribute, key), 0.0) + decay**age
        return [(attribute, key, weight) for (attribute, key), weight in weights.items()]

    def build_features(self, work: Work) -> None:
        """Keys and numbers of every candidate."""
        if self._use_model and work.user is not None:
            work.features = self.features_of(work.user, work.history_rows, work.rows, work.now_ms)

    def features_of(self, user: UserFeatures, history_rows: Sequence[int], rows: Int32, now_ms: int) -> Features:
        """The feature function over these rows, with the counters as they are now."""
        signals = self._sources.signals(user, history_rows, rows, now_ms)
        decay = self._config.features.affinity_decay
        return item_features(self._schema, self._catalogue, user, rows, signals, decay, now_ms)

    def score(self, work: Work) -> None:
        """The value that ranks: the model's, or the sources' own when there is no model to be had."""
        work.scores = work.source_scores.astype(np.float64)
        if work.features is None or not len(work.rows) or work.late("score"):
            return
        most = max(self._config.ranking.full_candidates, work.request.n + self._config.slate.draw_pool)
        pinned = np.flatnonzero(np.isin(work.rows, list(work.pinned.values())))
        work.scored = self._scorer.rank(work.features, most, pinned)
        if len(work.scored.kept) < len(work.rows):
            work.keep(work.scored.kept)
        work.scores = self._scorer.value(work.scored.predictions)
        if not work.scored.available:
            work.degraded.append("no_parameters")

    def answer(self, work: Work) -> Answer:
        """Fill the slate and write down what was shown and why."""
        request = work.request
        choices = self._choices(work)
        ids = self._catalogue.ids
        items = tuple(
            ShownItem(
                item_id=ids[work.rows[c.candidate]],
                position=position,
                sources=work.sources(c.candidate),
                score=float(work.scores[c.candidate]),
                predictions=self._predictions(work, c.candidate),
                propensity=c.propensity,
                pool=None if c.pool is None else tuple((ids[work.rows[i]], p) for i, p in c.pool),
            )
            for position, c in enumerate(choices, start=1)
        )
        last = self._last_title(work)
        reasons = tuple(
            self._reasons.of(int(work.rows[c.candidate]), work.sources(c.candidate), work.user, last) for c in choices
        )
        scored = work.scored
        state, dense_version = (
            (scored.state, scored.dense_version) if scored else (self._scorer.state, self._scorer.dense_version)
        )
        model_version = f"{state.version.epoch}.{state.version.step}.{dense_version}"
        generation = self._generation(work)
        impression = Impression(
            request_id=request.request_id,
            user_id=request.user_id,
            time_ms=work.now_ms,
            items=items,
            context=request.context,
            session_id=request.session_id,
            activation=request.activation,
            schema=self._schema.hash if work.features is not None else "",
            features=encode(work.features.take([c.candidate for c in choices]))
            if work.features is not None and choices
            else b"",
            bandit=self._served(work, choices),
            policy=self.policy,
            model_version=model_version,
            generation=generation,
        )
        return Answer(
            request_id=request.request_id,
            items=items,
            reasons=reasons,
            titles=tuple(self._catalogue.titles[work.rows[c.candidate]] for c in choices),
            degraded=tuple(work.degraded),
            policy=self.policy,
            model_version=model_version,
            generation=generation,
            parameters=AsOf(
                positions={"epoch": state.version.epoch, "step": state.version.step}, time_ms=state.covers_ms
            ),
            impression=impression,
            note=self._note(work) if len(items) < request.n else "",
        )

    def _choices(self, work: Work) -> list[slate.Choice]:
        """The slate's candidates, in order."""
        book, request = self.rules, work.request
        scores = book.scores(work.scores, request, work.rows, work.names, work.masks)
        worth = book.worth(scores, work.rows, work.state, work.now_ms)
        rules = book.rules(work.rows, work.pinned)
        return slate.fill(worth, request.n, request.request_id, self._config.slate, rules)

    def _note(self, work: Work) -> str:
        """Why a list is short."""
        if not self._catalogue.num_alive:
            return "the catalogue is empty: PUT items to /v1/items"
        if work.allowed is not None and not work.allowed.any():
            return f"no item passes the filters ({described(self.rules.filters + work.request.filters)})"
        of = "candidates" if work.request.candidates is not None else "items"
        return f"no other {of} pass the filters and rules of this request"

    def _generation(self, work: Work) -> str:
        """The generation that was searched: another may be in use by now."""
        if work.located is not None:
            return work.located.generation.name
        return self._generations.name if self._generations else ""

    def _served(self, work: Work, choices: Sequence[slate.Choice]) -> bytes:
        if self._bandit is None or work.active is None:
            return b""
        return self._bandit.served(work.active, work.rows[[c.candidate for c in choices]])

    def _predictions(self, work: Work, candidate: int) -> dict[str, float]:
        if work.scored is None:
            return {}
        return dict(zip(self._schema.tasks, work.scored.predictions[candidate].tolist(), strict=True))

    def _last_title(self, work: Work) -> str:
        if not work.history_rows:
            return ""
        row = work.history_rows[0]
        return self._catalogue.titles[row] or self._catalogue.ids[row]
