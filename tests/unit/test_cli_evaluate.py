"""`recsys evaluate policy` on files: Open Bandit's, ours, and those it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recsys.events.files import write_events
from recsys.types import Feedback, Impression, ShownItem
from services.cli.main import main

ITEMS = ("a", "b", "c", "d")
LOGGED = np.array([0.4, 0.3, 0.2, 0.1])
CLICK_RATE = np.array([0.1, 0.2, 0.5, 0.3])
POOL = tuple(zip(ITEMS, LOGGED.tolist(), strict=True))

Run = Callable[..., tuple[int, dict[str, Any], str]]


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


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs on a log and a policy (TOML text): exit code, JSON, standard error."""

    def go(log: Sequence[Any] | Path, policy: str, *options: str) -> tuple[int, dict[str, Any], str]:
        (tmp_path / "policy.toml").write_text(policy)
        if not isinstance(log, Path):
            write_events(tmp_path / "log", [], *log)
            log = tmp_path / "log"
        words = ["evaluate", "policy", "--log", str(log), "--policy", str(tmp_path / "policy.toml"), "--json", *options]
        code = main(words)
        out = capsys.readouterr()
        return code, json.loads(out.out), out.err

    return go


def by_name(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["estimator"]: row for row in result["estimates"]}


def test_own_log_is_evaluated_at_its_drawn_position(run: Run) -> None:
    log = answers()
    code, result, _ = run(log, 'policy = "fixed"\nprobabilities = { a = 0.1, b = 0.1, c = 0.2, d = 0.6 }')
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


def test_the_logs_own_policy_earns_the_logged_mean(run: Run) -> None:
    log = answers()
    code, result, _ = run(log, 'policy = "logged"', "--estimators", "ips,snips", "--reward", "click,buy")
    assert code == 0
    for row in result["estimates"]:
        assert row["value"] == pytest.approx(result["log"]["mean_reward"])
        assert [row["gain"], *row["gain_bootstrap"]] == pytest.approx([0, 0, 0], abs=1e-12), "the same resamples"
    # What is not a reward earns nothing, what pays is chosen by --reward.
    assert run(log, 'policy = "logged"', "--estimators", "ips", "--reward", "like")[1]["estimates"][0]["value"] == 0


def test_greedy_takes_the_most_probable_and_softmax_flattens(run: Run) -> None:
    log = answers()
    shown = np.array([ITEMS.index(i.items[1].item_id) for i in log[0]])
    clicked = np.array([any(f.request_id == i.request_id and f.type == "click" for f in log[1]) for i in log[0]])
    _, greedy, _ = run(log, 'policy = "greedy"', "--estimators", "ips")
    assert greedy["estimates"][0]["value"] == pytest.approx(((shown == 0) * clicked / 0.4).mean())
    _, flat, _ = run(log, 'policy = "softmax"\ntemperature = 1e9', "--estimators", "ips")
    _, uniform, _ = run(log, 'policy = "uniform"', "--estimators", "ips")
    assert flat["estimates"][0]["value"] == pytest.approx(uniform["estimates"][0]["value"], rel=1e-6)
    assert uniform["estimates"][0]["value"] == pytest.approx((0.25 / LOGGED[shown] * clicked).mean())
    _, mixed, _ = run(log, 'policy = "epsilon_greedy"\nepsilon = 0.5', "--estimators", "ips")
    mean = (greedy["estimates"][0]["value"] + uniform["estimates"][0]["value"]) / 2
    assert mixed["estimates"][0]["value"] == pytest.approx(mean)


def test_replay_is_run_where_the_log_drew_uniformly(run: Run) -> None:
    impressions, feedback = answers()
    pool = tuple((item, 0.25) for item in ITEMS)
    even = [
        replace(i, items=(i.items[0], replace(i.items[1], pool=pool, propensity=0.25))) for i in impressions
    ]  # the arithmetic is the same, whatever the true draw was
    code, result, _ = run((even, feedback), 'policy = "greedy"')
    assert code == 0 and not result["refused"]
    clicked = {f.request_id for f in feedback if f.type == "click"}
    matched = [i.request_id in clicked for i in impressions if i.items[1].item_id == "a"]
    assert by_name(result)["replay"]["value"] == pytest.approx(np.mean(matched))
    assert by_name(result)["replay"]["effective_sample_size"] == len(matched)


