"""Three times what the system answers, over HTTP: the breaker stays closed, feedback is accepted, learning goes on, nothing grows."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.system.embedded import ROOT, environment


@pytest.fixture(scope="module")
def figures() -> dict[str, float | None]:
    command = [sys.executable, "-m", "load_tests.overload", "--items", "500", "--seconds", "5", "--json"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout)
    return {row["name"]: row["value"] for row in result["results"]}


@pytest.mark.system
@pytest.mark.slow
@pytest.mark.alone
def test_overload_stops_neither_feedback_nor_learning_and_leaves_nothing_behind(
    figures: dict[str, float | None],
) -> None:
    found = {name: value for name, value in figures.items() if value is not None}
    assert found["answered_200"] > 0 and found["answered_503"] > 0, "it was too much"
    assert set(found) & {"answered_0", "answered_500"} == set(), "every request was answered or refused"
    assert found["overload_breaker_open"] == 0
    assert found["overload_feedback_refused"] == 0 and found["feedback_accepted"] > 0
    assert found["overload_learned"] >= 0.99
    assert found["overload_recovery"] < 60, "how fast it is normal again is judged on a quiet machine"
    assert found["overload_threads_growth"] <= 4 and found["overload_descriptors_growth"] <= 16
