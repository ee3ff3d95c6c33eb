"""`recsys experiment run`: real replays of a small click log, resumed; and what is wrong is said before the first of them."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from services.cli.main import main

CONFIG = """
[ranking]
scorer = "sources"
[retrieval.sources]
trending = 20
covisited = 20
[training]
two_tower = false
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "events").mkdir()
    items = [{"version": 1, "item_id": f"i{n}"} for n in range(5)]
    clicks = [
        {
            "version": 1,
            "event_id": f"e{n}",
            "user_id": f"u{n % 7}",
            "item_id": f"i{n % 5}",
            "type": "click",
            "time_ms": 10**12 + n * 1000,
        }
        for n in range(60)
    ]
    for name, rows in (("items", items), ("feedback", clicks)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "events" / f"{name}.jsonl").write_text(text)
    (tmp_path / "counting.toml").write_text(CONFIG)
    return tmp_path


def experiment(folder: Path, runs: str, defaults: str = 'events = ["events"]\nconfig = "counting.toml"') -> Path:
    path = folder / "experiment.toml"
    path.write_text(f'out = "out"\n[defaults]\n{defaults}\n{runs}')
    return path


RUNS = """
[groups.late]
delay = 30
[[runs]]
name = "live"
[[runs]]
name = "late"
group = "late"
set = { "retrieval.trending_half_life_s" = 60, "seed" = 3 }
"""


@pytest.mark.slow
def test_each_run_has_a_result_and_a_second_call_runs_only_what_has_none(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = experiment(folder, RUNS)
    assert main(["experiment", "run", str(path), "--wait", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) | {"results": ""} == {"runs": 2, "done": 2, "failed": [], "results": ""}
    live, late = (json.loads((folder / "out" / f"{name}.json").read_text()) for name in ("live", "late"))
    assert live["next_item"]["predictions"] == late["next_item"]["predictions"] > 0
    assert live["next_item"]["hit_rate_at_20"] >= late["next_item"]["hit_rate_at_20"]
    assert "--delay" in late["arguments"] and "--delay" not in live["arguments"]
    assert live["hardware"] and (live["commit"], live["dirty"]) == ("", False)  # not under version control
    assert late["arguments"][-4:] == ["--set", "retrieval.trending_half_life_s=60", "--set", "seed=3"]
    (folder / "out" / "live.json").unlink()
    before = (folder / "out" / "late.json").stat().st_mtime_ns
    assert main(["experiment", "run", str(path), "--wait"]) == 0
    assert (folder / "out" / "live.json").exists() and (folder / "out" / "late.json").stat().st_mtime_ns == before


@pytest.mark.slow
def test_each_result_says_whether_files_other_than_results_differed_when_its_run_began(folder: Path) -> None:
    def git(*words: str) -> str:
        command = ["git", "-c", "user.name=t", "-c", "user.email=t@example.com", *words]
        return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()

    path = experiment(folder, RUNS)
    git("init")
    git("add", ".")
    git("commit", "-m", "all")
    assert main(["experiment", "run", str(path), "--wait"]) == 0
    results = [folder / "out" / "live.json", folder / "out" / "late.json"]
    first, second = (json.loads(result.read_text()) for result in results)
    assert first["commit"] == second["commit"] == git("rev-parse", "HEAD")
    assert (first["dirty"], second["dirty"]) == (False, False)  # the first one's result is new, and counts for nothing
    (folder / "counting.toml").write_text(CONFIG + "# changed\n")
    results[0].unlink()
    assert main(["experiment", "run", str(path), "--wait"]) == 0
    assert json.loads(results[0].read_text())["dirty"] is True


@pytest.mark.slow
def test_in_the_background_it_answers_at_once_and_a_second_one_waits_its_turn(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = experiment(folder, RUNS)
    assert main(["experiment", "run", str(path), "--json"]) == 0
    started = json.loads(capsys.readouterr().out)
    assert started["done"] == 0 and started["pid"] > 0
    lock = folder / "out" / "experiment.pid"
    deadline = time.monotonic() + 60
    while not lock.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert main(["experiment", "run", str(path), "--wait"]) == 2
    assert "runs experiments into" in capsys.readouterr().err
    while lock.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert {p.name for p in (folder / "out").glob("*.json")} == {"live.json", "late.json"}


GOOD = '[[runs]]\nname = "good"\n'


@pytest.mark.parametrize(
    ("runs", "why"),
    [
        ("", "lists no runs"),
        ("[[runs]]\ndelay = 3", "needs a name"),
        ('[[runs]]\nname = "a/b"', "needs a name"),
        ('[[runs]]\nname = "a"\n[[runs]]\nname = "a"', "two runs named 'a'"),
        ('[[runs]]\nname = "a"\ngroup = "b"', "write a [groups.b] table"),
        ('[[runs]]\nname = "a\\u0000b"', "a zero byte"),
        ('[[runs]]\nname = "a"\n[groups]\ng = 3', "must be tables of options, got 3"),
        ('[[runs]]\nname = "a"\ndelays = 3', "did you mean 'delay'"),
        ('[[runs]]\nname = "a"\ndelay = "soon"', "is not a command"),
        ('[[runs]]\nname = "a"\nevents = ["nowhere"]', "nowhere' does not exist"),
        ('[[runs]]\nname = "a"\nset = { "model.dims" = 3 }', "did you mean 'model.dim'"),
        ('[[runs]]\nname = "a"\nset = { "seed.dims" = 3 }', "'seed' is not a section"),
        ('[[runs]]\nname = "a"\nset = 3', "set must be a table"),
        (GOOD + '[[runs]]\nname = "a"\nsample = 3', "run 'a': --sample 3.0"),
        (GOOD + '[[runs]]\nname = "a"\nthreads = 0', "run 'a': --threads 0"),
        (GOOD + '[[runs]]\nname = "a"\npredictions = true', "run 'a': --predictions: events without impressions"),
        (GOOD + '[[runs]]\nname = "a"\nset = { "features.context" = ["hour"] }', "features.context names 'hour'"),
        (GOOD + '[[runs]]\nname = "a"\nevents = ["bad"]', "feedback.jsonl row 61: "),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(
    folder: Path, runs: str, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "events", folder / "bad")
    with (folder / "bad" / "feedback.jsonl").open("a") as rows:
        rows.write('{"event_id": "e"}\n')
    assert main(["experiment", "run", str(experiment(folder, runs)), "--wait"]) == 2
    assert why in capsys.readouterr().err
    assert not list(folder.glob("out/*.json"))


@pytest.mark.slow
def test_a_run_that_fails_is_named_and_the_others_go_on(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    half = (
        '{ "ranking.scorer" = "model", "table.precision" = "float16", "model.row_l2" = 0.1 }'  # which cannot count rows
    )
    path = experiment(folder, f'[[runs]]\nname = "half"\nset = {half}\n[[runs]]\nname = "good"')
    assert main(["experiment", "run", str(path), "--wait", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["failed"] == ["half"]
    assert [p.name for p in (folder / "out").glob("*.json")] == ["good.json"]