def test_what_a_log_does_not_tell_is_left_out_and_counted(run: Run) -> None:
    impressions, feedback = answers(100)
    top, drawn = impressions[0].items
    impressions[0] = replace(impressions[0], items=(top,))
    impressions[1] = replace(impressions[1], items=(top, replace(drawn, propensity=1.0, pool=None)))
    impressions[2] = replace(impressions[2], activation="deferred")
    impressions[3] = replace(impressions[3], activation="deferred")
    feedback += [event(3, impressions[3].items[1].item_id, "view"), replace(event(4, "a", "click"), request_id=None)]
    feedback.sort(key=lambda f: f.time_ms)
    code, result, _ = run((impressions, feedback), 'policy = "uniform"')
    assert code == 0 and result["log"]["rounds"] == 97
    assert result["log"]["left_out"] == {"too_short": 1, "not_drawn": 1, "not_viewed": 1, "feedback_without_request": 1}


def test_a_request_logged_twice_is_one_round(run: Run) -> None:
    impressions, feedback = answers(100)
    once = run((impressions, feedback), 'policy = "greedy"')[1]
    again = run(([i for i in impressions for _ in range(2)], feedback), 'policy = "greedy"')[1]
    assert again["log"].pop("left_out") == {"duplicate": 100}
    assert once["log"].pop("left_out") == {}
    assert again == once


def test_feedback_that_no_log_has_is_warned_of(run: Run) -> None:
    log, drawn = answers(50), 'policy = "uniform"'
    code, result, err = run(log, drawn, "--reward", "click, clik")
    warning = "no feedback is of type 'clik': check --reward; the log's types: click, like"
    assert code == 0 and result["warnings"] == [warning] and err == f"recsys: warning: {warning}\n"
    _, result, _ = run(log, drawn, "--reward", "like")
    assert result["warnings"] == ["nothing is rewarded: check --reward; the log's types: click, like"]
    assert "the log's types: none" in run((slates(20)[0], []), drawn, "--estimators", "slates")[1]["warnings"][0]
    for empty in ("", "click,"):
        code, _, err = run(log, drawn, "--reward", empty)
        assert code == 2 and f"--reward {empty!r} must be feedback types" in err
    _, result, _ = run(log, 'policy = "fixed"\nprobabilities = { a = 1, zz = 1 }')
    assert result["warnings"] == ["`probabilities` has 1 items that are in no pool, such as 'zz'"]


def test_answers_that_nobody_viewed_are_said_to_be_so(run: Run) -> None:
    deferred = [replace(i, activation="deferred") for i in answers(20)[0]]
    code, _, err = run((deferred, []), 'policy = "uniform"', "--position", "2")
    assert code == 2 and "position 2 was viewed in none of 20 deferred answers that have it: log feedback" in err


def test_one_user_has_an_estimate_but_no_interval_and_no_model(run: Run) -> None:
    for (impressions, feedback), options in ((answers(20), ("ips,snips",)), (slates(20), ("slate_ips",))):
        log = ([replace(i, user_id="u") for i in impressions], feedback)
        code, result, _ = run(log, 'policy = "uniform"', "--estimators", *options)
        assert code == 0
        assert all(
            row["value"] > 0 and row["bootstrap"] is row["gain_bootstrap"] is None for row in result["estimates"]
        )
    for options in (("cascade_dr",), ("dm", "--position", "1")):
        code, _, err = run(log, 'policy = "uniform"', "--estimators", *options)
        assert code == 2 and "a model of 2 folds needs as many users or rows, and the log has 1: log more, or" in err


