"""`recsys evaluate policy` on Open Bandit's files, and those it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.conftest import Run


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


def test_open_bandit_files_are_read(evaluate: Run, tmp_path: Path) -> None:
    path = open_bandit(tmp_path / "men.csv")
    code, result, _ = evaluate(path, 'policy = "greedy"\nby = "affinity"')
    assert code == 0 and result["log"]["rounds"] == 60 and not result["refused"]
    assert result["policy"]["by"] == "affinity" and result["settings"]["resamples"] == 1000
    code, result, _ = evaluate(path, 'policy = "uniform"', "--position", "2", "--estimators", "ips")
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
    evaluate: Run, tmp_path: Path, changes: dict[str, Any], why: str
) -> None:
    code, _, err = evaluate(open_bandit(tmp_path / "men.csv", **changes), 'policy = "uniform"')
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
def test_open_bandit_columns_that_are_wrong_are_named(
    evaluate: Run, tmp_path: Path, old: str, new: str, why: str
) -> None:
    path = open_bandit(tmp_path / "men.csv")
    path.write_text(path.read_text().replace(old, new), encoding="latin-1")
    code, _, err = evaluate(path, 'policy = "uniform"')
    assert code == 2 and f"file {str(path)!r}" in err and why in err


def test_open_bandit_files_are_of_one_campaign_and_earn_by_click(evaluate: Run, tmp_path: Path) -> None:
    men, women, policy = open_bandit(tmp_path / "men.csv"), tmp_path / "women.csv", 'policy = "uniform"'
    header, *rows = men.read_text().splitlines()
    women.write_text("\n".join([f"{header},user-item_affinity_2", *(f"{row},0.0" for row in rows)]) + "\n")
    code, _, err = evaluate(men, policy, "--log", str(men), str(women))
    assert code == 2 and f"file {str(women)!r} has 3 columns user-item_affinity_*" in err and "one campaign" in err
    assert f"file {str(men)!r} is given twice" in evaluate(men, policy, "--log", str(men), str(men))[2]
    assert "earn by click alone: leave out --reward and --window" in evaluate(men, policy, "--window", "3")[2]
    men.write_text("\n".join([header, *(row for row in rows if row.split(",")[4] == "0")]) + "\n")
    assert evaluate(men, policy)[1]["warnings"] == ["nothing is rewarded: no row has a click"]


def test_open_bandit_file_without_propensities_is_refused(evaluate: Run, tmp_path: Path) -> None:
    path = open_bandit(tmp_path / "men.csv")
    path.write_text(path.read_text().replace("propensity_score", "other"))
    code, _, err = evaluate(path, 'policy = "uniform"')
    assert code == 2 and "column 'propensity_score' is missing: without propensities only dm" in err
    path.write_text(path.read_text().splitlines()[0] + "\n")
    assert "has no rows" in evaluate(path, 'policy = "uniform"')[2]
    path.write_text("")
    assert "is not a CSV file" in evaluate(path, 'policy = "uniform"')[2]
    assert "cannot be read" in evaluate(tmp_path / "none.csv", 'policy = "uniform"')[2]
    code, _, err = evaluate(open_bandit(path), 'policy = "uniform"', "--estimators", "slates")
    assert code == 2 and "do not say which were one answer" in err
