"""Off-policy estimates against closed forms, Open Bandit Pipeline, and a simulated world whose truth is known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys.errors import BadInput
from recsys.evaluation.off_policy import ESTIMATORS, Rounds, Settings, importance, smoothed_means, terms_of, why_not
from recsys.evaluation.off_policy_intervals import empirical_bernstein, estimates
from recsys.evaluation.off_policy_open_bandit import read_open_bandit
from recsys.evaluation.off_policy_policies import parse_policy
from recsys.evaluation.off_policy_slates import SLATE_ESTIMATORS, Slates, slate_terms_of, to_the_end
from tests.shared_data import shared

OBP: dict[str, Any] = json.loads((Path(__file__).parent / "golden" / "open_bandit_pipeline.json").read_text())


def rounds_of(logged: Any, action: Any, reward: Any, **changes: Any) -> Rounds:
    """Rounds whose pools are all items [N, K]."""
    logged, action = np.asarray(logged, np.float64), np.asarray(action)
    num, size = logged.shape
    rounds = Rounds(
        names=tuple(map(str, range(size))),
        starts=np.arange(num + 1) * size,
        items=np.tile(np.arange(size), num),
        logged=logged.ravel(),
        shown=np.arange(num) * size + action,
        propensities=logged[np.arange(num), action],
        rewards=np.asarray(reward, np.float64),
        users=np.arange(num),
    )
    return replace(rounds, **changes)


def value(name: str, rounds: Rounds, chances: Any, model: Any, **settings: Any) -> float:
    return terms_of(name, rounds, np.ravel(chances), np.ravel(model), Settings(**settings)).value


def agrees(values: dict[str, float], rounds: Rounds, chances: Any, model: Any, limit: float) -> None:
    """Each of obp's values within 1e-6; so narrow that a wrong clip, fold or normalisation shows."""
    for name, theirs in values.items():
        clip = limit if name.endswith("_clipped") else None
        ours = value(name.removesuffix("_clipped"), rounds, chances, model, clip=clip, switch=limit, shrink=limit)
        assert ours == pytest.approx(theirs, abs=1e-6), name


def test_synthetic_rounds_give_what_open_bandit_pipeline_gives() -> None:
    case, limit = OBP["synthetic"], OBP["settings"]["synthetic_limit"]
    assert {*case["values"], *case["uniform_greedy"]} == {*ESTIMATORS, "ips_clipped", "dr_clipped"}
    logged = np.array(case["logged"])
    rounds = rounds_of(logged, case["action"], case["reward"])
    agrees(case["values"], rounds, case["chances"], case["model"], limit)
    uniform = rounds_of(np.full_like(logged, 0.25), case["action"], case["reward"])
    greedy = np.eye(4)[np.argmax(case["chances"], 1)]
    agrees(case["uniform_greedy"], uniform, greedy, case["model"], limit)
    weighted = importance(rounds, np.ravel(case["chances"])) * rounds.rewards
    assert empirical_bernstein(weighted, 0.0, 50.0, 0.95)[0] == pytest.approx(case["bernstein_lower"], abs=1e-9)


def test_synthetic_slates_give_what_open_bandit_pipeline_gives() -> None:
    case = OBP["slates"]
    logged = np.array(case["logged"])
    num, length, size = logged.shape
    rounds = rounds_of(logged.reshape(-1, size), np.ravel(case["action"]), np.ravel(case["reward"]))
    slates = Slates(rounds=rounds, slate=np.repeat(np.arange(num), length), depth=np.tile(np.arange(length), num))
    assert set(case["values"]) == set(SLATE_ESTIMATORS)
    for name, theirs in case["values"].items():
        terms = slate_terms_of(name, slates, np.ravel(case["chances"]), np.ravel(case["model"]))
        assert terms.value == pytest.approx(theirs, abs=1e-9), name
        assert terms.bounds is not None and terms.bounds[0] <= terms.base.min() <= terms.base.max() <= terms.bounds[1]


