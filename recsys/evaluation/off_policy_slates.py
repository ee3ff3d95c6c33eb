"""What another policy's whole answers would have earned: estimators over slates whose every position was drawn.

The log's pool at a position depends on the items above; so do the other policy's chances over it. The reward of a slate is
the sum over its positions.

Legend: S slates, L positions (shorter slates are filled up with weight 1 and reward 0), N rounds (slate and position), w_l
importance weight of position l, w_{1:l} the product of those down to it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from recsys.errors import BadInput
from recsys.evaluation.off_policy import Float64, Rounds, Terms, folds_of, importance
from recsys.evaluation.off_policy_logs import Log, build, drawn_positions
from recsys.types import Impression, Int64, ShownItem

SLATE_ESTIMATORS = ("slate_ips", "independent_ips", "cascade_ips", "cascade_dr")


@dataclass(frozen=True, slots=True, kw_only=True)
class Slates:
    """Whole answers: one round for each drawn position, slate after slate, from the top."""

    rounds: Rounds
    slate: Int64
    """Slate of each round [N]."""
    depth: Int64
    """Place of each round in its slate [N], 0 at the top."""

    def grid(self, values: Float64, fill: float) -> Float64:
        """Values of the rounds [N] as [S, L]."""
        cells = np.full((int(self.slate[-1]) + 1, int(self.depth.max()) + 1), fill)
        cells[self.slate, self.depth] = values
        return cells

    @property
    def users(self) -> Int64:
        """Whose each slate is [S]."""
        return self.rounds.users[self.depth == 0]


def slates_of(log: Log) -> Slates:
    """The answers of a log; BadInput where a position was not drawn. Deferred answers are left out and counted."""
    left_out = Counter(log.left_out)
    choices: list[tuple[Impression, ShownItem]] = []
    slate: list[int] = []
    depth: list[int] = []
    for impression in log.impressions:
        if impression.activation == "deferred":
            left_out["deferred"] += 1
            continue
        number = slate[-1] + 1 if slate else 0
        for place, item in enumerate(sorted(impression.items, key=lambda i: i.position)):
            if item.pool is None:
                drawn = drawn_positions(log)
                raise BadInput(
                    f"request {impression.request_id!r}, position {item.position} was not drawn (propensity "
                    f"{item.propensity}, no pool): whole answers cannot be weighed. Still valid: ips and the others of "
                    f"one drawn position (--position {drawn[0]}), or dm",
                    field="position",
                )
            choices.append((impression, item))
            slate.append(number)
            depth.append(place)
    if not choices:
        raise BadInput("every answer of the log is deferred: what was seen of it is not a whole answer", field="log")
    rounds = build(log, choices, left_out)
    return Slates(rounds=rounds, slate=np.array(slate, np.int64), depth=np.array(depth, np.int64))


def slate_terms_of(name: str, slates: Slates, chances: Float64, model: Float64) -> Terms:
    """The parts of a slate estimator for a policy's chances and a model Q, both by entry of the pools [M]; its terms are by
    slate [S]. Only cascade_dr uses the model (`to_the_end`).

    slate_ips        mean(w_{1:L} Σ_l r_l)      no assumption
    independent_ips  mean(Σ_l w_l r_l)          a reward depends on its own position's item alone (Li et al. 2018)
    cascade_ips      mean(Σ_l w_{1:l} r_l)      … on the items down to it, the reward-interaction IPS (McInerney et al. 2020)
    cascade_dr       mean(Σ_l w_{1:l} (r_l − Q_l) + w_{1:l−1} Σ_a π(a) Q_l(a))      likewise (Kiyohara et al. 2022, 3.1)
    """
    weights = slates.grid(importance(slates.rounds, chances), 1.0)
    rewards = slates.grid(slates.rounds.rewards, 0.0)
    most = slates.grid(np.maximum.reduceat(chances / slates.rounds.logged, slates.rounds.starts[:-1]), 1.0).max(0)
    top, down = slates.rounds.max_reward, np.cumprod(weights, 1)
    high = float(np.cumprod(most).sum()) * top
    low = 0.0
    if name == "slate_ips":
        values, high = down[:, -1] * rewards.sum(1), float(np.prod(most)) * top * len(most)
    elif name == "independent_ips":
        values, high = (weights * rewards).sum(1), float(most.sum()) * top
    elif name == "cascade_ips":
        values = (down * rewards).sum(1)
    else:
        expected = np.add.reduceat(chances * model, slates.rounds.starts[:-1])
        above = np.concatenate([np.ones((len(down), 1)), down[:, :-1]], 1)
        chosen = slates.grid(model[slates.rounds.shown], 0.0)
        values = (down * (rewards - chosen) + above * slates.grid(expected, 0.0)).sum(1)
        # A model to the end is from 0 to what all positions could still earn.
        left = np.arange(len(most), 0, -1) * top
        reach = np.cumprod(most)
        low = -float((reach * left).sum())
        high += float((np.append(1.0, reach[:-1]) * left).sum())
    zeros = np.zeros_like(values)
    return Terms(base=values, weights=zeros, residuals=zeros, normalised=False, bounds=(low, high), bias_bound=None)


def to_the_end(slates: Slates, chances: Float64, *, folds: int = 2, prior: float = 50.0) -> Float64:
    """Q_l by entry [M]: what an item at a position earns there and below it, the policy choosing what is below.

    Fitted from the bottom: each item's mean at the position of r_l + Σ_a π(a) Q_{l+1}(a), smoothed by `prior` rounds towards
    the position's; cross-fitted by users, as any model is that has seen nothing of its own round.
    """
    rounds, round_of = slates.rounds, slates.rounds.round_of
    fold = folds_of(rounds.users, folds)
    depth_of, fold_of = slates.depth[round_of], fold[round_of]
    shown, num = rounds.items[rounds.shown], len(rounds.names)
    model = np.zeros(len(rounds.items))
    num_slates, num_positions = int(slates.slate[-1]) + 1, int(slates.depth.max()) + 1
    for index in range(folds):
        later = np.zeros(num_slates)
        for place in reversed(range(num_positions)):
            here = slates.depth == place
            target = rounds.rewards[here] + later[slates.slate[here]]
            fit = fold[here] != index
            sums = np.bincount(shown[here][fit], target[fit], num)
            counts = np.bincount(shown[here][fit], minlength=num)
            mean = target[fit].mean() if fit.any() else 0.0
            entries = np.flatnonzero(depth_of == place)
            q = ((sums + prior * mean) / (counts + prior))[rounds.items[entries]]
            mine = fold_of[entries] == index
            model[entries[mine]] = q[mine]
            later[:] = np.bincount(slates.slate[round_of[entries]], chances[entries] * q, num_slates)
    return model
