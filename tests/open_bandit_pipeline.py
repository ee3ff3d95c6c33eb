"""What Open Bandit Pipeline says, for ours to be held to: writes tests/unit/golden/open_bandit_pipeline.json.

Imports nothing of ours: it reads the files, fits the reward model and deals the folds by itself. In an environment of its
own, because obp 0.5.7 refuses Python 3.11 and today's torch, on which it runs:

    python3 -m venv obp && obp/bin/pip install numpy pandas scipy scikit-learn matplotlib seaborn torch tqdm pyyaml mypy-extensions
    obp/bin/pip install --no-deps --ignore-requires-python obp==0.5.7 pyieoe pingouin pandas-flavor xarray tabulate
    obp/bin/python tests/open_bandit_pipeline.py ../shared/data/open_bandit_men > tests/unit/golden/open_bandit_pipeline.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import obp
import pandas as pd
from obp import ope
from obp.ope.helper import estimate_bernstein_lower_bound
from obp.policy import BernoulliTS

LIMIT, SYNTHETIC_LIMIT = 10.0, 1.5
"""Of clipping, switching and shrinking."""
PRIOR, FOLDS = 50.0, 2


def estimate(log: dict[str, Any], chances: Any, model: Any, limit: float, *, deterministic: bool) -> dict[str, float]:
    """Every estimator's value; `chances` and `model` are [rounds, items]."""
    fed = {
        "reward": log["reward"],
        "action": log["action"],
        "pscore": log["pscore"],
        "position": np.zeros(len(log["action"]), int),
        "action_dist": chances[:, :, None],
        "estimated_rewards_by_reg_model": model[:, :, None],
    }
    estimators = {
        "ips": ope.InverseProbabilityWeighting(),
        "ips_clipped": ope.InverseProbabilityWeighting(lambda_=limit),
        "snips": ope.SelfNormalizedInverseProbabilityWeighting(),
        "dm": ope.DirectMethod(),
        "dr": ope.DoublyRobust(),
        "dr_clipped": ope.DoublyRobust(lambda_=limit),
        "sndr": ope.SelfNormalizedDoublyRobust(),
        "switch_dr": ope.SwitchDoublyRobust(lambda_=limit),
        "dr_os": ope.DoublyRobustWithShrinkage(lambda_=limit),
    }
    if deterministic:
        estimators["replay"] = ope.ReplayMethod()
    return {name: float(estimator.estimate_policy_value(**fed)) for name, estimator in estimators.items()}


def read(path: Path) -> tuple[dict[str, Any], Any]:
    """A log's actions, rewards and propensities in the order of the file, and the users' affinity to each item."""
    frame = pd.read_csv(path, index_col=0)
    affinity = frame[[name for name in frame.columns if name.startswith("user-item_affinity_")]].to_numpy()
    log = {
        "action": frame.item_id.to_numpy(),
        "reward": frame.click.to_numpy(),
        "pscore": frame.propensity_score.to_numpy(),
    }
    return log, affinity


def item_means(log: dict[str, Any], num: int) -> Any:
    """Each item's mean reward in the other fold, smoothed [rounds, items]; row i is in fold i mod 2."""
    frame = pd.DataFrame({"action": log["action"], "reward": log["reward"]})
    frame["fold"] = np.arange(len(frame)) % FOLDS
    model = np.empty((len(frame), num))
    for fold in range(FOLDS):
        other = frame[frame.fold != fold]
        clicks = other.groupby("action").reward.agg(["sum", "count"]).reindex(range(num), fill_value=0)
        model[frame.fold == fold] = (
            (clicks["sum"] + PRIOR * other.reward.mean()) / (clicks["count"] + PRIOR)
        ).to_numpy()
    return model


def open_bandit(folder: Path) -> list[dict[str, Any]]:
    """The two files under four policies."""
    simulated = BernoulliTS(n_actions=34, len_list=3, is_zozotown_prior=True, campaign="men", random_state=0)
    bts = np.round(simulated.compute_batch_action_dist(n_rounds=1, n_sim=100_000)[0].mean(1), 6)
    cases = []
    for source, policy in (
        ("bts", {"policy": "uniform"}),
        ("random", {"policy": "greedy", "by": "affinity"}),
        ("random", {"policy": "softmax", "by": "affinity", "temperature": 0.5}),
        ("random", {"policy": "fixed", "probabilities": {str(item): p for item, p in enumerate(bts.tolist())}}),
        ("bts", {"policy": "epsilon_greedy", "by": "affinity", "epsilon": 0.25}),
    ):
        log, affinity = read(folder / source / "men.csv")
        shape = affinity.shape
        greedy = np.zeros(shape)
        greedy[np.arange(len(greedy)), affinity.argmax(1)] = 1
        if policy["policy"] == "uniform":
            chances = np.full(shape, 1 / shape[1])
        elif policy["policy"] == "softmax":
            chances = np.exp(affinity / policy["temperature"])
            chances /= chances.sum(1, keepdims=True)
        elif policy["policy"] == "fixed":
            chances = np.tile(bts / bts.sum(), (len(greedy), 1))
        else:
            epsilon = policy.get("epsilon", 0.0)
            chances = (1 - epsilon) * greedy + epsilon / shape[1]
        values = estimate(log, chances, item_means(log, shape[1]), LIMIT, deterministic=policy["policy"] == "greedy")
        cases.append({"file": f"{source}/men.csv", "policy": policy, "values": values})
    return cases