@pytest.mark.parametrize("case", OBP["open_bandit"], ids=lambda case: f"{case['file'][:3]}-{case['policy']['policy']}")
def test_open_bandit_data_gives_what_open_bandit_pipeline_gives(case: dict[str, Any]) -> None:
    settings = OBP["settings"]
    rounds = read_open_bandit([shared("open_bandit_men") / case["file"]])
    chances = parse_policy(case["policy"]).chances(rounds)
    model = smoothed_means(rounds, folds=settings["folds"], prior=settings["prior"])
    agrees(case["values"], rounds, chances, model, settings["limit"])


# One context, three items, four rounds: every estimator by hand.
LOGGED = [[0.5, 0.25, 0.25]] * 4
ACTION, REWARD = [0, 1, 2, 1], [1.0, 0.0, 1.0, 1.0]
CHANCES = [[0.25, 0.75, 0.0]] * 4  # weights 0.5, 3, 0, 3
MODEL = [[0.4, 0.6, 0.2]] * 4  # q(x, π) = 0.55; residuals 0.6, −0.6, 0.8, 0.4
BY_HAND = {
    "ips": 3.5 / 4,
    "snips": 3.5 / 6.5,
    "dm": 0.55,
    "dr": 0.55 + (0.3 - 1.8 + 0 + 1.2) / 4,
    "sndr": 0.55 + (0.3 - 1.8 + 0 + 1.2) / 6.5,
    "switch_dr": 0.55 + 0.3 / 4,
    "dr_os": 0.55 + (2 * 0.5 / 2.25 * 0.6 + 2 * 3 / 11 * (-0.6 + 0.4)) / 4,
}


@pytest.mark.parametrize("name", BY_HAND)
def test_estimator_is_its_formula(name: str) -> None:
    rounds = rounds_of(LOGGED, ACTION, REWARD)
    assert value(name, rounds, CHANCES, MODEL, switch=2, shrink=2) == pytest.approx(BY_HAND[name], abs=1e-12)


def test_replay_is_the_mean_of_the_rewards_that_match() -> None:
    rounds = rounds_of(np.full((4, 3), 1 / 3), ACTION, REWARD)
    greedy = np.tile([0.0, 1.0, 0.0], 4)
    [estimate] = estimates(
        {"replay": terms_of("replay", rounds, greedy, np.zeros(12), Settings())},
        importance(rounds, greedy),
        rounds.rewards,
        rounds.users,
        np.random.default_rng(0),
    )
    assert (estimate.value, estimate.effective_sample_size, estimate.bias_estimate) == (0.5, 2.0, 0.0)


def test_clipping_is_shown_with_its_estimated_bias_and_its_bound() -> None:
    rounds, chances = rounds_of(LOGGED, ACTION, REWARD), np.ravel(CHANCES)
    weights = importance(rounds, chances)
    names = ("ips", "snips", "dr", "dm")
    terms = {n: terms_of(n, rounds, chances, np.ravel(MODEL), Settings(clip=2.0)) for n in names}
    ips, snips, dr, dm = estimates(terms, weights, rounds.rewards, rounds.users, np.random.default_rng(0))
    assert ips.value == pytest.approx(2.5 / 4) and ips.bias_estimate == pytest.approx(2.5 / 4 - 3.5 / 4)
    assert ips.changed_share == 0.5 and ips.effective_sample_size == pytest.approx(4.5**2 / 8.25)
    # Item 1 is chosen with .75 and counts as 2 · .25: a quarter of the policy is lost, whatever it earns.
    assert ips.bias_bound == pytest.approx(0.25) and dr.bias_bound == pytest.approx(0.25 * 0.6)
    assert snips.value == pytest.approx(2.5 / 4.5) and snips.bias_bound is None
    assert dm.bias_estimate == pytest.approx(BY_HAND["dm"] - BY_HAND["dr"]) and dm.effective_sample_size is None
    plain = estimates(
        {"ips": terms_of("ips", rounds, chances, chances, Settings())},
        weights,
        rounds.rewards,
        rounds.users,
        np.random.default_rng(0),
    )
    assert (plain[0].bias_estimate, plain[0].bias_bound, plain[0].changed_share) == (0.0, 0.0, 0.0)


