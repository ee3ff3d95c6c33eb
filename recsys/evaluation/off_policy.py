"""What another policy would have earned, from the log of this one: IPS and SNIPS over one drawn position.

Valid where the position was drawn from a logged pool and the other policy chooses within that pool, given the items
above. A position that took the best (propensity 1) says nothing about any other choice: it is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from recsys.errors import BadInput
from recsys.types import Impression, ShownItem

Float64: TypeAlias = npt.NDArray[np.float64]
Policy: TypeAlias = Callable[[Impression, ShownItem], Sequence[float]]
"""The chance with which another policy would have chosen each item of the pool, in the pool's order; they sum to 1."""

_SUM_TOLERANCE = 1e-3
"""Logged probabilities are float32 of up to 1,000 items: their sum may be off by this and no more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Draws:
    """Logged draws of one position: importance weight (other policy over logged) and reward of each [N]."""

    weights: Float64
    rewards: Float64


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """An estimated reward a draw, with what tells whether to believe it."""

    estimator: str
    value: float
    low: float
    """Percentile bootstrap bounds of `value`; clipping bias is not in them."""
    high: float
    draws: int
    effective_sample_size: float
    """(Σw)² / Σw²: draws of the other policy itself that would tell as much."""
    max_weight: float
    """Before clipping."""


def draws_of(
    impressions: Iterable[Impression], rewards: Mapping[tuple[str, str], float], policy: Policy, *, position: int
) -> Draws:
    """Weigh each impression's item at `position`; its reward is that of (request_id, item_id), 0 where there is none.

    Answers too short to have the position are left out. BadInput when the position was not drawn, or no answer has it.
    """
    weights, earned = [], []
    for impression in impressions:
        for item in impression.items:
            if item.position == position:
                weights.append(_weight(impression, item, policy))
                earned.append(rewards.get((impression.request_id, item.item_id), 0.0))
    if not weights:
        raise BadInput(f"no impression shows position {position}: choose one that answers have", field="position")
    return Draws(weights=np.array(weights, np.float64), rewards=np.array(earned, np.float64))


def ips(draws: Draws, generator: np.random.Generator, **options: Any) -> Estimate:
    """Inverse propensity scoring, mean(w r): unbiased without clipping (Horvitz and Thompson 1952).

    Options: `clip` (weights above are cut to it), `confidence` (.95) and `resamples` (1000) of the interval.
    """
    return _estimate("ips", draws, generator, **options)


def snips(draws: Draws, generator: np.random.Generator, **options: Any) -> Estimate:
    """Self-normalised IPS, Σ(w r) / Σw: bounded by the rewards, biased by O(1/N) (Swaminathan and Joachims 2015).

    Options as of `ips`. BadInput when the other policy never chooses what was shown.
    """
    return _estimate("snips", draws, generator, **options)


def _estimate(
    estimator: str,
    draws: Draws,
    generator: np.random.Generator,
    *,
    clip: float | None = None,
    confidence: float = 0.95,
    resamples: int = 1000,
) -> Estimate:
    if not 0 < confidence < 1 or resamples < 1 or (clip is not None and not clip > 0):
        raise ValueError(f"need 0 < confidence < 1, resamples > 0, clip > 0, got {confidence}, {resamples}, {clip}")
    weights = draws.weights if clip is None else np.minimum(draws.weights, clip)
    num, total = len(weights), float(weights.sum())
    if estimator == "snips" and not total:
        raise BadInput(
            "every weight is 0: the other policy never chooses what was shown; log more exploration, or use ips",
            field="policy",
        )
    weighted = weights * draws.rewards
    samples = np.empty(resamples)
    for i in range(resamples):
        chosen = generator.integers(num, size=num)
        weight = weights[chosen].sum() if estimator == "snips" else num
        samples[i] = weighted[chosen].sum() / weight if weight else np.nan
    tail = (1 - confidence) / 2
    low, high = np.nanquantile(samples, [tail, 1 - tail])
    return Estimate(
        estimator=estimator,
        value=float(weighted.sum() / (total if estimator == "snips" else num)),
        low=float(low),
        high=float(high),
        draws=num,
        effective_sample_size=total**2 / float((weights**2).sum()) if total else 0.0,
        max_weight=float(draws.weights.max()),
    )


def _weight(impression: Impression, item: ShownItem, policy: Policy) -> float:
    where = f"request {impression.request_id!r}, position {item.position}"
    if item.pool is None:
        raise BadInput(
            f"{where} was not drawn (propensity {item.propensity}, no pool): IPS and SNIPS are not valid there; "
            "only a direct model of the reward (DM), an A/B test or interleaving would be. Choose a drawn position",
            field="position",
        )
    ids, logged = zip(*item.pool, strict=True)
    if abs(sum(logged) - 1) > _SUM_TOLERANCE:
        raise BadInput(f"{where}: the pool's probabilities sum to {sum(logged):.6g}: log the whole pool", field="pool")
    chosen = ids.index(item.item_id)
    if item.propensity is not None and abs(item.propensity - logged[chosen]) > _SUM_TOLERANCE * logged[chosen]:
        problem = f"propensity {item.propensity} is not the shown item's {logged[chosen]} in the pool"
        raise BadInput(f"{where}: {problem}: log both from one draw", field="propensity")
    other = np.asarray(policy(impression, item), np.float64)
    if other.shape != (len(ids),) or not (other >= 0).all() or abs(other.sum() - 1) > _SUM_TOLERANCE:
        raise ValueError(f"{where}: the policy must give {len(ids)} probabilities that sum to 1, got {other}")
    return float(other[chosen] / logged[chosen])
