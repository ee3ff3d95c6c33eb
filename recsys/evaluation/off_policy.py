"""What another policy would have earned, from the log of this one: estimators over one choice out of a logged pool.

Every estimator has one form: mean(base) + Σ weights·residuals / (N, or Σ weights where it normalises itself).
Which of them is valid when, and what a log must hold: docs/evaluation.md.

Legend: N rounds (logged choices), M entries of their pools one pool after another, w importance weight (other policy's
probability over the log's), q reward model. All float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from recsys.errors import BadInput
from recsys.types import Int64

Float64: TypeAlias = npt.NDArray[np.float64]

ESTIMATORS = ("ips", "snips", "dm", "dr", "sndr", "switch_dr", "dr_os", "replay")
SELF_NORMALISED = ("snips", "sndr", "replay")
WITHOUT_MODEL = ("ips", "snips", "replay")
LEAST = 1e-12
"""Smallest probability that is weighed by: the squares of its weights still have digits, and nothing is drawn so seldom."""
_CERTAIN = 1 - 1e-9
"""A policy that gives an item this much is deterministic there."""
_SAME = 1e-3
"""Logged propensities are float32 or rounded to six digits: this far from 1/size, relatively, is still uniform."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounds:
    """Logged choices, each out of its pool. Nothing here depends on the other policy."""

    names: tuple[str, ...]
    """Item ids by their number in `items`."""
    starts: Int64
    """[N + 1]: the pool of round i is entries starts[i] to starts[i + 1], never empty."""
    items: Int64
    """Number of each entry's item [M]."""
    logged: Float64
    """Probability with which the log chose each entry [M]; NaN where only the shown item's is known, or none."""
    shown: Int64
    """Entry of the item that was shown [N]."""
    propensities: Float64
    """Probability with which it was chosen [N]; NaN: not drawn, or not logged."""
    rewards: Float64
    """What it earned [N], from 0 to `max_reward`."""
    users: Int64
    """Whose round [N], numbered from 0: rounds of one user are resampled, and kept out of a model's fit, together."""
    values: Mapping[str, Float64] = field(default_factory=dict)
    """What a policy may rank by: number of each entry [M]; NaN where the log has none."""
    requests: tuple[str, ...] = ()
    """How messages name each round."""
    max_reward: float = 1.0
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Rows of the log that are in no round, by reason."""

    def __len__(self) -> int:
        return len(self.rewards)

    @property
    def sizes(self) -> Int64:
        """Size of each round's pool [N]."""
        return np.diff(self.starts)

    @property
    def round_of(self) -> Int64:
        """Round of each entry [M]."""
        return np.repeat(np.arange(len(self)), self.sizes)

    @property
    def drawn(self) -> bool:
        """Whether every choice was drawn with a known probability."""
        return bool(np.isfinite(self.propensities).all())

    @property
    def uniform(self) -> bool:
        """Whether every item had the same probability in every round: pools of different sizes have not."""
        same = np.abs(self.propensities * self.sizes - 1) < _SAME
        return self.drawn and bool(same.all()) and len(set(self.sizes.tolist())) == 1

    def name(self, index: int) -> str:
        """How a message names a round."""
        return f"request {self.requests[index]!r}" if self.requests else f"row {index + 1}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the estimators' formulas leave open."""

    clip: float | None = None
    """ips, snips, dr, sndr: weights above are cut to it; None: none is."""
    switch: float = 10.0
    """switch_dr: larger weights trust the model alone (τ). 0 is dm, infinity dr."""
    shrink: float = 10.0
    """dr_os: λ of λw / (w² + λ). 0 is dm, infinity dr."""

    def __post_init__(self) -> None:
        for name, value in (("clip", self.clip), ("switch", self.switch), ("shrink", self.shrink)):
            if value is not None and not value >= 0:
                raise ValueError(f"{name} must be 0 or more, got {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """One estimator's parts, by round [N], and what their sums could have been at all."""

    base: Float64
    """What the reward model says the other policy earns: q(x, π) = Σ_a π(a|x) q(x, a). 0 without a model."""
    weights: Float64
    """After clipping, switching or shrinking."""
    residuals: Float64
    """Reward less the model's: r − q(x, a)."""
    normalised: bool
    bounds: tuple[float, float] | None
    """Least and most of base + weights·residuals over everything that could have been drawn; None: not known."""
    bias_bound: float | None
    """The most by which changed weights can move the expectation, whatever the rewards are; None: not known."""

    @property
    def value(self) -> float:
        """The estimate. NaN where it normalises itself by weights that are all 0."""
        num = self.weights.sum() if self.normalised else len(self.base)
        return float(self.base.mean() + (self.weights * self.residuals).sum() / num) if num else float("nan")


def why_not(name: str, rounds: Rounds, chances: Float64) -> str:
    """Why an estimator is not valid for this log and policy, with what is; empty: it is valid."""
    if name != "dm" and not rounds.drawn:
        return f"{name} needs the probability with which each item was drawn; only dm, which trusts its model, is valid"
    if name == "replay" and not rounds.uniform:
        return "replay needs a log that drew uniformly from pools of one size: use ips or dr, which weigh by propensity"
    if name == "replay" and (np.maximum.reduceat(chances, rounds.starts[:-1]) < _CERTAIN).any():
        return "replay needs a policy that always takes one item, such as greedy: use ips or dr for one that draws"
    if name in SELF_NORMALISED and not chances[rounds.shown].any():
        return f"{name} is not defined: the policy never chooses what was shown; log more exploration, or use ips"
    return ""


def terms_of(name: str, rounds: Rounds, chances: Float64, model: Float64, settings: Settings) -> Terms:
    """The parts of an estimator for a policy's chances [M] and a reward model [M], both by entry of the pools.

    ips       mean(w r)                                       Horvitz and Thompson 1952
    snips     Σ w r / Σ w                                     Swaminathan and Joachims 2015
    dm        mean(q(x, π))
    dr        mean(q(x, π) + w (r − q(x, a)))                 Dudík et al. 2014
    sndr      mean(q(x, π)) + Σ w (r − q(x, a)) / Σ w         Thomas and Brunskill 2016, section 4
    switch_dr dr with w [w ≤ τ]                               Wang, Agarwal and Dudík 2017
    dr_os     dr with λ w / (w² + λ)                          Su et al. 2020, optimistic shrinkage
    replay    Σ [π(x) = a] r / Σ [π(x) = a]                   Li et al. 2011

    BadInput where the estimator is not valid (`why_not`).
    """
    if reason := why_not(name, rounds, chances):
        raise BadInput(reason, field="estimators")
    if name in WITHOUT_MODEL:
        model = np.zeros_like(chances)
    expected = np.add.reduceat(chances * model, rounds.starts[:-1])
    residuals = rounds.rewards - model[rounds.shown]
    if name == "dm":
        used = np.zeros(len(rounds))
    elif name == "replay":
        used = (chances[rounds.shown] >= _CERTAIN).astype(np.float64)
    else:
        used = _changed(name, chances[rounds.shown] / rounds.propensities, settings)
    return Terms(
        base=expected,
        weights=used,
        residuals=residuals,
        normalised=name in SELF_NORMALISED,
        bounds=_bounds(name, rounds, chances, model, settings),
        bias_bound=_bias_bound(name, rounds, chances, model, settings),
    )


def importance(rounds: Rounds, chances: Float64) -> Float64:
    """The weights [N] before anything is done to them; their mean is 1 in expectation."""
    return chances[rounds.shown] / rounds.propensities


def _changed(name: str, weights: Float64, settings: Settings) -> Float64:
    if name == "dm":
        return np.zeros_like(weights)
    if name == "switch_dr":
        return np.where(weights <= settings.switch, weights, 0.0)
    if name == "dr_os" and np.isfinite(settings.shrink):
        over = weights**2 + settings.shrink
        return weights * np.divide(settings.shrink, over, out=np.zeros_like(weights), where=over > 0)
    if name in ("ips", "snips", "dr", "sndr") and settings.clip is not None:
        return np.minimum(weights, settings.clip)
    return weights


def _bounds(
    name: str, rounds: Rounds, chances: Float64, model: Float64, settings: Settings
) -> tuple[float, float] | None:
    """Least and most of a round's term over the logged pools; those of a reward for dm and for replay's matches."""
    if name in ("dm", "replay"):
        return 0.0, rounds.max_reward
    if name in SELF_NORMALISED or not np.isfinite(rounds.logged).all():
        return None
    used = _changed(name, chances / rounds.logged, settings)
    base = np.add.reduceat(chances * model, rounds.starts[:-1])[rounds.round_of]
    return float((base - used * model).min()), float((base + used * (rounds.max_reward - model)).max())


def _bias_bound(name: str, rounds: Rounds, chances: Float64, model: Float64, settings: Settings) -> float | None:
    if name == "dm" or not np.isfinite(rounds.logged).all():
        return None
    weights = chances / rounds.logged
    lost = (weights - _changed(name, weights, settings)) * rounds.logged
    if name in SELF_NORMALISED:
        return 0.0 if not lost.any() else None
    return float((lost * np.maximum(model, rounds.max_reward - model)).sum() / len(rounds))


def smoothed_means(rounds: Rounds, *, folds: int = 2, prior: float = 50.0) -> Float64:
    """A reward model [M]: each item's mean reward, drawn towards the mean of all by `prior` rounds; cross-fitted.

    Users are dealt to folds in turn; an entry's value comes from the other folds alone, so that it is independent of its
    round's reward (Chernozhukov et al. 2018). (Σ r + prior·mean) / (n + prior) of the item's rounds there.
    """
    if folds < 2 or not prior > 0:
        raise ValueError(f"need at least 2 folds and a prior above 0, got {folds}, {prior}")
    shown, num = rounds.items[rounds.shown], len(rounds.names)
    fold = folds_of(rounds.users, folds)
    by_fold = np.empty((folds, num))
    for index in range(folds):
        other = fold != index
        rewards = rounds.rewards[other]
        sums, counts = np.bincount(shown[other], rewards, num), np.bincount(shown[other], minlength=num)
        by_fold[index] = (sums + prior * rewards.mean()) / (counts + prior)
    model: Float64 = by_fold[fold[rounds.round_of], rounds.items]
    return model


def folds_of(users: Int64, folds: int) -> Int64:
    """The fold of each round [N], users dealt in turn. BadInput where one would be empty."""
    fold = users % folds
    if len(np.unique(fold)) < folds:
        raise BadInput(
            f"a model of {folds} folds needs as many users or rows, and the log has {len(np.unique(users))}: log more, or "
            f"name estimators without a model ({', '.join(WITHOUT_MODEL)}; for whole answers all but cascade_dr)",
            field="log",
        )
    return fold