def test_numbers_at_the_end_of_floats_give_no_nan(run: Run) -> None:
    log = answers(50)
    greedy = by_name(run(log, 'policy = "greedy"')[1])
    cold = by_name(run(log, 'policy = "softmax"\ntemperature = 1e-310', "--shrink", "1e308")[1])
    assert {name: row["value"] for name, row in cold.items() if name != "dr_os"} == pytest.approx(
        {name: row["value"] for name, row in greedy.items() if name not in ("dr_os", "replay")}
    )
    assert cold["dr_os"]["value"] == pytest.approx(cold["dr"]["value"])
    pool = (("a", 1.0), ("b", 1e-300))
    tiny = [replace(i, items=(replace(i.items[1], item_id="a", pool=pool, propensity=1.0),)) for i in log[0]]
    code, _, err = run((tiny, log[1]), 'policy = "uniform"')
    assert code == 2 and "request 'r0', position 2: the pool has probability 1e-300: must be from 1e-12 to 1" in err


def test_feedback_counts_within_its_window_and_open_windows_are_left_out(run: Run) -> None:
    impressions, _ = answers(100)
    soon, late = (
        event(10, impressions[10].items[1].item_id, "click"),
        event(20, impressions[20].items[1].item_id, "click"),
    )
    feedback = [replace(soon, time_ms=20), replace(late, time_ms=31)]  # 10 and 11 ms after; the log ends at 99 ms
    code, result, _ = run((impressions, feedback), 'policy = "logged"', "--window", "0.01")
    assert code == 0 and result["log"]["rounds"] == 90 and result["log"]["mean_reward"] == pytest.approx(1 / 90)
    assert result["log"]["left_out"] == {"feedback_after_window": 1, "window_open": 10}
    code, _, err = run((impressions, feedback), 'policy = "logged"', "--window", "1")
    assert code == 2 and "no impression whose window of 1 s is over" in err


def test_a_position_that_took_the_best_is_refused_and_dm_alone_is_valid(run: Run) -> None:
    log = answers()
    code, result, err = run(log, 'policy = "uniform"', "--position", "1")
    assert code == 2 and result["ok"] is False and result["why"] in err
    assert "request 'r0', position 1 was not drawn: it took the best (propensity 1)" in err
    assert "dm" in err and "A/B test" in err and "interleaving" in err
    code, result, _ = run(log, 'policy = "greedy"\nby = "score"', "--position", "1", "--estimators", "dm")
    assert code == 0 and result["estimates"][0]["value"] == 0  # nobody clicks the top
    assert result["weights"] == {} and result["estimates"][0]["bias_estimate"] is None
    code, _, err = run(log, 'policy = "uniform"', "--position", "1", "--estimators", "dm,ips")
    assert code == 2 and "was not drawn" in err


def test_a_log_without_propensities_is_refused_naming_what_would_be_valid(run: Run) -> None:
    impressions, feedback = answers(50)
    bare = [replace(i, items=tuple(replace(s, propensity=None, pool=None) for s in i.items)) for i in impressions]
    code, _, err = run((bare, feedback), 'policy = "uniform"')
    assert code == 2 and "no position of the log was drawn: the log has no propensities" in err
    assert "Still valid: dm" in err and "--estimators dm --position N" in err
    assert run((bare, feedback), 'policy = "uniform"', "--estimators", "dm", "--position", "2")[0] == 0
    assert "took the best" not in err
    poolless = [replace(i, items=(replace(i.items[1], pool=None),)) for i in impressions]
    code, _, err = run((poolless, feedback), 'policy = "uniform"')
    assert code == 2 and "without the pool it was drawn from" in err
    for log, why in ((bare, "the log has no propensities"), (poolless, "without the pool it was drawn from")):
        code, _, err = run((log, feedback), 'policy = "uniform"', "--estimators", "slates")
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


