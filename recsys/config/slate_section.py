"""How a slate is filled: what may be shown, what is preferred, what is drawn."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from recsys.config.tasks import Section

MAX_BOOST = 1e6
"""Beyond it a list is sorted by the boost alone, and many in a row leave the range of numbers."""


class BoostConfig(Section):
    """Items that count for more, or less, than their score."""

    filters: dict[str, Any] = Field(default_factory=dict)
    """Which items: attribute → values or conditions, as in a request's `filters`."""
    sources: tuple[str, ...] = ()
    """And brought by one of these sources; empty: by any."""
    times: float = Field(1.0, ge=0, le=MAX_BOOST)
    """Their score is multiplied by this."""
    plus: float = Field(0.0, ge=-MAX_BOOST, le=MAX_BOOST)
    """Then this is added."""


class CapConfig(Section):
    """At most so many items with one value of an attribute."""

    attribute: str
    """One of `catalogue.attributes`; items without it are not capped."""
    most: int = Field(ge=1)
    """Items with the same value."""
    window: int = Field(0, ge=0)
    """Among so many positions in a row; 0: in the whole answer."""


class PinConfig(Section):
    """An item with a place of its own."""

    position: int = Field(ge=1)
    """From 1."""
    item_id: str
    """Shown there unless it is deleted, excluded, filtered out or seen."""


class SlateConfig(Section):
    """How an answer is filled, from the top: rules first, then the best of what remains, or a draw. See docs/slate.md."""

    model_config = ConfigDict(allow_inf_nan=False)

    filters: dict[str, Any] = Field(default_factory=dict)
    """What every request is filtered by, beside its own `filters`: attribute → values or conditions."""
    seen_last: int = Field(0, ge=0)
    """Of the items that the user was shown, the last so many are not shown again; 0: they are."""
    seen_s: float = Field(0.0, ge=0)
    """Items shown to the user within so many seconds are not shown again; 0: they are."""
    boosts: tuple[BoostConfig, ...] = ()
    """Scores to change, in order."""
    pins: tuple[PinConfig, ...] = ()
    """Items at positions of their own."""
    caps: tuple[CapConfig, ...] = ()
    """Limits on how often a value of an attribute appears."""
    fatigue: float = Field(0.0, ge=0)
    """A score is multiplied by exp(-this) for each time that the user was lately shown the item without acting upon it: .3 is a quarter less."""
    fatigue_half_life_s: float = Field(86_400.0, gt=0)
    """Half-life of that count since the item was last shown."""
    diversity: Literal["none", "mmr", "dpp"] = "none"
    """Keep items apart that share attributes: from the one above that is most alike (mmr), or from all above together (dpp)."""
    diversity_weight: float = Field(1.0, gt=0)
    """How much likeness costs, in the logarithm of the score: with mmr and 1, an item alike in every attribute loses a factor e."""
    diversity_by: tuple[str, ...] = ()
    """Attributes that likeness means; empty: all of `catalogue.attributes`."""
    coverage: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    """Attribute → weight: each value not yet among the items above adds to a score's logarithm, ever less as it appears again."""
    draw_positions: tuple[int, ...] | Literal["all"] = (5,)
    """Positions (from 1) that are drawn at random from the best `draw_pool` of what remains; none: the best is always taken."""
    draw_kind: Literal["softmax", "epsilon", "squarecb"] = "softmax"
    """Probabilities of a pool: softmax of the score's logarithm (Plackett-Luce); any with chance `draw_epsilon`, else the best;
    or inverse to how far the score is behind the best."""
    draw_pool: int = Field(20, ge=2, le=50)
    """Candidates a drawn position is drawn from."""
    draw_temperature: float = Field(0.5, gt=0)
    """softmax: temperature, in units of the score's logarithm."""
    draw_epsilon: float = Field(0.1, ge=0, le=1)
    """epsilon: chance that any of the pool is taken."""
    draw_gamma: float = Field(100.0, ge=0)
    """squarecb: the larger, the less often are items taken that score less than the best; scores are as `ranking.value` makes them."""
    draw_floor: float = Field(0.005, ge=1e-6, lt=0.02)
    """Smallest probability of each candidate of the pool: nothing in a logged pool was impossible."""

    def check(self, attributes: Iterable[str], sources: Iterable[str], seen_len: int) -> None:
        """ValueError where it names what is not there."""
        named = {
            "filters": self.filters,
            "coverage": self.coverage,
            "diversity_by": self.diversity_by,
            "caps": [cap.attribute for cap in self.caps],
            "boosts": [name for boost in self.boosts for name in boost.filters],
        }
        for option, names in named.items():
            if wrong := sorted(set(names) - set(attributes)):
                raise ValueError(
                    f"slate.{option}: {wrong[0]!r} is not one of catalogue.attributes {sorted(attributes)}"
                )
        for boost in self.boosts:
            if wrong := sorted(set(boost.sources) - set(sources)):
                raise ValueError(f"slate.boosts: {wrong[0]!r} is not one of the sources {sorted(sources)}")
            if not boost.filters and not boost.sources:
                raise ValueError("slate.boosts: name filters or sources, or the boost is for every item alike")
        places = [pin.position for pin in self.pins]
        if len(set(places)) < len(places) or len({pin.item_id for pin in self.pins}) < len(places):
            raise ValueError(f"slate.pins: each position and each item once, got positions {places}")
        if self.draw_positions != "all" and min(self.draw_positions, default=1) < 1:
            raise ValueError(f"slate.draw_positions: {list(self.draw_positions)} must count from 1; [] draws none")
        if self.seen_last > seen_len:
            raise ValueError(f"slate.seen_last = {self.seen_last}: at most state.seen_len = {seen_len} are known")
