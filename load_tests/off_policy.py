"""How often the intervals of `recsys evaluate policy` hold the truth, on worlds whose truth is known.

1,000 logs of 2,000 rounds of three worlds: a drawn position out of six items in eight contexts, the same drawn uniformly with
a policy that always takes one item, and slates of three positions under a cascade.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from load_tests.common import Report, run, say
from recsys.evaluation.off_policy import Rounds, Settings, Terms, importance, smoothed_means, terms_of
from recsys.evaluation.off_policy_intervals import Estimate, estimates
from recsys.evaluation.off_policy_slates import Slates, slate_terms_of, to_the_end

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

UNBIASED = ("ips", "snips", "dr", "sndr", "replay", "slate_ips", "cascade_ips", "cascade_dr")
"""Within the worlds here; snips, sndr and replay, which are ratios, up to order 1/N."""
BIASED = ("dm", "switch_dr", "dr_os")
BOUNDED = ("ips", "dr", "replay", "slate_ips", "cascade_ips", "cascade_dr")
"""Those with an empirical-Bernstein interval."""
CONTEXTS, ITEMS, POSITIONS = 8, 6, 3
SWITCH, SHRINK = 2.0, 2.0
"""Low enough that the estimators that trade bias for noise have a bias to report."""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--resamples", type=int, default=1000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """What one estimator did over all runs of a world."""

    bootstrap: float
    """Share of the intervals that hold the truth."""
    bernstein: float | None
    width_ratio: float | None
    """Mean width of empirical Bernstein over that of the bootstrap."""
    bias: float
    """Mean of the estimates less the truth."""
    error: float
    """Standard error of `bias`."""


Drawn = tuple[dict[str, Terms], Floats, Floats, Ints]
"""One log: terms of each estimator, unchanged weights, rewards, users."""
Draw = Callable[[np.random.Generator], Drawn]


def coverage(draw: Draw, truth: float, runs: int, seed: int, resamples: int) -> dict[str, Coverage]:
    """Each estimator's intervals over many logs."""
    found: dict[str, list[Estimate]] = {}
    for number in range(runs):
        rng = np.random.default_rng([seed, number])
        terms, weights, rewards, users = draw(rng)
        for estimate in estimates(terms, weights, rewards, users, rng, resamples=resamples):
            found.setdefault(estimate.estimator, []).append(estimate)
    return {name: _covered(several, truth) for name, several in found.items()}


def _covered(found: list[Estimate], truth: float) -> Coverage:
    drawn = np.array([e.bootstrap for e in found], np.float64)
    bounds = np.array([e.empirical_bernstein or (np.nan, np.nan) for e in found], np.float64)
    known = bool(np.isfinite(bounds).all())
    values = np.array([e.value for e in found])
    return Coverage(
        bootstrap=float(((drawn[:, 0] <= truth) & (truth <= drawn[:, 1])).mean()),
        bernstein=float(((bounds[:, 0] <= truth) & (truth <= bounds[:, 1])).mean()) if known else None,
        width_ratio=float(np.diff(bounds).mean() / np.diff(drawn).mean()) if known else None,
        bias=float(values.mean() - truth),
        error=float(values.std(ddof=1) / np.sqrt(len(values))),
    )


class Position:
    """A drawn position: every context has its click rates; log and policy are softmaxes of noisy views of them."""

    def __init__(self, seed: int, num: int, *, uniform: bool) -> None:
        rng = np.random.default_rng(seed)
        self._num, self._uniform = num, uniform
        self._rates = rng.uniform(0.05, 0.5, (CONTEXTS, ITEMS))
        view, other = rng.normal(0, 1, (CONTEXTS, ITEMS)), rng.normal(0, 1, (CONTEXTS, ITEMS))
        self._logged = np.full_like(view, 1 / ITEMS) if uniform else softmax(view, floor=0.05)
        self._chances = np.eye(ITEMS)[other.argmax(1)] if uniform else softmax(self._rates * 3 + other)
        self.truth = float((self._chances * self._rates).sum(1).mean())

    def draw(self, rng: np.random.Generator) -> Drawn:
        """One log, contexts drawn uniformly."""
        context = rng.integers(CONTEXTS, size=self._num)
        shown = choose(rng, self._logged[context])
        rewards = (rng.random(self._num) < self._rates[context, shown]).astype(np.float64)
        rounds = full_pools(self._logged[context], shown, rewards, np.arange(self._num))
        chances = self._chances[context].ravel()
        model, settings = smoothed_means(rounds), Settings(switch=SWITCH, shrink=SHRINK)
        names = ("replay",) if self._uniform else ("ips", "snips", "dr", "sndr", *BIASED)
        terms = {name: terms_of(name, rounds, chances, model, settings) for name in names}
        return terms, importance(rounds, chances), rounds.rewards, rounds.users