def test_whole_answers_are_evaluated_where_every_position_was_drawn(run: Run) -> None:
    code, result, _ = run(
        slates(), 'policy = "fixed"\nprobabilities = { c = 2, b = 1, a = 1 }', "--estimators", "slates"
    )
    truth = 0.5 * (0.5 + 0.5 * (0.2 + 0.1)) + 0.25 * (0.2 + (2 * 0.5 + 0.1) / 3) + 0.25 * (0.1 + (2 * 0.5 + 0.2) / 3)
    assert code == 0 and result["log"]["slates"] == 300 and not result["warnings"]
    assert len(result["weights"]["down_to_position"]) == 2
    for row in result["estimates"]:
        low, high = row["bootstrap"]
        assert low < truth < high, row
        assert row["empirical_bernstein"][0] < low
    code, _, err = run(answers(20), 'policy = "uniform"', "--estimators", "cascade_dr")
    assert code == 2 and "request 'r0', position 1 was not drawn (propensity 1.0, no pool)" in err
    assert "one drawn position (--position 2), or dm" in err
    code, _, err = run(slates(20), 'policy = "uniform"')
    assert code == 2 and "positions 1, 2 were drawn: choose one with --position" in err


def open_bandit(path: Path, **changes: Any) -> Path:
    rng = np.random.default_rng(0)
    lines = [",timestamp,item_id,position,click,propensity_score,user-item_affinity_0,user-item_affinity_1"]
    for n in range(60):
        row = {"item_id": n % 2, "position": n % 3 + 1, "click": int(rng.random() < 0.3), "propensity_score": 0.5} | (
            changes if n == 7 else {}
        )
        lines.append(f"{n},2019-11-24 00:01:03+00:00,{','.join(map(str, row.values()))},0.0,{n % 5}.0")
    path.write_text("\n".join(lines) + "\n")
    return path


def test_open_bandit_files_are_read(run: Run, tmp_path: Path) -> None:
    path = open_bandit(tmp_path / "men.csv")
    code, result, _ = run(path, 'policy = "greedy"\nby = "affinity"')
    assert code == 0 and result["log"]["rounds"] == 60 and not result["refused"]
    assert result["policy"]["by"] == "affinity" and result["settings"]["resamples"] == 1000
    code, result, _ = run(path, 'policy = "uniform"', "--position", "2", "--estimators", "ips")
    assert result["log"]["rounds"] == 20 and result["log"]["left_out"] == {"other_positions": 40}
    assert result["estimates"][0]["value"] == pytest.approx(result["log"]["mean_reward"])


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"propensity_score": 0}, "row 8: propensity_score = 0 must be from 1e-12 to 1"),
        ({"propensity_score": "nan"}, "row 8: propensity_score = nan must be"),
        ({"propensity_score": "x"}, "column 'propensity_score' is string: must be numbers"),
        ({"item_id": 2}, "row 8: item_id = 2 must be a whole number from 0 to 1"),
        ({"item_id": 0.5}, "row 8: item_id = 0.5 must be a whole number from 0 to 1"),
        ({"position": "nan"}, "row 8: position = nan must be a whole number from 0"),
        ({"click": ""}, "row 8: click = nan must be"),
    ],
)
def test_open_bandit_files_that_are_wrong_are_refused(
    run: Run, tmp_path: Path, changes: dict[str, Any], why: str
) -> None:
    code, _, err = run(open_bandit(tmp_path / "men.csv", **changes), 'policy = "uniform"')
    assert code == 2 and why in err


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("affinity_1", "affinity_x", "column 'user-item_affinity_x' must end in a number from 0 to 1"),
        ("affinity_1", "affinity_5", "column 'user-item_affinity_5' must end in a number from 0 to 1"),
        ("affinity_1", "affinity_0", "column 'user-item_affinity_0' is there 2 times: keep one"),
        ("timestamp", "item_id", "column 'item_id' is there 2 times: keep one"),
        ("timestamp", "\N{LATIN SMALL LETTER E WITH ACUTE}", "is not a CSV file ('utf-8' codec can't decode"),
    ],
)
def test_open_bandit_columns_that_are_wrong_are_named(run: Run, tmp_path: Path, old: str, new: str, why: str) -> None:
    path = open_bandit(tmp_path / "men.csv")
    path.write_text(path.read_text().replace(old, new), encoding="latin-1")
    code, _, err = run(path, 'policy = "uniform"')
    assert code == 2 and f"file {str(path)!r}" in err and why in err