def distributions(rng: np.random.Generator, concentration: float, *shape: int) -> Any:
    """Probabilities of few digits that sum to 1 over the last axis."""
    drawn = rng.dirichlet(np.full(shape[-1], concentration), shape[:-1]).round(4)
    drawn[..., 0] = np.maximum(0.0, 1 - drawn[..., 1:].sum(-1)).round(4)
    return drawn


def synthetic(rng: np.random.Generator) -> dict[str, Any]:
    """Sixty rounds over four items; every number that goes in is in the result."""
    num, items = 60, 4
    logged, chances = distributions(rng, 2.0, num, items), distributions(rng, 0.5, num, items)
    model = rng.random((num, items)).round(3)
    action = np.array([rng.choice(items, p=p) for p in logged])
    reward = rng.integers(2, size=num)
    best = np.eye(items)[chances.argmax(1)]
    log = {"action": action, "reward": reward, "pscore": logged[np.arange(num), action]}
    uniform = log | {"pscore": np.full(num, 1 / items)}
    weighted = reward * chances[np.arange(num), action] / log["pscore"]
    return {
        "logged": logged.tolist(),
        "chances": chances.tolist(),
        "model": model.tolist(),
        "action": action.tolist(),
        "reward": reward.tolist(),
        "values": estimate(log, chances, model, SYNTHETIC_LIMIT, deterministic=False),
        "uniform_greedy": estimate(uniform, best, model, SYNTHETIC_LIMIT, deterministic=True),
        "bernstein_lower": float(estimate_bernstein_lower_bound(weighted, x_max=50.0, delta=0.025)),
    }


def slates(rng: np.random.Generator) -> dict[str, Any]:
    """Thirty slates of three positions over four items."""
    num, length, items = 30, 3, 4
    logged, chances = (distributions(rng, a, num, length, items) for a in (3.0, 1.0))
    model = (rng.random((num, length, items)) * 2).round(3)
    action = rng.integers(items, size=(num, length))
    reward = rng.integers(2, size=(num, length))
    at = np.arange(num)[:, None], np.arange(length)[None], action
    item, other = logged[at], chances[at]
    ids = {
        "slate_id": np.repeat(np.arange(num), length),
        "reward": reward.ravel(),
        "position": np.tile(np.arange(length), num),
    }

    def whole(p: Any) -> Any:
        return np.repeat(p.prod(1), length)

    down, other_down = item.cumprod(1).ravel(), other.cumprod(1).ravel()
    cascade = {"pscore_cascade": down, "evaluation_policy_pscore_cascade": other_down}
    values = {
        "slate_ips": ope.SlateStandardIPS(len_list=length).estimate_policy_value(
            **ids, pscore=whole(item), evaluation_policy_pscore=whole(other)
        ),
        "independent_ips": ope.SlateIndependentIPS(len_list=length).estimate_policy_value(
            **ids, pscore_item_position=item.ravel(), evaluation_policy_pscore_item_position=other.ravel()
        ),
        "cascade_ips": ope.SlateRewardInteractionIPS(len_list=length).estimate_policy_value(**ids, **cascade),
        "cascade_dr": ope.SlateCascadeDoublyRobust(len_list=length, n_unique_action=items).estimate_policy_value(
            **ids,
            **cascade,
            action=action.ravel(),
            q_hat=model.ravel(),
            evaluation_policy_action_dist=chances.ravel(),
        ),
    }
    arrays = {"logged": logged, "chances": chances, "model": model, "action": action, "reward": reward}
    return {name: array.tolist() for name, array in arrays.items()} | {
        "values": {name: float(value) for name, value in values.items()}
    }


def main() -> None:
    rng = np.random.default_rng(0)
    settings = {"limit": LIMIT, "synthetic_limit": SYNTHETIC_LIMIT, "prior": PRIOR, "folds": FOLDS}
    result = {"obp": obp.__version__, "settings": settings, "synthetic": synthetic(rng), "slates": slates(rng)}
    print(json.dumps(result | {"open_bandit": open_bandit(Path(sys.argv[1]))}))


if __name__ == "__main__":
    main()
