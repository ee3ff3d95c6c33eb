"""`recsys experiment run`: what is done, what is left, and what is refused before anything runs."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path

import pytest

from recsys.events.files import write_events
from recsys.types import Feedback, Item
from services.cli.main import BAD, DONE, main

CONFIG = """
[catalogue]
attributes = []
multivalued = []
[features]
history_attributes = []
crosses = []
[training]
two_tower = false
[retrieval.sources]
trending = 10
[ranking]
scorer = "sources"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    clicks = [
        Feedback(event_id=f"{n}", user_id="u", item_id=f"i{n % 3}", type="click", time_ms=n * 1000, session_id="s")
        for n in range(6)
    ]
    write_events(tmp_path / "events", [Item(item_id=f"i{n}") for n in range(3)], [], clicks)
    (tmp_path / "config.toml").write_text(CONFIG)
    return tmp_path


def listed(folder: Path, *runs: str) -> str:
    path = folder / "runs.toml"
    path.write_text("".join(f'[[run]]\nconfig = "config.toml"\nevents = "events"\n{run}\n' for run in runs))
    return str(path)


def test_runs_are_done_once_with_their_options_and_settings(folder: Path) -> None:
    path = listed(
        folder,
        'name = "all"\nseed = 3',
        'name = "late"\nreport-from = "1970-01-01T00:00:04Z"\nset.retrieval.covisit_window = 1',
    )
    assert main(["experiment", "run", path, "--foreground"]) == DONE
    results = {name: json.loads((folder / "results" / f"{name}.json").read_text()) for name in ("all", "late")}
    assert [results[name]["next_item"]["predictions"] for name in ("all", "late")] == [5, 2]
    assert results["late"]["set"] == ["RECSYS_RETRIEVAL__COVISIT_WINDOW=1"]
    written = (folder / "results" / "all.json").stat().st_mtime_ns
    (folder / "results" / "late.json").unlink()
    assert main(["experiment", "run", path, "--foreground"]) == DONE
    assert (folder / "results" / "late.json").exists()
    assert (folder / "results" / "all.json").stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("run", "problem"),
    [
        ('name = "a"\nsampel = 1', "run 'a'"),
        ('name = "a/b"', "names a file"),
        ('name = "a"\nset.model.dimm = 3', "model.dim"),
        ("seed = 1", "no 'name'"),
    ],
)
def test_what_would_fail_later_is_refused_at_once(
    folder: Path, run: str, problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["experiment", "run", listed(folder, 'name = "good"', run), "--foreground"]) == BAD
    assert problem in capsys.readouterr().err
    assert not (folder / "results" / "good.json").exists()


def test_events_that_are_not_there_are_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = listed(folder, 'name = "a"')
    (folder / "events").rename(folder / "elsewhere")
    assert main(["experiment", "run", path, "--foreground"]) == BAD
    assert "events" in capsys.readouterr().err


def test_two_at_once_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = listed(folder, 'name = "a"')
    (folder / "results").mkdir()
    with (folder / "results" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["experiment", "run", path]) == BAD
    assert "under way" in capsys.readouterr().err
