"""The slate, filled from the top, one position at a time, each choice with its probability given the items above it.

Rules act on what remains before each choice: pins and caps say what is open, likeness and coverage what it is worth. A draw
is among the best of what is open, so that no rule is broken by exploring; nothing reorders afterwards.

Legend: K candidates.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from recsys.bandit.draw import floored, inverse_gap, mostly_best
from recsys.config import SlateConfig
from recsys.types import Bool

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One filled position: the candidate's index and the probability of choosing it; a drawn position keeps its pool."""

    candidate: int
    propensity: float
    pool: tuple[tuple[int, float], ...] | None = None


class Term(Protocol):
    """What the items above add to each remaining candidate's worth, in units of the score's logarithm."""

    values: Float64
    """[K], as of the items added so far."""

    def add(self, candidate: int) -> None:
        """It is shown at the next position."""
        ...


class Limit(Protocol):
    """What the items above, and those pinned below, forbid at the next position."""

    def blocked(self) -> Bool:
        """[K]: showing it at the next position would break the rule."""
        ...

    def add(self, candidate: int) -> None:
        """It is shown at the next position."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """The rules of one answer over its K candidates; used up by one `fill`."""

    pins: Mapping[int, int] = field(default_factory=dict)
    """Position → candidate: shown there and nowhere else, unless a limit forbids it."""
    limits: Sequence[Limit] = ()
    terms: Sequence[Term] = ()


def fill(worth: Float64, n: int, request_id: str, config: SlateConfig, rules: Rules | None = None) -> list[Choice]:
    """Up to `n` of K candidates by worth [K] (the logarithm of the score), the largest first, ties by index.

    A drawn position takes one of the best `draw_pool` that are open, with `draw_probabilities`. Draws are seeded by the request
    id alone: filling again gives the same slate. The slate ends where nothing is open.
    """
    filling = _Filling(worth, request_id, config, rules or Rules())
    choices: list[Choice] = []
    while len(choices) < n and (choice := filling.choose(len(choices) + 1)) is not None:
        choices.append(choice)
    return choices


class _Filling:
    """One slate under way."""

    def __init__(self, worth: Float64, request_id: str, config: SlateConfig, rules: Rules) -> None:
        self._worth, self._request_id, self._config, self._rules = worth, request_id, config, rules
        self._free = np.ones(len(worth), np.bool_)
        self._free[list(rules.pins.values())] = False
        self._order = np.argsort(-worth, kind="stable")
        self._generator: np.random.Generator | None = None

    def choose(self, position: int) -> Choice | None:
        """The next position's item, which is then taken; None where nothing is open."""
        blocked = [limit.blocked() for limit in self._rules.limits]
        pinned = self._rules.pins.get(position)
        if pinned is not None:
            if not any(mask[pinned] for mask in blocked):
                return self._take(Choice(candidate=pinned, propensity=1.0))
            self._free[pinned] = True
        opened = self._free.copy()
        for mask in blocked:
            opened &= ~mask
        places, config = self._config.draw_positions, self._config
        drawn = places == "all" or position in places
        worth, best = self._best(opened, config.draw_pool if drawn else 1)
        if not len(best):
            return None
        if not drawn:
            return self._take(Choice(candidate=int(best[0]), propensity=1.0))
        return self._take(self._draw(best, draw_probabilities(worth[best], config)))

    def _best(self, opened: Bool, count: int) -> tuple[Float64, npt.NDArray[np.intp]]:
        """What each candidate is worth below the items so far [K], and the best open ones in order."""
        if not self._rules.terms:
            return self._worth, self._order[opened[self._order]][:count]
        worth = self._worth + sum(term.values for term in self._rules.terms)
        candidates = np.flatnonzero(opened)
        if len(candidates) > count:
            least = np.partition(worth[candidates], len(candidates) - count)[len(candidates) - count]
            candidates = candidates[worth[candidates] >= least]
        return worth, candidates[np.argsort(-worth[candidates], kind="stable")[:count]]

    def _draw(self, pool: npt.NDArray[np.intp], probabilities: Float64) -> Choice:
        if self._generator is None:
            digest = hashlib.blake2b(self._request_id.encode(), digest_size=8).digest()
            self._generator = np.random.default_rng(int.from_bytes(digest, "little"))
        drawn = int(self._generator.choice(len(pool), p=probabilities))
        return Choice(
            candidate=int(pool[drawn]),
            propensity=float(probabilities[drawn]),
            pool=tuple(zip(pool.tolist(), probabilities.tolist(), strict=True)),
        )

    def _take(self, choice: Choice) -> Choice:
        self._free[choice.candidate] = False
        for limit in self._rules.limits:
            limit.add(choice.candidate)
        for term in self._rules.terms:
            term.add(choice.candidate)
        return choice


def draw_probabilities(worth: Float64, config: SlateConfig) -> Float64:
    """Probabilities of a pool's k candidates by worth [k], the best first: floor + (1 - k floor) p, each at least the floor, in sum 1.

    softmax   p = exp(worth / temperature), normalised: position after position, Plackett-Luce cut to the pool
    epsilon   p = epsilon / k, and the rest to the best
    squarecb  p = 1 / (k + gamma (best score - score)), and the rest to the best (Foster and Rakhlin 2020, inverse gap weighting)
    """
    sizes = np.array([len(worth)])
    if config.draw_kind == "softmax":
        p = np.exp((worth - worth[0]) / config.draw_temperature)[None]
        p /= p.sum()
    elif config.draw_kind == "epsilon":
        p = mostly_best(worth[None], sizes, config.draw_epsilon)
    else:
        p = inverse_gap(np.exp(worth)[None], sizes, config.draw_gamma)
    (mixed,) = floored(p, sizes, config.draw_floor)
    return mixed / mixed.sum()
