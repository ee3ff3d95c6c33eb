"""`recsys evaluate policy` on our own logs, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recsys.events.event_files import write_events
from recsys.types import Feedback, Impression, ShownItem
from services.cli.main import main
from tests.unit.conftest import Run

ITEMS = ("a", "b", "c", "d")
LOGGED = np.array([0.4, 0.3, 0.2, 0.1])
CLICK_RATE = np.array([0.1, 0.2, 0.5, 0.3])
POOL = tuple(zip(ITEMS, LOGGED.tolist(), strict=True))


def answers(num: int = 600, seed: int = 1) -> tuple[list[Impression], list[Feedback]]:
    """The top is fixed, position 2 is drawn, the best of what remains is below; what is clicked is told a minute later."""
    rng = np.random.default_rng(seed)
    impressions, feedback = [], []
    for i in range(num):
        k = int(rng.choice(4, p=LOGGED))
        top = ShownItem(item_id="top", position=1, propensity=1.0, score=9.0, predictions={"click": 0.5})
        drawn = ShownItem(item_id=ITEMS[k], position=2, propensity=float(LOGGED[k]), pool=POOL, score=float(4 - k))
        impressions.append(Impression(request_id=f"r{i}", user_id=f"u{i % 150}", time_ms=i, items=(top, drawn)))
        if rng.random() < CLICK_RATE[k]:
            feedback.append(event(i, ITEMS[k], "click"))
        feedback.append(event(i, "top", "like"))
    return impressions, feedback


def event(i: int, item: str, kind: str) -> Feedback:
    return Feedback(
        event_id=f"{kind}{item}{i}", user_id=f"u{i % 150}", item_id=item, type=kind, time_ms=i, request_id=f"r{i}"
    )


def by_name(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["estimator"]: row for row in result["estimates"]}


def test_own_log_is_evaluated_at_its_drawn_position(evaluate: Run) -> None:
    log = answers()
    code, result, _ = evaluate(log, 'policy = "fixed"\nprobabilities = { a = 0.1, b = 0.1, c = 0.2, d = 0.6 }')
    assert code == 0 and result["warnings"] == []
    assert result["log"] | {"mean_reward": 0} == {
        "rounds": 600,
        "position": 2,
        "mean_reward": 0,
        "users": 150,
        "left_out": {},
    }
    truth = float(np.array([0.1, 0.1, 0.2, 0.6]) @ CLICK_RATE)
    found = by_name(result)
    assert set(found) == {"ips", "snips", "dm", "dr", "sndr", "switch_dr", "dr_os"} and set(result["refused"]) == {
        "replay"
    }
    for name in ("ips", "snips", "dr", "sndr"):
        low, high = found[name]["bootstrap"]
        assert low < truth < high and high - low < 0.25
    assert found["ips"]["empirical_bernstein"][0] < found["ips"]["bootstrap"][0]
    assert 0.5 < result["weights"]["mean"] < 1.5 and result["weights"]["max"] == pytest.approx(6.0)
    assert result["weights"]["effective_sample_size"] == pytest.approx(found["ips"]["effective_sample_size"])


def test_the_logs_own_policy_earns_the_logged_mean(evaluate: Run) -> None:
    log = answers()
    code, result, _ = evaluate(log, 'policy = "logged"', "--estimators", "ips,snips", "--reward", "click,buy")
    assert code == 0
    for row in result["estimates"]:
        assert row["value"] == pytest.approx(result["log"]["mean_reward"])
        assert [row["gain"], *row["gain_bootstrap"]] == pytest.approx([0, 0, 0], abs=1e-12), "the same resamples"
    # What is not a reward earns nothing, what pays is chosen by --reward.
    assert (
        evaluate(log, 'policy = "logged"', "--estimators", "ips", "--reward", "like")[1]["estimates"][0]["value"] == 0
    )


def test_greedy_takes_the_most_probable_and_softmax_flattens(evaluate: Run) -> None:
    log = answers()
    shown = np.array([ITEMS.index(i.items[1].item_id) for i in log[0]])
    clicked = np.array([any(f.request_id == i.request_id and f.type == "click" for f in log[1]) for i in log[0]])
    _, greedy, _ = evaluate(log, 'policy = "greedy"', "--estimators", "ips")
    assert greedy["estimates"][0]["value"] == pytest.approx(((shown == 0) * clicked / 0.4).mean())
    _, flat, _ = evaluate(log, 'policy = "softmax"\ntemperature = 1e9', "--estimators", "ips")
    _, uniform, _ = evaluate(log, 'policy = "uniform"', "--estimators", "ips")
    assert flat["estimates"][0]["value"] == pytest.approx(uniform["estimates"][0]["value"], rel=1e-6)
    assert uniform["estimates"][0]["value"] == pytest.approx((0.25 / LOGGED[shown] * clicked).mean())
    _, mixed, _ = evaluate(log, 'policy = "epsilon_greedy"\nepsilon = 0.5', "--estimators", "ips")
    mean = (greedy["estimates"][0]["value"] + uniform["estimates"][0]["value"]) / 2
    assert mixed["estimates"][0]["value"] == pytest.approx(mean)


def test_replay_is_run_where_the_log_drew_uniformly(evaluate: Run) -> None:
    impressions, feedback = answers()
    pool = tuple((item, 0.25) for item in ITEMS)
    even = [
        replace(i, items=(i.items[0], replace(i.items[1], pool=pool, propensity=0.25))) for i in impressions
    ]  # the arithmetic is the same, whatever the true draw was
    code, result, _ = evaluate((even, feedback), 'policy = "greedy"')
    assert code == 0 and not result["refused"]
    clicked = {f.request_id for f in feedback if f.type == "click"}
    matched = [i.request_id in clicked for i in impressions if i.items[1].item_id == "a"]
    assert by_name(result)["replay"]["value"] == pytest.approx(np.mean(matched))
    assert by_name(result)["replay"]["effective_sample_size"] == len(matched)


def test_what_a_log_does_not_tell_is_left_out_and_counted(evaluate: Run) -> None:
    impressions, feedback = answers(100)
    top, drawn = impressions[0].items
    impressions[0] = replace(impressions[0], items=(top,))
    impressions[1] = replace(impressions[1], items=(top, replace(drawn, propensity=1.0, pool=None)))
    impressions[2] = replace(impressions[2], activation="deferred")
    impressions[3] = replace(impressions[3], activation="deferred")
    feedback += [event(3, impressions[3].items[1].item_id, "view"), replace(event(4, "a", "click"), request_id=None)]
    feedback.sort(key=lambda f: f.time_ms)
    code, result, _ = evaluate((impressions, feedback), 'policy = "uniform"')
    assert code == 0 and result["log"]["rounds"] == 97
    assert result["log"]["left_out"] == {"too_short": 1, "not_drawn": 1, "not_viewed": 1, "feedback_without_request": 1}


def test_a_request_logged_twice_is_one_round(evaluate: Run) -> None:
    impressions, feedback = answers(100)
    once = evaluate((impressions, feedback), 'policy = "greedy"')[1]
    again = evaluate(([i for i in impressions for _ in range(2)], feedback), 'policy = "greedy"')[1]
    assert again["log"].pop("left_out") == {"duplicate": 100}
    assert once["log"].pop("left_out") == {}
    assert again == once


def test_feedback_that_no_log_has_is_warned_of(evaluate: Run) -> None:
    log, drawn = answers(50), 'policy = "uniform"'
    code, result, err = evaluate(log, drawn, "--reward", "click, clik")
    warning = "no feedback is of type 'clik': check --reward; the log's types: click, like"
    assert code == 0 and result["warnings"] == [warning] and err == f"recsys: warning: {warning}\n"
    _, result, _ = evaluate(log, drawn, "--reward", "like")
    assert result["warnings"] == ["nothing is rewarded: check --reward; the log's types: click, like"]
    assert "the log's types: none" in evaluate((slates(20)[0], []), drawn, "--estimators", "slates")[1]["warnings"][0]
    for empty in ("", "click,"):
        code, _, err = evaluate(log, drawn, "--reward", empty)
        assert code == 2 and f"--reward {empty!r} must be feedback types" in err
    _, result, _ = evaluate(log, 'policy = "fixed"\nprobabilities = { a = 1, zz = 1 }')
    assert result["warnings"] == ["`probabilities` has 1 items that are in no pool, such as 'zz'"]


def test_answers_that_nobody_viewed_are_said_to_be_so(evaluate: Run) -> None:
    deferred = [replace(i, activation="deferred") for i in answers(20)[0]]
    code, _, err = evaluate((deferred, []), 'policy = "uniform"', "--position", "2")
    assert code == 2 and "position 2 was viewed in none of 20 deferred answers that have it: log feedback" in err


def test_one_user_has_an_estimate_but_no_interval_and_no_model(evaluate: Run) -> None:
    for (impressions, feedback), options in ((answers(20), ("ips,snips",)), (slates(20), ("slate_ips",))):
        log = ([replace(i, user_id="u") for i in impressions], feedback)
        code, result, _ = evaluate(log, 'policy = "uniform"', "--estimators", *options)
        assert code == 0
        assert all(
            row["value"] > 0 and row["bootstrap"] is row["gain_bootstrap"] is None for row in result["estimates"]
        )
    for options in (("cascade_dr",), ("dm", "--position", "1")):
        code, _, err = evaluate(log, 'policy = "uniform"', "--estimators", *options)
        assert code == 2 and "a model of 2 folds needs as many users or rows, and the log has 1: log more, or" in err


def test_numbers_at_the_end_of_floats_give_no_nan(evaluate: Run) -> None:
    log = answers(50)
    greedy = by_name(evaluate(log, 'policy = "greedy"')[1])
    cold = by_name(evaluate(log, 'policy = "softmax"\ntemperature = 1e-310', "--shrink", "1e308")[1])
    assert {name: row["value"] for name, row in cold.items() if name != "dr_os"} == pytest.approx(
        {name: row["value"] for name, row in greedy.items() if name not in ("dr_os", "replay")}
    )
    assert cold["dr_os"]["value"] == pytest.approx(cold["dr"]["value"])
    pool = (("a", 1.0), ("b", 1e-300))
    tiny = [replace(i, items=(replace(i.items[1], item_id="a", pool=pool, propensity=1.0),)) for i in log[0]]
    code, _, err = evaluate((tiny, log[1]), 'policy = "uniform"')
    assert code == 2 and "request 'r0', position 2: the pool has probability 1e-300: must be from 1e-12 to 1" in err


def test_feedback_counts_within_its_window_and_open_windows_are_left_out(evaluate: Run) -> None:
    impressions, _ = answers(100)
    soon, late = (
        event(10, impressions[10].items[1].item_id, "click"),
        event(20, impressions[20].items[1].item_id, "click"),
    )
    feedback = [replace(soon, time_ms=20), replace(late, time_ms=31)]  # 10 and 11 ms after; the log ends at 99 ms
    code, result, _ = evaluate((impressions, feedback), 'policy = "logged"', "--window", "0.01")
    assert code == 0 and result["log"]["rounds"] == 90 and result["log"]["mean_reward"] == pytest.approx(1 / 90)
    assert result["log"]["left_out"] == {"feedback_after_window": 1, "window_open": 10}
    code, _, err = evaluate((impressions, feedback), 'policy = "logged"', "--window", "1")
    assert code == 2 and "no impression whose window of 1 s is over" in err


def test_a_position_that_took_the_best_is_refused_and_dm_alone_is_valid(evaluate: Run) -> None:
    log = answers()
    code, result, err = evaluate(log, 'policy = "uniform"', "--position", "1")
    assert code == 2 and result["ok"] is False and result["why"] in err
    assert "request 'r0', position 1 was not drawn: it took the best (propensity 1)" in err
    assert "dm" in err and "A/B test" in err and "interleaving" in err
    code, result, _ = evaluate(log, 'policy = "greedy"\nby = "score"', "--position", "1", "--estimators", "dm")
    assert code == 0 and result["estimates"][0]["value"] == 0  # nobody clicks the top
    assert result["weights"] == {} and result["estimates"][0]["bias_estimate"] is None
    code, _, err = evaluate(log, 'policy = "uniform"', "--position", "1", "--estimators", "dm,ips")
    assert code == 2 and "was not drawn" in err


def test_a_log_without_propensities_is_refused_naming_what_would_be_valid(evaluate: Run) -> None:
    impressions, feedback = answers(50)
    bare = [replace(i, items=tuple(replace(s, propensity=None, pool=None) for s in i.items)) for i in impressions]
    code, _, err = evaluate((bare, feedback), 'policy = "uniform"')
    assert code == 2 and "no position of the log was drawn: the log has no propensities" in err
    assert "Still valid: dm" in err and "--estimators dm --position N" in err
    assert evaluate((bare, feedback), 'policy = "uniform"', "--estimators", "dm", "--position", "2")[0] == 0
    assert "took the best" not in err
    poolless = [replace(i, items=(replace(i.items[1], pool=None),)) for i in impressions]
    code, _, err = evaluate((poolless, feedback), 'policy = "uniform"')
    assert code == 2 and "without the pool it was drawn from" in err
    for log, why in ((bare, "the log has no propensities"), (poolless, "without the pool it was drawn from")):
        code, _, err = evaluate((log, feedback), 'policy = "uniform"', "--estimators", "slates")
        assert code == 2 and "no position of the log was drawn: " in err and why in err and "Still valid: dm" in err


def slates(num: int = 300) -> tuple[list[Impression], list[Feedback]]:
    rng = np.random.default_rng(0)
    impressions, feedback = [], []
    for i in range(num):
        first, second = (int(n) for n in rng.choice(3, 2, replace=False))
        rest = tuple((ITEMS[n], 0.5) for n in range(3) if n != first)
        items = (
            ShownItem(item_id=ITEMS[first], position=1, propensity=1 / 3, pool=tuple((n, 1 / 3) for n in ITEMS[:3])),
            ShownItem(item_id=ITEMS[second], position=2, propensity=0.5, pool=rest),
        )
        impressions.append(Impression(request_id=f"r{i}", user_id=f"u{i}", time_ms=i, items=items))
        feedback += [event(i, ITEMS[n], "click") for n in (first, second) if rng.random() < CLICK_RATE[n]]
    return impressions, feedback


def test_whole_answers_are_evaluated_where_every_position_was_drawn(evaluate: Run) -> None:
    code, result, _ = evaluate(
        slates(), 'policy = "fixed"\nprobabilities = { c = 2, b = 1, a = 1 }', "--estimators", "slates"
    )
    truth = 0.5 * (0.5 + 0.5 * (0.2 + 0.1)) + 0.25 * (0.2 + (2 * 0.5 + 0.1) / 3) + 0.25 * (0.1 + (2 * 0.5 + 0.2) / 3)
    assert code == 0 and result["log"]["slates"] == 300 and not result["warnings"]
    assert len(result["weights"]["down_to_position"]) == 2
    for row in result["estimates"]:
        low, high = row["bootstrap"]
        assert low < truth < high, row
        assert row["empirical_bernstein"][0] < low
    code, _, err = evaluate(answers(20), 'policy = "uniform"', "--estimators", "cascade_dr")
    assert code == 2 and "request 'r0', position 1 was not drawn (propensity 1.0, no pool)" in err
    assert "one drawn position (--position 2), or dm" in err
    code, _, err = evaluate(slates(20), 'policy = "uniform"')
    assert code == 2 and "positions 1, 2 were drawn: choose one with --position" in err


@pytest.mark.parametrize(
    ("policy", "why"),
    [
        ('policy = "epsilon-greedy"', "policy 'epsilon-greedy' is not known: did you mean 'epsilon_greedy'?"),
        ('policy = "uniform"\nby = "score"', "'by' is not an option of policy 'uniform': it takes nothing else"),
        ('policy = "softmax"\ntemperature = 0', "temperature = 0 must be above 0"),
        ('policy = "softmax"\ntemperature = inf', "temperature = inf must be above 0"),
        ('policy = "epsilon_greedy"\nepsilon = true', "epsilon = True must be from 0 to 1"),
        ('policy = "fixed"', "needs a table [probabilities]"),
        ('policy = "fixed"\nprobabilities = { a = -1 }', "must be a table of item id"),
        ('policy = "fixed"\nprobabilities = { z = 1 }', "request 'r0': no item of the pool is among `probabilities`"),
        ('policy = "greedy"\nby = "scor"', "by = 'scor' is not in this log: did you mean 'score'?"),
        ('policy = "greedy"\nby = "score"', "of the pool has no logged score: rank by probability"),
        ("policy = ", "is not TOML"),
        ("x = 1", 'needs policy = "NAME", one of uniform, logged, greedy'),
    ],
)
def test_a_policy_file_that_is_wrong_is_one_clear_line(evaluate: Run, policy: str, why: str) -> None:
    code, result, err = evaluate(answers(20), policy)
    assert code == 2 and why in result["why"] and err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--estimators", "ipw"), "'ipw' is not known: did you mean 'ips'?"),
        (("--estimators", "ips,cascade_ips"), "two runs: name one kind"),
        (("--estimators", "replay"), "replay needs a log that drew uniformly"),
        (("--position", "7"), "no impression shows position 7"),
        (("--confidence", "95"), "--confidence 95.0 must be between 0 and 1"),
        (("--clip", "nan"), "--clip nan must be above 0"),
        (("--switch", "inf"), "--switch inf must be 0 or more"),
        (("--folds", "1"), "--folds 1 must be 2 or more"),
    ],
)
def test_an_option_that_is_wrong_is_named(evaluate: Run, options: tuple[str, ...], why: str) -> None:
    code, result, _ = evaluate(answers(20), 'policy = "uniform"', *options)
    assert code == 2 and why in result["why"]


def test_a_pool_that_is_not_whole_or_contradicts_the_propensity_is_refused(evaluate: Run) -> None:
    [impression], feedback = answers(1)
    top, drawn = impression.items
    half = replace(drawn, pool=tuple((i, p / 2) for i, p in POOL), propensity=None)
    code, _, err = evaluate(([replace(impression, items=(top, half))], feedback), 'policy = "uniform"')
    assert code == 2 and "sum to 0.5: log the whole pool" in err
    code, _, err = evaluate(
        ([replace(impression, items=(top, replace(drawn, propensity=0.9)))], feedback), 'policy = "uniform"'
    )
    assert code == 2 and "propensity 0.9 is not the shown item's" in err and "one draw" in err


def test_wrong_propensities_are_warned_of(evaluate: Run) -> None:
    impressions, feedback = answers()
    pool = tuple(zip(ITEMS, LOGGED[::-1].tolist(), strict=True))
    wrong = [
        replace(i, items=(i.items[0], replace(i.items[1], pool=pool, propensity=dict(pool)[i.items[1].item_id])))
        for i in impressions
    ]
    code, result, _ = evaluate((wrong, feedback), 'policy = "uniform"')
    assert code == 0 and "the weights' mean is" in result["warnings"][0]
    few = ([i for i in impressions if i.items[1].item_id != "d"][:9], feedback)
    code, result, _ = evaluate(few, 'policy = "fixed"\nprobabilities = { d = 1 }')
    assert code == 0 and not result["warnings"], "nine draws without the rarest item are no surprise"


def test_without_json_a_table_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_events(tmp_path / "log", [], *answers(50))
    policy = tmp_path / "policy.json"
    policy.write_text('{"policy": "uniform"}')
    assert main(["evaluate", "policy", "--log", str(tmp_path / "log"), "--policy", str(policy), "--clip", "1.5"]) == 0
    out = capsys.readouterr().out
    assert "switch_dr" in out and "ESS" in out and "either way" in out and "not valid here: replay" in out
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "policy", "--help"])
    assert ended.value.code == 0 and "Example: recsys evaluate policy --log" in capsys.readouterr().out