def test_open_bandit_files_are_of_one_campaign_and_earn_by_click(run: Run, tmp_path: Path) -> None:
    men, women, policy = open_bandit(tmp_path / "men.csv"), tmp_path / "women.csv", 'policy = "uniform"'
    header, *rows = men.read_text().splitlines()
    women.write_text("\n".join([f"{header},user-item_affinity_2", *(f"{row},0.0" for row in rows)]) + "\n")
    code, _, err = run(men, policy, "--log", str(men), str(women))
    assert code == 2 and f"file {str(women)!r} has 3 columns user-item_affinity_*" in err and "one campaign" in err
    assert f"file {str(men)!r} is given twice" in run(men, policy, "--log", str(men), str(men))[2]
    assert "earn by click alone: leave out --reward and --window" in run(men, policy, "--window", "3")[2]
    men.write_text("\n".join([header, *(row for row in rows if row.split(",")[4] == "0")]) + "\n")
    assert run(men, policy)[1]["warnings"] == ["nothing is rewarded: no row has a click"]


def test_open_bandit_file_without_propensities_is_refused(run: Run, tmp_path: Path) -> None:
    path = open_bandit(tmp_path / "men.csv")
    path.write_text(path.read_text().replace("propensity_score", "other"))
    code, _, err = run(path, 'policy = "uniform"')
    assert code == 2 and "column 'propensity_score' is missing: without propensities only dm" in err
    path.write_text(path.read_text().splitlines()[0] + "\n")
    assert "has no rows" in run(path, 'policy = "uniform"')[2]
    path.write_text("")
    assert "is not a CSV file" in run(path, 'policy = "uniform"')[2]
    assert "cannot be read" in run(tmp_path / "none.csv", 'policy = "uniform"')[2]
    code, _, err = run(open_bandit(path), 'policy = "uniform"', "--estimators", "slates")
    assert code == 2 and "do not say which were one answer" in err


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
def test_a_policy_file_that_is_wrong_is_one_clear_line(run: Run, policy: str, why: str) -> None:
    code, result, err = run(answers(20), policy)
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
def test_an_option_that_is_wrong_is_named(run: Run, options: tuple[str, ...], why: str) -> None:
    code, result, _ = run(answers(20), 'policy = "uniform"', *options)
    assert code == 2 and why in result["why"]


def test_a_pool_that_is_not_whole_or_contradicts_the_propensity_is_refused(run: Run) -> None:
    [impression], feedback = answers(1)
    top, drawn = impression.items
    half = replace(drawn, pool=tuple((i, p / 2) for i, p in POOL), propensity=None)
    code, _, err = run(([replace(impression, items=(top, half))], feedback), 'policy = "uniform"')
    assert code == 2 and "sum to 0.5: log the whole pool" in err
    code, _, err = run(
        ([replace(impression, items=(top, replace(drawn, propensity=0.9)))], feedback), 'policy = "uniform"'
    )
    assert code == 2 and "propensity 0.9 is not the shown item's" in err and "one draw" in err


def test_wrong_propensities_are_warned_of(run: Run) -> None:
    impressions, feedback = answers()
    pool = tuple(zip(ITEMS, LOGGED[::-1].tolist(), strict=True))
    wrong = [
        replace(i, items=(i.items[0], replace(i.items[1], pool=pool, propensity=dict(pool)[i.items[1].item_id])))
        for i in impressions
    ]
    code, result, _ = run((wrong, feedback), 'policy = "uniform"')
    assert code == 0 and "the weights' mean is" in result["warnings"][0]
    few = ([i for i in impressions if i.items[1].item_id != "d"][:9], feedback)
    code, result, _ = run(few, 'policy = "fixed"\nprobabilities = { d = 1 }')
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
