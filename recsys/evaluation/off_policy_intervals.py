"""Estimates with their intervals and with what tells whether to believe them.

Percentile bootstrap (Efron 1979) over users, for every estimator, and empirical Bernstein (Maurer and Pontil 2009,
theorem 4), which holds at any number of rounds, for those that are means of bounded terms; the bounds are the largest over
the logged pools. The bias of clipping, of switching and of a wrong model is in neither.

Legend: N rounds, G users, B resamples, E estimators.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from recsys.evaluation.off_policy import Float64, Terms
from recsys.types import Int64

_CHUNK = 2_000_000
"""Drawn counts held at once, 16 MB."""

Interval = tuple[float, float] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """An estimated reward a round."""

    estimator: str
    value: float
    bootstrap: Interval
    """None: fewer than half of the resamples have a value, or there is one user."""
    gain: float
    """Value less the mean reward of the log."""
    gain_bootstrap: Interval
    """On the same resamples: what both depend on cancels."""
    empirical_bernstein: Interval
    """None: the estimator is not a mean of terms whose bounds the log tells."""
    effective_sample_size: float | None
    """(Σw)² / Σw² of the weights it uses: rounds of the other policy itself that would tell as much. None without any."""
    changed_share: float | None
    """Share of the rounds whose weight was clipped, switched off or shrunk, by more than a hundredth."""
    bias_estimate: float | None
    """Value less what the same form gives with unchanged weights, as noisy as these; None where they are unknown."""
    bias_bound: float | None


def estimates(
    terms: Mapping[str, Terms],
    weights: Float64,
    rewards: Float64,
    users: Int64,
    generator: np.random.Generator,
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
) -> list[Estimate]:
    """One estimate for each named estimator from its terms, the unchanged `weights` (NaN: unknown), rewards and users [N].

    All estimators share the resamples: their differences are paired.
    """
    if not 0 < confidence < 1 or resamples < 1:
        raise ValueError(f"need 0 < confidence < 1 and resamples > 0, got {confidence}, {resamples}")
    logged, drawn = _resampled(terms, rewards, users, generator, resamples)
    found = []
    for (name, term), values in zip(terms.items(), drawn, strict=True):
        any_weight = bool(term.weights.any())
        plain = weights if name != "replay" else term.weights
        unchanged = replace(term, weights=plain).value
        found.append(
            Estimate(
                estimator=name,
                value=term.value,
                bootstrap=_middle(values, confidence),
                gain=term.value - float(rewards.mean()),
                gain_bootstrap=_middle(values - logged, confidence),
                empirical_bernstein=_bernstein_of(name, term, users, confidence),
                effective_sample_size=effective_sample_size(term.weights),
                changed_share=float(np.mean(np.abs(term.weights - plain) > 0.01 * plain)) if any_weight else None,
                bias_estimate=term.value - unchanged if math.isfinite(unchanged) else None,
                bias_bound=term.bias_bound,
            )
        )
    return found


def effective_sample_size(weights: Float64) -> float | None:
    """(Σw)² / Σw² (Kish 1965); None when all are 0 or they are unknown."""
    square = float((weights**2).sum())
    return float(weights.sum()) ** 2 / square if square > 0 else None


def empirical_bernstein(values: Float64, low: float, high: float, confidence: float) -> tuple[float, float]:
    """Bounds of the mean of independent values [G] that lie between low and high, at least as sure as `confidence`.

    mean ± (sqrt(2 V ln(2/δ) / G) + 7 (high − low) ln(2/δ) / (3 (G − 1))), V the sample variance, δ half of what is left to
    chance: Maurer and Pontil 2009, theorem 4, once for either side.
    """
    num = len(values)
    log = math.log(4 / (1 - confidence))
    half = math.sqrt(2 * float(values.var(ddof=1)) * log / num) + 7 * (high - low) * log / (3 * (num - 1))
    mean = float(values.mean())
    return mean - half, mean + half


def _middle(values: Float64, confidence: float) -> Interval:
    """Quantiles of what the resamples say [B]."""
    known = values[np.isfinite(values)]
    if 2 * len(known) < len(values):
        return None
    low, high = np.quantile(known, [(1 - confidence) / 2, (1 + confidence) / 2]).tolist()
    return low, high


def _bernstein_of(name: str, term: Terms, users: Int64, confidence: float) -> Interval:
    if term.bounds is None or not np.isfinite(term.bounds).all():
        return None
    values = term.base + term.weights * term.residuals
    if name == "replay":  # given that they match, rewards are independent and so is their number
        values, users = values[term.weights > 0], users[term.weights > 0]
    _, of, rounds = np.unique(users, return_inverse=True, return_counts=True)
    if len(rounds) < 2:
        return None
    low, high = term.bounds
    # The mean over rounds is the mean over users of their sums, each times users / rounds.
    scale = len(rounds) / len(values)
    sums = np.asarray(np.bincount(of, values) * scale, np.float64)
    return empirical_bernstein(
        sums, float((rounds * low).min()) * scale, float((rounds * high).max()) * scale, confidence
    )


def _resampled(
    terms: Mapping[str, Terms], rewards: Float64, users: Int64, generator: np.random.Generator, resamples: int
) -> tuple[Float64, list[Float64]]:
    """The mean reward [B] and each estimator's value [E][B] in each resample of the users; NaN where there is but one."""
    _, of = np.unique(users, return_inverse=True)
    num = int(of.max()) + 1
    columns: list[Float64] = [np.bincount(of).astype(np.float64), np.bincount(of, rewards).astype(np.float64)]
    for term in terms.values():
        columns += [
            np.bincount(of, c).astype(np.float64) for c in (term.base, term.weights * term.residuals, term.weights)
        ]
    by_user = np.stack(columns, 1)
    sums = np.full((resamples, by_user.shape[1]), np.nan)
    step = max(1, _CHUNK // num)
    for first in range(0, resamples if num > 1 else 0, step):
        size = min(step, resamples - first)
        counts = np.empty((size, num))
        for row in range(size):
            counts[row] = np.bincount(generator.integers(num, size=num, dtype=np.int32), minlength=num)
        sums[first : first + size] = counts @ by_user
    rounds = sums[:, 0]
    values = []
    for index, term in enumerate(terms.values()):
        base, weighted, weight = sums[:, 2 + 3 * index : 5 + 3 * index].T
        with np.errstate(divide="ignore", invalid="ignore"):
            values.append(base / rounds + weighted / (weight if term.normalised else rounds))
    return sums[:, 1] / rounds, values
