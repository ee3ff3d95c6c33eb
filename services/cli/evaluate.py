"""`recsys evaluate policy`: what another policy would have earned, from a log."""

from __future__ import annotations

import argparse
import difflib
import math
import sys
from dataclasses import asdict
from typing import Any

import numpy as np

from recsys.errors import BadInput
from recsys.evaluation import off_policy, off_policy_logs
from recsys.evaluation.off_policy import ESTIMATORS, WITHOUT_MODEL, Float64, Rounds, Settings
from recsys.evaluation.off_policy_intervals import Estimate, effective_sample_size, estimates
from recsys.evaluation.off_policy_logs import Log
from recsys.evaluation.off_policy_open_bandit import is_open_bandit, read_open_bandit
from recsys.evaluation.off_policy_policies import PolicyFile, read_policy
from recsys.evaluation.off_policy_slates import SLATE_ESTIMATORS, Slates, slate_terms_of, slates_of, to_the_end
from recsys.types import Int64
from services.cli.main import DONE, emit

_SETTINGS = ("reward", "window", "clip", "switch", "shrink", "folds", "prior", "confidence", "resamples", "seed")
_FAR = 4.0
"""Standard errors that the weights' mean may be from 1 before the log or policy is doubted: chance does it once in 16,000."""


def run(options: argparse.Namespace) -> int:
    """Evaluate and print."""
    _check(options)
    policy = read_policy(options.policy)
    names = _names(options.estimators)
    evaluate = _slates if names[0] in SLATE_ESTIMATORS else _position
    result = {"policy": asdict(policy), **evaluate(options, policy, names)}
    emit(options, result, _text(result))
    if options.json:  # the text has them
        for warning in result["warnings"]:
            print(f"recsys: warning: {warning}", file=sys.stderr)
    return DONE


def _check(options: argparse.Namespace) -> None:
    for name, fine, wanted in (
        ("confidence", 0 < options.confidence < 1, "between 0 and 1"),
        ("resamples", options.resamples >= 1, "1 or more"),
        ("folds", options.folds >= 2, "2 or more"),
        ("prior", 0 < options.prior < math.inf, "above 0"),
        ("clip", options.clip is None or 0 < options.clip < math.inf, "above 0"),
        ("switch", 0 <= options.switch < math.inf, "0 or more"),
        ("shrink", 0 <= options.shrink < math.inf, "0 or more"),
        ("seed", options.seed >= 0, "0 or more"),
        ("window", options.window is None or 0 <= options.window < math.inf, "0 or more seconds"),
        ("position", options.position is None or options.position >= 1, "1 or more"),
    ):
        if not fine:
            raise BadInput(f"--{name} {getattr(options, name)} must be {wanted}", field=name)


def _names(given: str) -> tuple[str, ...]:
    if given == "all":
        return ESTIMATORS
    if given == "slates":
        return SLATE_ESTIMATORS
    names, known = tuple(dict.fromkeys(given.split(","))), (*ESTIMATORS, *SLATE_ESTIMATORS)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise BadInput(
                f"--estimators: {name!r} is not known: did you mean {near!r}? Known: all, slates, {', '.join(known)}",
                field="estimators",
            )
    if len({name in SLATE_ESTIMATORS for name in names}) > 1:
        raise BadInput(
            "--estimators: those of slates and of one position are two runs: name one kind", field="estimators"
        )
    return names


def _position(options: argparse.Namespace, policy: PolicyFile, names: tuple[str, ...]) -> dict[str, Any]:
    position, log = options.position, None
    if is_open_bandit(options.log):
        if options.reward != "click" or options.window is not None:
            raise BadInput(
                "rows of Open Bandit's files earn by click alone: leave out --reward and --window", field="log"
            )
        rounds = read_open_bandit(options.log, position)
    else:
        log = off_policy_logs.read_log(options.log, _rewarded(options), options.window)
        position = position or off_policy_logs.drawn_position(log)
        rounds = off_policy_logs.rounds_of(log, position, model_only=names == ("dm",))
    chances = policy.chances(rounds)
    refused = {name: why for name in names if (why := off_policy.why_not(name, rounds, chances))}
    if refused and options.estimators != "all":
        raise BadInput("; ".join(refused.values()), field="estimators")
    model = np.zeros_like(chances)
    if not set(names) <= {*WITHOUT_MODEL, *refused}:
        model = off_policy.smoothed_means(rounds, folds=options.folds, prior=options.prior)
    settings = Settings(clip=options.clip, switch=options.switch, shrink=options.shrink)
    weights = off_policy.importance(rounds, chances)
    terms = {n: off_policy.terms_of(n, rounds, chances, model, settings) for n in names if n not in refused}
    found = estimates(terms, weights, rounds.rewards, rounds.users, **_intervals(options))
    variance = np.add.reduceat(chances**2 / rounds.logged, rounds.starts[:-1]) - 1
    about = _weights(weights, float(variance.mean())) if rounds.drawn else {}
    log_says = {"rounds": len(rounds), "position": position, "mean_reward": float(rounds.rewards.mean())}
    doubts = _doubts(options, policy, rounds, log)
    return _result(options, rounds, log_says, found, about, doubts) | {"refused": refused}