class Cascade:
    """Slates of three positions; an item earns its rate, and half as much again below an item of its own parity."""

    def __init__(self, seed: int, num: int) -> None:
        rng = np.random.default_rng(seed)
        self._num = num
        self._rates = rng.uniform(0.05, 0.4, ITEMS)
        self._logged = softmax(rng.normal(0, 0.5, (POSITIONS, ITEMS)), floor=0.08)
        self._chances = softmax(rng.normal(0, 0.7, (POSITIONS, ITEMS)))
        same = 1 + 0.5 * (np.arange(ITEMS)[:, None] % 2 == np.arange(ITEMS)[None] % 2)
        self._below = same * self._rates
        """Rate of an item (column) below another (row)."""
        top, *rest = self._chances
        below = zip(self._chances[:-1], rest, strict=True)
        self.truth = float(top @ self._rates + sum(a @ self._below @ b for a, b in below))

    def draw(self, rng: np.random.Generator) -> Drawn:
        """One log of as many slates."""
        logged = np.tile(self._logged, (self._num, 1))
        shown = choose(rng, logged).reshape(self._num, POSITIONS)
        rates = np.empty(shown.shape)
        rates[:, 0] = self._rates[shown[:, 0]]
        rates[:, 1:] = self._below[shown[:, :-1], shown[:, 1:]]
        rewards = (rng.random(rates.shape) < rates).astype(np.float64)
        of = np.repeat(np.arange(self._num), POSITIONS)
        rounds = full_pools(logged, shown.ravel(), rewards.ravel(), of)
        slates = Slates(rounds=rounds, slate=of, depth=np.tile(np.arange(POSITIONS), self._num))
        chances = np.tile(self._chances, (self._num, 1)).ravel()
        model = to_the_end(slates, chances)
        names = ("slate_ips", "cascade_ips", "cascade_dr")
        terms = {name: slate_terms_of(name, slates, chances, model) for name in names}
        return terms, np.zeros(self._num), rewards.sum(1), slates.users


def softmax(logits: Floats, floor: float = 0.0) -> Floats:
    """Probabilities over the last axis, each at least the floor."""
    weights = np.exp(logits)
    chances: Floats = floor + (1 - floor * logits.shape[-1]) * weights / weights.sum(-1, keepdims=True)
    return chances


def choose(rng: np.random.Generator, chances: Floats) -> Ints:
    """One column of each row [N, K]."""
    below: Ints = (rng.random((len(chances), 1)) > np.cumsum(chances, 1)[:, :-1]).sum(1)
    return below


def full_pools(logged: Floats, shown: Ints, rewards: Floats, users: Ints) -> Rounds:
    """Rounds whose pools are all items [N, K]."""
    num, size = logged.shape
    entries = np.arange(num) * size + shown
    return Rounds(
        names=tuple(map(str, range(size))),
        starts=np.arange(num + 1) * size,
        items=np.tile(np.arange(size), num),
        logged=logged.ravel(),
        shown=entries,
        propensities=logged.ravel()[entries],
        rewards=rewards,
        users=users,
    )


def worlds(seed: int, num: int) -> dict[str, Position | Cascade]:
    """By name; each knows the truth."""
    return {
        "drawn": Position(seed, num, uniform=False),
        "uniform": Position(seed, num, uniform=True),
        "cascade": Cascade(seed, num),
    }


def measure(options: argparse.Namespace, report: Report) -> None:
    """Coverage of both intervals, their width ratio, and the bias of those that have one."""
    for name, world in worlds(options.seed, options.rounds).items():
        say(f"{name}: {options.runs} logs of {options.rounds} rounds")
        for estimator, found in coverage(
            world.draw, world.truth, options.runs, options.seed, options.resamples
        ).items():
            report.add(f"bootstrap_coverage_{estimator}", found.bootstrap, "share", "higher")
            if estimator in UNBIASED:
                report.add(f"bootstrap_off_95_{estimator}", abs(found.bootstrap - 0.95), "share")
            if found.bernstein is not None:
                report.add(f"bernstein_coverage_{estimator}", found.bernstein, "share", "higher")
                report.add(f"bernstein_width_ratio_{estimator}", found.width_ratio, "ratio")
            report.add(f"bias_{estimator}", found.bias, "reward")
            report.add(f"bias_error_{estimator}", found.error, "reward")
        report.add(f"truth_{name}", world.truth, "reward", "higher")


if __name__ == "__main__":
    raise SystemExit(run("off_policy", measure, arguments))