@given(st.integers(0, 10_000))
def test_limits_of_switching_and_shrinking_are_dm_and_dr_and_the_log_itself_earns_its_mean(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logged, chances = rng.dirichlet(np.ones(5), 30), rng.dirichlet(np.ones(5), 30)
    action = np.array([rng.choice(5, p=p) for p in logged])
    rounds, model = rounds_of(logged, action, rng.integers(2, size=30)), rng.random((30, 5))
    dm, dr = (value(name, rounds, chances, model) for name in ("dm", "dr"))
    for name, setting in (("switch_dr", "switch"), ("dr_os", "shrink")):
        assert value(name, rounds, chances, model, **{setting: 0.0}) == pytest.approx(dm)
        assert value(name, rounds, chances, model, **{setting: np.inf}) == pytest.approx(dr)
    for name in ("ips", "snips"):
        assert value(name, rounds, logged, model) == pytest.approx(rounds.rewards.mean())
    for name in ("ips", "dr", "switch_dr", "dr_os"):
        terms = terms_of(name, rounds, chances.ravel(), model.ravel(), Settings(clip=3.0))
        each = terms.base + terms.weights * terms.residuals
        assert terms.bounds is not None and terms.bounds[0] - 1e-9 <= each.min() <= each.max() <= terms.bounds[1] + 1e-9
        assert terms.bias_bound is not None and terms.bias_bound >= 0


def test_slate_of_one_position_is_ips_and_dr() -> None:
    rounds, chances, model = rounds_of(LOGGED, ACTION, REWARD), np.ravel(CHANCES), np.ravel(MODEL)
    slates = Slates(rounds=rounds, slate=np.arange(4), depth=np.zeros(4, np.int64))
    for name in SLATE_ESTIMATORS:
        plain = BY_HAND["dr" if name == "cascade_dr" else "ips"]
        assert slate_terms_of(name, slates, chances, model).value == pytest.approx(plain), name


def cascade(seed: int, num: int) -> tuple[Slates, Any]:
    """Slates of two of three items, drawn without putting one back; the second earns only below item 0."""
    rng = np.random.default_rng(seed)
    pools, rewards, chances = [], [], []
    for _ in range(num):
        first = int(rng.choice(3, p=[0.2, 0.4, 0.4]))
        rest = [item for item in range(3) if item != first]
        second = int(rng.choice(rest, p=[0.5, 0.5]))
        pools += [([0, 1, 2], [0.2, 0.4, 0.4], first), (rest, [0.5, 0.5], second)]
        chances += [0.6, 0.2, 0.2, *([0.9, 0.1] if first == 0 else [0.5, 0.5])]
        rewards += [float(rng.random() < 0.1), float(first == 0 and rng.random() < (0.8 if second == 1 else 0.2))]
    sizes = [len(items) for items, _, _ in pools]
    starts = np.append(0, np.cumsum(sizes))
    shown = starts[:-1] + [items.index(item) for items, _, item in pools]
    logged = np.concatenate([p for _, p, _ in pools])
    rounds = Rounds(
        names=("0", "1", "2"),
        starts=starts,
        items=np.concatenate([items for items, _, _ in pools]),
        logged=logged,
        shown=shown,
        propensities=logged[shown],
        rewards=np.array(rewards),
        users=np.repeat(np.arange(num), 2),
    )
    return Slates(rounds=rounds, slate=np.repeat(np.arange(num), 2), depth=np.tile([0, 1], num)), np.array(chances)


def test_a_cascade_is_estimated_without_bias_where_single_positions_are_not() -> None:
    truth = 0.1 + 0.6 * (0.9 * 0.8 + 0.1 * 0.2)
    found: dict[str, list[float]] = {name: [] for name in SLATE_ESTIMATORS}
    for seed in range(30):
        slates, chances = cascade(seed, 300)
        model = to_the_end(slates, chances, prior=10.0)
        for name in SLATE_ESTIMATORS:
            found[name].append(slate_terms_of(name, slates, chances, model).value)
    error = {name: (np.mean(v) - truth) / (np.std(v) / np.sqrt(30)) for name, v in found.items()}
    assert all(abs(error[name]) < 4 for name in ("slate_ips", "cascade_ips", "cascade_dr")), error
    assert abs(error["independent_ips"]) > 10
    assert np.std(found["cascade_dr"]) < np.std(found["cascade_ips"]) < np.std(found["slate_ips"])


def test_rounds_of_one_user_are_resampled_together() -> None:
    rng = np.random.default_rng(1)
    users = np.repeat(np.arange(50), 20)
    rewards = np.repeat(rng.integers(2, size=50), 20)  # each user always clicks, or never does
    logged = np.full((1000, 2), 0.5)
    rounds = rounds_of(logged, rng.integers(2, size=1000), rewards)
    terms = {"ips": terms_of("ips", rounds, logged.ravel(), logged.ravel(), Settings())}
    widths = []
    for groups in (users, np.arange(1000)):
        [estimate] = estimates(terms, np.ones(1000), rounds.rewards, groups, np.random.default_rng(0))
        assert estimate.bootstrap is not None and estimate.empirical_bernstein is not None
        widths.append([high - low for low, high in (estimate.bootstrap, estimate.empirical_bernstein)])
    assert widths[0][0] / widths[1][0] == pytest.approx(np.sqrt(20), rel=0.1)
    assert widths[0][1] > widths[0][0] and widths[0][1] > 4 * widths[1][1]


def test_an_estimate_is_the_same_for_the_same_seed() -> None:
    rounds, chances = rounds_of(LOGGED, ACTION, REWARD), np.ravel(CHANCES)
    terms = {name: terms_of(name, rounds, chances, np.ravel(MODEL), Settings()) for name in ("ips", "snips", "dr")}
    first, second = (
        estimates(terms, importance(rounds, chances), rounds.rewards, rounds.users, np.random.default_rng(9))
        for _ in range(2)
    )
    assert first == second


def test_a_model_sees_nothing_of_its_own_fold() -> None:
    rounds = rounds_of(LOGGED, ACTION, REWARD)
    model = smoothed_means(rounds, prior=2.0).reshape(4, 3)
    # Fold 0 (rounds 0, 2) learns from rounds 1 and 3: item 1 earned 0 and 1, mean of all .5.
    np.testing.assert_allclose(model[0], [0.5, 0.5, 0.5])
    # Fold 1 learns from rounds 0 and 2: items 0 and 2 earned 1, mean of all 1.
    np.testing.assert_allclose(model[1], [1.0, 1.0, 1.0])
    changed = smoothed_means(replace(rounds, rewards=np.array([0.0, 0.0, 1.0, 1.0])), prior=2.0).reshape(4, 3)
    np.testing.assert_allclose(changed[0], model[0])
    np.testing.assert_allclose(changed[1], [1 / 3, 0.5, 2 / 3])
    with pytest.raises(BadInput, match="2 folds needs as many users or rows, and the log has 1: log more"):
        smoothed_means(replace(rounds, users=np.zeros(4, np.int64)))


def test_what_is_not_valid_is_refused_and_told_what_is() -> None:
    rounds, chances = rounds_of(LOGGED, ACTION, REWARD), np.ravel(CHANCES)
    assert "drew uniformly" in why_not("replay", rounds, chances)
    uniform = rounds_of(np.full((4, 3), 1 / 3), ACTION, REWARD)
    assert "always takes one item" in why_not("replay", uniform, chances)
    never = np.tile([0.0, 0.0, 1.0], 4)
    elsewhere = rounds_of(np.full((4, 3), 1 / 3), [0, 1, 0, 1], REWARD)
    for name in ("snips", "sndr", "replay"):
        assert "never chooses what was shown" in why_not(name, elsewhere, never)
    assert value("ips", elsewhere, never, never) == 0
    unknown = replace(rounds, propensities=np.full(4, np.nan), logged=np.full(12, np.nan))
    for name in set(ESTIMATORS) - {"dm"}:
        with pytest.raises(BadInput, match="only dm, which trusts its model, is valid"):
            value(name, unknown, chances, MODEL)
    assert value("dm", unknown, chances, MODEL) == pytest.approx(0.55)
    with pytest.raises(ValueError, match="clip must be 0 or more"):
        Settings(clip=-1.0)
