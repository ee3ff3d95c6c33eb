"""Twenty kills at random over both modes; the long runs are `python -m tests.system.chaos`."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.system.chaos import EACH_WITHIN, HOW, SERVERS, SERVICES, schedule
from tests.system.embedded import ROOT, environment

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.alone]


@pytest.mark.parametrize("mode", ["embedded", "kafka"])
def test_ten_kills_lose_nothing_and_health_is_true(mode: str) -> None:
    command = [
        sys.executable,
        "-m",
        "tests.system.chaos",
        "--mode",
        mode,
        "--kills",
        "10",
        "--seed",
        "5",
        "--longest-freeze",
        "5",
    ]
    done = subprocess.run(
        [*command, "--json"], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert (result["kills"], result["lost"], result["twice"], result["untrue_health"]) == (10, 0, 0, 0)
    assert result["closes"] and result["equal"] and result["accepted"] > 200


def test_every_process_is_reached_once_in_ten_by_every_way() -> None:
    for mode, targets in (("embedded", SERVICES), ("kafka", SERVICES + SERVERS)):
        plan = schedule(mode, 200, 3)
        assert plan == schedule(mode, 200, 3)
        for start in range(0, 200, EACH_WITHIN):
            assert {target for target, _, _ in plan[start : start + EACH_WITHIN]} == set(targets)
        assert {(target, how) for target, how, _ in plan} == {(target, how) for target in targets for how in HOW}
