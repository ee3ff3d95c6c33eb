"""What the README tells a newcomer to paste, pasted."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from load_tests.common import services

pytestmark = pytest.mark.system
README = (Path(__file__).parents[2] / "README.md").read_text()


def test_the_demo_exits_well_and_tells_what_changed() -> None:
    command = [sys.executable, "-m", "services.cli.main", "demo", "--exit", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    result = json.loads(done.stdout)
    assert done.returncode == 0, done.stderr[-2000:]
    assert result["ok"]
    assert result["delay_ms"] > 0
    assert [user["kind"] for user in result["users"]] == ["new", "old"]
    for user in result["users"]:
        assert user["after"] - user["before"] >= 3
        assert abs(user["control_after"] - user["control_before"]) <= 1


def test_the_curl_lines_of_use_it_work() -> None:
    lines = [line for line in re.findall(r"^curl .*$", README, re.M) if "localhost:8000" in line]
    assert len(lines) == 3
    with services() as running:
        running.wait_ready()
        answers = []
        for line in lines:
            address = running.url("ranking").removeprefix("http://")
            done = subprocess.run(
                ["bash", "-c", line.replace("localhost:8000", address)],
                capture_output=True,
                text=True,
                timeout=30,
                check=True,
            )
            answers.append(json.loads(done.stdout))
        assert [o["status"] for o in answers[0]["outcomes"]] == ["accepted", "accepted"]
        assert [o["status"] for o in answers[1]["outcomes"]] == ["accepted"]
        assert "items" in answers[2]