def _slates(options: argparse.Namespace, policy: PolicyFile, names: tuple[str, ...]) -> dict[str, Any]:
    if is_open_bandit(options.log):
        raise BadInput(
            "rows of Open Bandit's files do not say which were one answer: evaluate single rows (--estimators all)",
            field="estimators",
        )
    if options.position is not None:
        raise BadInput(
            "--position is not for whole answers: leave it out, or name other --estimators", field="position"
        )
    log = off_policy_logs.read_log(options.log, _rewarded(options), options.window)
    slates = slates_of(log)
    chances = policy.chances(slates.rounds)
    model = np.zeros_like(chances)
    if "cascade_dr" in names:
        model = to_the_end(slates, chances, folds=options.folds, prior=options.prior)
    terms = {n: slate_terms_of(n, slates, chances, model) for n in names}
    rewards = slates.grid(slates.rounds.rewards, 0.0).sum(1)
    found = estimates(terms, np.zeros(len(rewards)), rewards, slates.users, **_intervals(options))
    log_says = {"slates": len(rewards), "rounds": len(slates.rounds), "mean_reward": float(rewards.mean())}
    doubts = _doubts(options, policy, slates.rounds, log)
    return _result(options, slates.rounds, log_says, found, _down(slates, chances), doubts) | {"refused": {}}


def _rewarded(options: argparse.Namespace) -> list[str]:
    types = [name.strip() for name in options.reward.split(",")]
    if not all(types):
        raise BadInput(
            f"--reward {options.reward!r} must be feedback types, comma-separated, such as click", field="reward"
        )
    return types


def _doubts(options: argparse.Namespace, policy: PolicyFile, rounds: Rounds, log: Log | None) -> list[str]:
    """Names that this log does not know, and a log that earned nothing."""
    doubts = []
    if strange := sorted(policy.probabilities.keys() - set(rounds.names)):
        doubts.append(f"`probabilities` has {len(strange)} items that are in no pool, such as {strange[0]!r}")
    absent = [name for name in _rewarded(options) if log and name not in log.types]
    if absent or not rounds.rewards.any():
        what = f"no feedback is of type {absent[0]!r}" if absent else "nothing is rewarded"
        known = ", ".join(sorted(log.types)[:9]) or "none" if log else ""
        doubts.append(what + (f": check --reward; the log's types: {known}" if log else ": no row has a click"))
    return doubts


def _intervals(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "generator": np.random.default_rng(options.seed),
        "confidence": options.confidence,
        "resamples": options.resamples,
    }


def _result(
    options: argparse.Namespace,
    rounds: Rounds,
    log_says: dict[str, Any],
    found: list[Estimate],
    weights: dict[str, Any],
    doubts: list[str],
) -> dict[str, Any]:
    return {
        "log": {**log_says, "users": _count(rounds.users), "left_out": dict(rounds.left_out)},
        "settings": {name: getattr(options, name) for name in _SETTINGS},
        "weights": weights,
        "estimates": [asdict(estimate) for estimate in found],
        "warnings": doubts + weights.pop("warnings", []),
    }


def _count(users: Int64) -> int:
    return len(np.unique(users))


def _weights(weights: Float64, variance: float) -> dict[str, Any]:
    """What the unchanged weights say about the log and the policy; `variance` is theirs, NaN where only they tell it."""
    mean, warnings = float(weights.mean()), []
    error = math.sqrt((max(variance, 0.0) if math.isfinite(variance) else float(weights.var())) / len(weights))
    if abs(mean - 1) > _FAR * error + 1e-3:
        warnings.append(
            f"the weights' mean is {mean:.4g}, not 1: propensities were not logged at the decision, or the policy chooses "
            "what the log never does"
        )
    return {
        "mean": mean,
        "max": float(weights.max()),
        "effective_sample_size": effective_sample_size(weights),
        "warnings": warnings,
    }


def _down(slates: Slates, chances: Float64) -> dict[str, Any]:
    """The same for the products down to each position."""
    products = np.cumprod(slates.grid(off_policy.importance(slates.rounds, chances), 1.0), 1)
    by_position = [_weights(column, math.nan) for column in products.T]
    warnings = [f"down to position {place}: {w}" for place, b in enumerate(by_position, 1) for w in b.pop("warnings")]
    return {"down_to_position": by_position, "warnings": warnings}


def _text(result: dict[str, Any]) -> str:
    log = result["log"]
    lines = [
        f"log: {log.get('slates', log['rounds']):,} of {log['users']:,} users, mean reward {log['mean_reward']:.6g}"
    ]
    if log["left_out"]:
        lines.append("left out: " + ", ".join(f"{count} {reason}" for reason, count in log["left_out"].items()))
    lines.append(
        f"{'estimator':16}{'value':>12}{'bootstrap':>26}{'gain over the log':>26}{'empirical Bernstein':>26}{'ESS':>10}"
    )
    for row in result["estimates"]:
        size = "" if row["effective_sample_size"] is None else f"{row['effective_sample_size']:.1f}"
        intervals = "".join(
            f"{_interval(row[kind]):>26}" for kind in ("bootstrap", "gain_bootstrap", "empirical_bernstein")
        )
        lines.append(f"{row['estimator']:16}{row['value']:12.6g}{intervals}{size:>10}")
        if row["bias_estimate"]:
            most = "" if row["bias_bound"] is None else f", at most {row['bias_bound']:.3g} either way"
            lines.append(f"{'':16}by its weights' change or its model about {row['bias_estimate']:+.3g}{most}")
    lines += [f"not valid here: {why}" for why in result["refused"].values()]
    lines += [f"warning: {warning}" for warning in result["warnings"]]
    return "\n".join(lines)


def _interval(bounds: Any) -> str:
    return "" if bounds is None else f"[{bounds[0]:.5g}, {bounds[1]:.5g}]"
