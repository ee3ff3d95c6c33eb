"""What is shown of a ranked request: the slate, and one record of it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from recsys.candidates.find import Finder
from recsys.config import Config, SlateConfig
from recsys.features.build import encode
from recsys.features.catalogue import Catalogue
from recsys.features.schema import Schema
from recsys.ranking import slate
from recsys.ranking.filter_rules import described
from recsys.ranking.reasons import Reasons
from recsys.ranking.request import Request
from recsys.ranking.rules import RuleBook
from recsys.ranking.scorer import Scorer
from recsys.ranking.stages import Gathered, Ranked
from recsys.types import AsOf, Impression, ShownItem


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """What is shown, why, and as of when: the answer and the impression are both made of it."""

    request: Request
    time_ms: int
    items: tuple[ShownItem, ...]
    reasons: tuple[str, ...]
    titles: tuple[str, ...]
    """Of the items, as they were when they were chosen."""
    degraded: tuple[str, ...]
    policy: str
    model_version: str
    generation: str
    parameters: AsOf
    schema: str
    """Of `features`; "" where there are none."""
    features: bytes
    bandit: bytes
    note: str
    """Why there are fewer items than asked for; empty when there are not."""

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def impression(self) -> Impression:
        """What is logged of it."""
        return Impression(
            request_id=self.request.request_id,
            user_id=self.request.user_id,
            time_ms=self.time_ms,
            items=self.items,
            context=self.request.context,
            session_id=self.request.session_id,
            activation=self.request.activation,
            schema=self.schema,
            features=self.features,
            bandit=self.bandit,
            policy=self.policy,
            model_version=self.model_version,
            generation=self.generation,
        )


def policy_name(config: Config) -> str:
    """What chose an answer, for its log: scorer, drawn positions, and a digest of the slate's options where they are not the default."""
    places = config.slate.draw_positions
    drawn = places if isinstance(places, str) else ",".join(map(str, places))
    plain = SlateConfig(draw_positions=places)
    rules = hashlib.blake2b(config.slate.model_dump_json().encode(), digest_size=4).hexdigest()
    return config.ranking.scorer + (f"-draw{drawn}" if drawn else "") + (f"-{rules}" if config.slate != plain else "")


class Presenter:
    """Fills slates and writes down what they show. Thread-safe."""

    def __init__(
        self, config: Config, schema: Schema, rules: RuleBook, finder: Finder, scorer: Scorer, catalogue: Catalogue
    ) -> None:
        self._config, self._schema, self._catalogue = config, schema, catalogue
        self._rules, self._finder, self._scorer = rules, finder, scorer
        self._reasons = Reasons(schema, catalogue)
        self.policy = policy_name(config)

    def show(self, ranked: Ranked) -> Shown:
        """Fill the slate, and say what was shown and why."""
        gathered, kept, scored = ranked.gathered, ranked.kept, ranked.scored
        request, features = gathered.opened.request, ranked.features
        choices = self._choices(ranked)
        chosen = np.array([choice.candidate for choice in choices], np.intp)
        state, dense_version = (
            (self._scorer.state, self._scorer.dense_version) if scored is None else (scored.state, scored.dense_version)
        )
        rows = kept.rows[chosen]
        return Shown(
            request=request,
            time_ms=gathered.opened.now_ms,
            items=self._items(ranked, choices),
            reasons=self._why(ranked, chosen),
            titles=tuple(self._catalogue.titles[row] for row in rows.tolist()),
            degraded=ranked.degraded,
            policy=self.policy,
            model_version=f"{state.version.epoch}.{state.version.step}.{dense_version}",
            generation=self._finder.generation(gathered.asked),
            parameters=AsOf(
                positions={"epoch": state.version.epoch, "step": state.version.step}, time_ms=state.covers_ms
            ),
            schema="" if features is None else self._schema.hash,
            features=b"" if features is None or not choices else encode(features.take(chosen)),
            bandit=self._finder.served(gathered.asked, rows),
            note=self._note(gathered) if len(choices) < request.n else "",
        )

    def _choices(self, ranked: Ranked) -> list[slate.Choice]:
        """The slate's candidates, in order."""
        opened, kept = ranked.gathered.opened, ranked.kept
        scores = self._rules.scores(ranked.scores, opened.request, kept.rows, kept.names, kept.masks)
        worth = self._rules.worth(scores, kept.rows, opened.state, opened.now_ms)
        rules = self._rules.rules(kept.rows, ranked.gathered.asked.pinned)
        return slate.fill(worth, opened.request.n, opened.request.request_id, self._config.slate, rules)

    def _items(self, ranked: Ranked, choices: Sequence[slate.Choice]) -> tuple[ShownItem, ...]:
        ids, kept, scores = self._catalogue.ids, ranked.kept, ranked.scores
        predictions = None if ranked.scored is None else ranked.scored.predictions
        return tuple(
            ShownItem(
                item_id=ids[kept.rows[c.candidate]],
                position=position,
                sources=kept.sources(c.candidate),
                score=float(scores[c.candidate]),
                predictions={}
                if predictions is None
                else dict(zip(self._schema.tasks, predictions[c.candidate].tolist(), strict=True)),
                propensity=c.propensity,
                pool=None if c.pool is None else tuple((ids[kept.rows[i]], p) for i, p in c.pool),
            )
            for position, c in enumerate(choices, start=1)
        )

    def _why(self, ranked: Ranked, chosen: npt.NDArray[np.intp]) -> tuple[str, ...]:
        asked, kept = ranked.gathered.asked, ranked.kept
        told = self._finder.reasons(asked, kept.names)
        shared = self._reasons.shared(kept.rows[chosen], asked.user)
        return tuple(
            self._reasons.of((told[name] for name in kept.sources(candidate) if name in told), value)
            for candidate, value in zip(chosen.tolist(), shared, strict=True)
        )

    def _note(self, gathered: Gathered) -> str:
        """Why a list is short."""
        request, allowed = gathered.opened.request, gathered.asked.allowed
        if not self._catalogue.num_alive:
            return "the catalogue is empty: PUT items to /v1/items"
        if allowed is not None and not allowed.any():
            return f"no item passes the filters ({described(self._rules.filters + request.filters)})"
        of = "candidates" if request.candidates is not None else "items"
        return f"no other {of} pass the filters and rules of this request"
