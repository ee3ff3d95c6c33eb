"""What the tests of several modules call."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from recsys.events.event_files import write_events
from services.cli.main import main

Run = Callable[..., tuple[int, dict[str, Any], str]]
"""On a log and a policy (TOML text): exit code, JSON, standard error."""


@pytest.fixture
def evaluate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """`recsys evaluate policy`."""

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
