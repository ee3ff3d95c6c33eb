"""The rules of one answer, from the configuration and the request, over its candidates: see docs/slate.md for their order."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from recsys.config import Config
from recsys.errors import BadInput, ConfigError
from recsys.features.catalogue import Catalogue
from recsys.features.filters import Filters
from recsys.features.schema import Schema
from recsys.ranking.filter_rules import parse_filters
from recsys.ranking.request import Boost, Request
from recsys.ranking.slate import Limit, Rules, Term
from recsys.ranking.variety import Cap, Coverage, Dpp, Likeness, Mmr, values_of
from recsys.types import Bool, Int32, Int64, UserState

Float64 = npt.NDArray[np.float64]
_LEAST_SCORE = 1e-9
"""A score of 0 and below counts as this: its logarithm is finite, and it ranks last."""


class RuleBook:
    """Makes the rules of each answer. Thread-safe."""

    def __init__(self, config: Config, catalogue: Catalogue) -> None:
        self._config, self._catalogue = config.slate, catalogue
        attributes = config.catalogue.attributes
        try:
            self.filters: Filters = parse_filters(config.slate.filters, attributes, "slate.filters")
            self._boosts = tuple(
                Boost(
                    filters=parse_filters(boost.filters, attributes, f"slate.boosts[{number}].filters"),
                    sources=boost.sources,
                    times=boost.times,
                    plus=boost.plus,
                )
                for number, boost in enumerate(config.slate.boosts)
            )
        except BadInput as error:
            raise ConfigError(str(error)) from None
        self._pins = {pin.position: pin.item_id for pin in config.slate.pins}
        self._alike = config.slate.diversity_by or attributes
        self.uses_seen = bool(config.slate.seen_last or config.slate.seen_s or config.slate.fatigue)

    @classmethod
    def of(cls, config: Config) -> RuleBook:
        """The rules over an empty catalogue. ConfigError where the configuration's are wrong."""
        return cls(config, Catalogue(Schema.of(config)))

    def seen(self, state: UserState, now_ms: int) -> set[str]:
        """Items that are not shown again yet."""
        last, config = len(state.seen) - self._config.seen_last, self._config
        items = set(state.seen[max(0, last) :]) if config.seen_last else set()
        if config.seen_s:
            since_ms = now_ms - config.seen_s * 1000
            items |= {i for i, (time_ms, _) in zip(state.seen, state.shown, strict=True) if time_ms > since_ms}
        return items

    def pins(self, request: Request) -> dict[int, int]:
        """Position → catalogue row of every pinned item that there is; the request's own go before the configuration's."""
        if not (self._pins or request.pins):
            return {}
        places: dict[str, int] = {}
        for position, item_id in (*request.pins.items(), *self._pins.items()):
            if position not in places.values():
                places.setdefault(item_id, position)
        rows = ((position, self._catalogue.row(item_id)) for item_id, position in places.items())
        return {position: row for position, row in rows if row is not None}

    def scores(self, scores: Float64, request: Request, rows: Int32, names: tuple[str, ...], masks: Int64) -> Float64:
        """Scores [K] of items at `rows` after boosts; `masks` say which of the sources `names` brought them."""
        for boost in (*self._boosts, *request.boosts):
            here: Bool = np.ones(len(rows), np.bool_)
            if boost.filters:
                here = self._catalogue.passing(boost.filters, rows)
            if boost.sources:
                bits = sum(1 << bit for bit, name in enumerate(names) if name in boost.sources)
                here &= (masks & bits) != 0
            scores = np.where(here, scores * boost.times + boost.plus, scores)
        return scores

    def worth(self, scores: Float64, rows: Int32, state: UserState, now_ms: int) -> Float64:
        """The logarithm of scores [K], less what the user is tired of."""
        worth: Float64 = np.log(np.maximum(scores, _LEAST_SCORE))
        if not self._config.fatigue or not state.seen:
            return worth
        tally = self._tally(state, now_ms)
        ids = self._catalogue.ids
        return worth - self._config.fatigue * np.array([tally.get(ids[row], 0.0) for row in rows.tolist()])

    def _tally(self, state: UserState, now_ms: int) -> dict[str, float]:
        """How often each seen item was lately shown without being acted upon."""
        times, counts = np.array(state.shown, np.float64).T
        half_lives = np.maximum(now_ms - times, 0.0) / (self._config.fatigue_half_life_s * 1000)
        tally = dict(zip(state.seen, (counts * 0.5**half_lives).tolist(), strict=True))
        for event in state.history:
            tally.pop(event.item_id, None)
        return tally

    def rules(self, rows: Int32, pinned: Mapping[int, int]) -> Rules:
        """Pins, caps, likeness and coverage over the candidates at `rows` [K]; `pinned`: position → catalogue row."""
        config, catalogue = self._config, self._catalogue
        index = {int(row): number for number, row in enumerate(rows)} if pinned else {}
        pins = {position: index[row] for position, row in pinned.items() if row in index}
        wanted = set(config.coverage)
        if config.diversity != "none":
            wanted |= set(self._alike)
        values = {attribute: values_of(catalogue, rows, attribute) for attribute in wanted}
        limits: list[Limit] = [
            Cap(values_of(catalogue, rows, cap.attribute, every=True), cap.most, cap.window, pins)
            for cap in config.caps
        ]
        terms: list[Term] = [Coverage(values[attribute], weight) for attribute, weight in config.coverage.items()]
        if config.diversity != "none":
            likeness = Likeness([values[attribute] for attribute in self._alike])
            terms.append((Mmr if config.diversity == "mmr" else Dpp)(likeness, config.diversity_weight))
        return Rules(pins=pins, limits=limits, terms=terms)
