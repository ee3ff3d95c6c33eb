"""Three days of the generated site through the whole system in one process: a restart a day, one of them a kill, nothing lost."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from load_tests.common import read_budgets
from tests.system.embedded import ROOT, environment

LOST = ("month_steps_lost", "month_labels_lost", "month_restarts_failed", "events_refused", "dead_letters", "degraded")


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    command = [sys.executable, "-m", "load_tests.month", "--days", "3", "--scale", "0.05", "--once", "--json"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.system
@pytest.mark.slow
def test_three_days_lose_no_step_no_label_and_no_restart(result: dict[str, Any]) -> None:
    rows = {row["name"]: row["value"] for row in result["results"]}
    assert {name: rows[name] for name in LOST} == dict.fromkeys(LOST, 0)
    assert rows["requests"] > 50 and rows["events"] > 1000 and rows["labels"] > 2000


@pytest.mark.system
@pytest.mark.slow
def test_every_figure_of_a_month_is_reported(result: dict[str, Any]) -> None:
    assert set(read_budgets()["month"]) <= {row["name"] for row in result["results"]}
