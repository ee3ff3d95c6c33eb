"""What the models see: item columns, slots, crosses, numbers and counters."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from recsys.config.tasks import Section


class CatalogueConfig(Section):
    """The item columns that features, filters and reasons use."""

    attributes: tuple[str, ...] = ("category", "tags")
    """Names of item attributes; each is a slot. A value is a string or a number; a list where multi-valued."""
    multivalued: tuple[str, ...] = ("tags",)
    """Attributes of which up to `max_values` values are used; of the others, the first."""
    max_values: int = Field(4, ge=1, le=32)
    """Values of a multi-valued attribute that are used; the rest is cut."""


class CounterConfig(Section):
    """Decayed counts of one combination of slots."""

    of: tuple[str, ...]
    """One to three of `user`, context fields, `item` and attributes; a rate leans on that of the longest listed beginning."""
    values: tuple[Literal["shown", "events", "elsewhere"], ...] = ("shown",)
    """`shown`: impressions, each task's rate; `events`: of a click log, the share not first in a session; `elsewhere`: `elsewhere_types`."""
    half_lives_s: tuple[float, ...] = (86_400.0,)
    """Half-lives, seconds of log time: each is counted."""


class FeaturesConfig(Section):
    """What the models see."""

    context: tuple[str, ...] = ()
    """Context fields of a request that become slots."""
    numbers: tuple[str, ...] = ()
    """Fields of `context` and item attributes (also such that are no slots) that the models see as numbers, squashed, with a flag if missing."""
    time_since: tuple[str, ...] = ()
    """Seconds since these, as numbers: `last_event` (of the user's history), and attributes that hold a time (ISO text, or milliseconds)."""
    buckets: dict[str, tuple[float, ...]] = Field(default_factory=dict)
    """Context field or attribute → rising edges: its slot holds the bucket of its number; without a number it is missing."""
    history_types: tuple[str, ...] = ("click", "like", "purchase")
    """Feedback types that enter a user's history."""
    history_len: int = Field(30, ge=1, le=200)
    """Newest history events (of each sequence) that the models attend to."""
    sequences: dict[str, tuple[str, ...]] = Field(default_factory=dict, max_length=8)
    """Name → feedback types: each is attended to on its own, over its newest `history_len` events; none: one sequence of all."""
    time_gaps: bool = False
    """Tell the attention how long ago each history event was."""
    history_attributes: tuple[str, ...] = ("category", "tags")
    """Attributes of history items that the models attend to, beside the item itself."""
    crosses: tuple[tuple[str, str], ...] = (("user", "category"), ("user", "tags"), ("history", "item"))
    """Pairs that feed the wide part, of `user`, context fields, `item` and attributes; first may be `history` or `history.ATTRIBUTE` (of each of
    the newest `cross_history` items). One of the two is `item` or an attribute."""
    cross_history: int = Field(5, ge=0, le=50)
    """History items crossed with the candidate."""
    affinity_decay: float = Field(0.8, gt=0, le=1)
    """Weight of the n-th newest history event in attribute affinity is this to the n: .8 gives the last three half of the sum."""
    counters: tuple[CounterConfig, ...] = (CounterConfig(of=("user",)), CounterConfig(of=("item",)))
    """What is counted and shown to the models as numbers."""
    elsewhere_types: tuple[str, ...] = ()
    """Feedback without a request that counters of `elsewhere` count; and how often each but the first follows the first on its item."""
    transition_context: tuple[str, ...] = ()
    """Context fields that weigh what followed the last items of a session; with `transitions`."""
    transition_length: int = Field(400, ge=1, le=1024)
    """Transitions of the last item that are looked at, the newest."""
    transitions: bool = False
    """Numbers of what followed the session's last two items of late, and what an online factor model says follows."""
    counter_smoothing: float = Field(10.0, gt=0)
    """Impressions' worth of the parent's rate in each rate: half doubles the noise of new rows, double hides a hundred impressions."""
    counter_rows: int = Field(1_000_000, ge=4096)
    """Most rows of the counters, about 100 bytes each; then the half with the least in it is dropped."""

    def check(self, catalogue: CatalogueConfig) -> None:
        """ValueError where it names what is not there."""
        attributes = set(catalogue.attributes)
        for name, chosen in (
            ("catalogue.multivalued", catalogue.multivalued),
            ("features.history_attributes", self.history_attributes),
        ):
            if not set(chosen) <= attributes:
                raise ValueError(
                    f"{name}: {sorted(set(chosen) - attributes)[0]!r} is not one of catalogue.attributes {sorted(attributes)}"
                )
        for name, kinds in self.sequences.items():
            if not kinds or not set(kinds) <= set(self.history_types):
                raise ValueError(
                    f"features.sequences: {name!r} = {list(kinds)} must be some of features.history_types "
                    f"{list(self.history_types)}"
                )
        self._check_crosses(attributes)
        self._check_numbers(catalogue)
        self._check_counters(attributes)

    def _check_crosses(self, attributes: set[str]) -> None:
        shared, items = {"user", *self.context}, {"item", *attributes}
        past = {"history", *(f"history.{name}" for name in self.history_attributes)}
        for first, second in self.crosses:
            if first not in shared | items | past or second not in shared | items:
                raise ValueError(
                    f"features.crosses: ({first!r}, {second!r}) must pair one of {sorted(shared | items | past)} "
                    f"with one of {sorted(shared | items)}"
                )
            if first not in items - shared and second not in items:
                raise ValueError(
                    f"features.crosses: ({first!r}, {second!r}) is the same for every candidate: one of the two must be of "
                    f"{sorted(items)}"
                )

    def _check_numbers(self, catalogue: CatalogueConfig) -> None:
        multivalued = catalogue.multivalued
        slots = sorted({*self.context, *catalogue.attributes} - set(multivalued))
        for name, edges in self.buckets.items():
            if name not in slots or not edges or list(edges) != sorted(set(edges)):
                raise ValueError(
                    f"features.buckets: {name!r} = {list(edges)} must be rising edges of one of {slots}, slots of one value"
                )
        for option, names in (("numbers", self.numbers), ("time_since", self.time_since)):
            if wrong := [name for name in names if name in multivalued or names.count(name) > 1]:
                raise ValueError(
                    f"features.{option}: {wrong[0]!r} must be named once, and not be in catalogue.multivalued"
                )

    def _check_counters(self, attributes: set[str]) -> None:
        if wrong := sorted(set(self.transition_context) - set(self.context)):
            raise ValueError(f"features.transition_context: {wrong[0]!r} is not one of features.context")
        known = {"user", "item", *self.context, *attributes}
        for counter in self.counters:
            names = counter.of
            if not 1 <= len(set(names)) == len(names) <= 3 or not set(names) <= known:
                raise ValueError(
                    f"features.counters: {list(names)} must be one to three different ones of {sorted(known)}"
                )
            if not counter.half_lives_s or min(counter.half_lives_s) <= 0:
                raise ValueError(f"features.counters: half_lives_s of {list(names)} must be at least one, all above 0")
            if "elsewhere" in counter.values and not self.elsewhere_types:
                raise ValueError(f"features.counters: {list(names)} counts `elsewhere`: set features.elsewhere_types")
