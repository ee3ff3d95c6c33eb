"""Policies by name: what each ranks by, how it draws, what it learns."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal, get_args

import numpy as np

from recsys.bandit.base import Choices, Events, Policy, Requests, Values, needed
from recsys.bandit.draw import Chances, Float64, draw, even, floored, inverse_gap, mostly_best, only_best
from recsys.bandit.linucb import LinUcb
from recsys.bandit.neural import LastLayer
from recsys.bandit.score import Grouped, Rule, score_grouped, valued
from recsys.bandit.sums import EdgeSums
from recsys.errors import BadInput
from recsys.types import Bool, Float32, Int64

Name = Literal["uniform", "greedy", "epsilon_greedy", "thompson", "diag_linucb", "linucb", "square_cb", "neural"]
NAMES: tuple[str, ...] = get_args(Name)


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyOptions:
    """A policy and its numbers. BadInput names the field, the value and the remedy."""

    policy: str = "diag_linucb"
    published: bool = False
    """Rank edges by the published mean instead of the normalised one."""
    fresh_above: float = 0.0
    """An item whose unseen edges carry more than this share of its active weight goes first (diag_linucb, thompson); 1: none does."""
    prior: float = 0.0
    """Impressions of weight 1 without reward in every edge (with more than 0 no item is fresh), or in LinUCB's A (which needs it)."""
    alpha: float = 0.1
    """Widths added to the mean (diag_linucb, linucb), or standard deviations a normal draw has in widths (thompson)."""
    epsilon: float = 0.05
    """Shared by all of the pool (epsilon_greedy)."""
    gamma: float = 500.0
    """How greedy square_cb and neural are: the gap 1/γ halves an item's chance in a pool of one."""
    pool: int = 10
    """Best candidates that one is drawn from; 0: all."""
    floor: float = 0.0
    """Least probability of each candidate of the pool."""
    half_life_s: float | None = None
    """Half-life of what was learned, seconds of log time (policies over edges, linucb); none: nothing is forgotten."""

    def __post_init__(self) -> None:
        if self.policy not in NAMES:
            near = difflib.get_close_matches(self.policy, NAMES, n=1, cutoff=0.0)[0]
            raise BadInput(
                f"policy {self.policy!r} is not known: did you mean {near!r}? Known: {', '.join(NAMES)}", field="policy"
            )
        limits = {
            "fresh_above": (0, 1),
            "prior": (0, 1e6),
            "alpha": (0, 1e6),
            "epsilon": (0, 1),
            "gamma": (0, 1e9),
            "pool": (0, 1e6),
            "floor": (0, 1),
        }
        for name, (least, most) in limits.items():
            value = getattr(self, name)
            if not least <= value <= most:
                raise BadInput(f"{name} = {value!r} must be from {least:g} to {most:g}", field=name)
        if self.half_life_s is not None and not 0 < self.half_life_s < float("inf"):
            raise BadInput(f"half_life_s = {self.half_life_s!r} must be positive and finite", field="half_life_s")
        if self.floor * self.pool > 1 or (self.pool == 0 and self.floor > 0):
            raise BadInput(
                f"floor = {self.floor:g} for a pool of {self.pool or 'all'} leaves more than 1: lower one",
                field="floor",
            )

    @staticmethod
    def parse(raw: dict[str, Any]) -> PolicyOptions:
        """From a table of a file; an unknown key names the nearest known one."""
        known = [field.name for field in fields(PolicyOptions)]
        for key in raw:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
                raise BadInput(f"{key!r} is not an option of a policy: did you mean {near!r}?", field=key)
        return PolicyOptions(**raw)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """How much there is to learn of: what the arrays of a policy are made for."""

    num_edges: int = 0
    num_items: int = 0
    num_clusters: int = 0
    hidden: int = 0
    """Width of the last hidden layer."""


class Ranked:
    """Ranks by values, keeps a pool of the best, draws from it."""

    def __init__(self, values: Values, chances: Chances, pool: int, rng: np.random.Generator) -> None:
        self.values = values
        self._chances, self._pool, self._rng = chances, pool, rng

    def choose(self, requests: Requests) -> Choices:
        values, first = self.values.of(requests, self._rng)
        return draw(requests, values, first, self._pool, self._chances, self._rng)

    def update(self, events: Events) -> None:
        if not (np.isfinite(events.weights).all() and np.isfinite(events.rewards).all()):
            raise BadInput("weights or rewards of events are not finite: they would spoil the sums; drop these events")
        self.values.learn(events)


class EdgeValues:
    """Mean + α width over a request's edges, or with `sampled` a normal draw of that mean and α width; fresh items first if `explore`."""

    def __init__(self, sums: EdgeSums, options: PolicyOptions, *, sampled: bool = False, explore: bool = True) -> None:
        self.sums = sums
        self._options, self._sampled, self._explore = options, sampled, explore

    def of(self, requests: Requests, rng: np.random.Generator) -> tuple[Float32, Bool | None]:
        options, num = self._options, len(requests.items)
        rule = Rule(options.published, float(options.fresh_above), float(options.prior))
        grouped = Grouped(requests.candidate, requests.column, requests.edge)
        scale = self.sums.scale(requests.now_ms)
        scores = score_grouped(requests.weights.ravel(), grouped, self.sums.sums, scale, rule, num)
        if not self._explore:
            return scores.mean, None
        return valued(scores, options.alpha, rng if self._sampled else None), scores.fresh

    def learn(self, events: Events) -> None:
        self.sums.add(events.edges, events.weights, events.impressions, events.rewards, events.times_ms)


class Given:
    """The ranker's own scores; nothing is learned here."""

    def of(self, requests: Requests, rng: np.random.Generator) -> tuple[Float32, None]:
        return needed(requests.scores, "predicted rewards", "square_cb"), None

    def learn(self, events: Events) -> None:
        pass


class Alike:
    """All candidates alike."""

    def of(self, requests: Requests, rng: np.random.Generator) -> tuple[Float32, None]:
        return np.zeros(len(requests.items), np.float32), None

    def learn(self, events: Events) -> None:
        pass


def make_policy(options: PolicyOptions, shape: Shape, rng: np.random.Generator) -> Policy:
    """The policy that the options name, having learned nothing."""
    values = _values(options, shape)
    rules: dict[str, Chances] = {
        "uniform": even,
        "greedy": only_best,
        "epsilon_greedy": partial(mostly_best, epsilon=options.epsilon),
        "square_cb": partial(inverse_gap, gamma=options.gamma),
        "neural": partial(inverse_gap, gamma=options.gamma),
    }
    rule = rules.get(options.policy, even)

    def chances(values: Float64, sizes: Int64) -> Float64:
        return floored(rule(values, sizes), sizes, options.floor)

    return Ranked(values, rule if options.floor == 0 else chances, options.pool, rng)


def _values(options: PolicyOptions, shape: Shape) -> Values:
    if options.policy == "uniform":
        return Alike()
    if options.policy == "square_cb":
        return Given()
    if options.policy == "neural":
        return LastLayer(np.zeros(shape.hidden + 1, np.float32))
    if options.policy == "linucb":
        return LinUcb(shape.num_items, shape.num_clusters, options.alpha, options.half_life_s, options.prior or 1.0)
    sums = EdgeSums(shape.num_edges, options.half_life_s)
    explore = options.policy in ("diag_linucb", "thompson")
    return EdgeValues(sums, options, sampled=options.policy == "thompson", explore=explore)
