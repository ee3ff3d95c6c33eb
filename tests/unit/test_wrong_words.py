"""What is typed wrongly, or lies wrongly beside a file, is exit code 2 and one line that names it: no traceback, whatever it is.

Ten thousand of each kind: `python -m tests.system.hostile --doors files typed`.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys.events.columns import LAYOUT
from recsys.events.event_files import write_events
from recsys.files import Manifests
from recsys.types import Feedback, Item
from services.cli.import_rows import open_rows
from services.cli.main import BAD, main

LONG = "x" * 5000


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    clicks = [Feedback(event_id=f"{n}", user_id="u", item_id="i", type="click", time_ms=n) for n in range(3)]
    write_events(tmp_path / "events", [Item(item_id="i")], [], clicks, jsonl=True)
    (tmp_path / "c.toml").write_text('data_dir = "data"')
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("replay", "--events", "events", "--predictions", "a\udced"), "'a\\udced' is not UTF-8"),
        (("import", "items", "\udcff.jsonl"), "is not UTF-8"),
        (("import", "items", ""), "'.' is no file"),
        (("import", "items", "events"), "'events' is no file"),
        (("import", "items", LONG), "File name too long; check the path"),
        (("config", "check", "--config", LONG), "xxx"),
        (("replay", "--events", LONG), "File name too long; check the path"),
        (("table", "inspect", LONG), "File name too long; check the path"),
        (("log", "export", LONG, "--config", "c.toml"), "'data/log' does not exist"),
        (
            ("replay", "--events", "events", "--sync-interval", "1e308"),
            "--sync-interval 1e+308 must be from 0 to 1e+09",
        ),
        (("replay", "--events", "events", "--label-delay", "inf"), "--label-delay inf must be"),
        (("replay", "--events", "events", "--threads", "9999999999999999999"), "must be from 1 to 1024"),
        (("experiment", "run", "nowhere.toml"), "does not exist: check its name"),
    ],
)
def test_wrong_words_are_named(
    here: Path, words: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code: object = main(words)
    except SystemExit as ended:  # of the parser
        code = ended.code
    said = capsys.readouterr().err
    assert code == BAD and says in said and said.strip().splitlines()[-1].startswith("recsys"), said


@pytest.mark.parametrize("words", [("config", "check", "--config"), ("experiment", "run")])
def test_a_file_nested_a_thousand_times_is_named(
    here: Path, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "deep.toml").write_text("a = " + "[" * 5000)
    assert main([*words, "deep.toml"]) == BAD
    assert "'deep.toml' cannot be read" in capsys.readouterr().err


def test_text_of_a_table_that_is_not_utf_8_is_named(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = pa.StringArray.from_buffers(1, pa.py_buffer(np.array([0, 2], np.int32).tobytes()), pa.py_buffer(b"\xf3("))
    pq.write_table(pa.table({"item_id": ["i"], "title": wrong}), here / "items.parquet")
    (here / "sets").mkdir()
    pq.write_table(pa.table({"movie_id": [1], "title": wrong, "genres": ["a"]}), here / "sets/ml1m_movies.parquet")
    assert main(["data", "convert", "movielens", "sets", "made"]) == BAD
    assert "ml1m_movies.parquet" in (said := capsys.readouterr().err) and "UTF8" in said
    with pytest.raises(pa.ArrowException, match="UTF8"):
        list(open_rows(here / "items.parquet", LAYOUT["item"]))  # `import` names the file


@pytest.mark.parametrize(
    "wrong",
    [
        {"rows": "1"},
        {"rows": 2**63},
        {"position": -1},
        {"counts": {}},
        {"counts": 3},
        {"digest": 4},
        {"outcomes_bytes": 1.5},
    ],
)
def test_what_says_how_far_an_import_is_may_say_anything(
    here: Path, wrong: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    counts = {"accepted": 1, "duplicate": 0, "rejected": 0}
    state = {
        "kind": "items",
        "rows": 1,
        "position": 5,
        "outcomes_bytes": 0,
        "counts": counts,
        "digest": "",
        "system": "",
    }
    (here / "events/items.jsonl.import.json").write_text(json.dumps(state | wrong))
    assert main(["import", "items", "events/items.jsonl", "--url", "http://127.0.0.1:9"]) == BAD
    assert "items.jsonl.import.json' is unreadable" in (said := capsys.readouterr().err) and "delete it" in said


def test_checkpoints_of_an_earlier_release_are_listed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their manifests do not say how far they had read."""
    manifest = {"step": 7, "segments": [], "dense": {"name": "d"}, "small": {"name": "s"}, "covers_ms": 0}
    Manifests(here / "data/trainer").write(manifest)
    assert main(["checkpoint", "list", "--config", "c.toml", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["checkpoints"]
    assert (found["id"], found["learnable"], found["whole"]) == (7, None, False)
    Manifests(here / "data/trainer").write(manifest | {"covers_ms": "late"})
    assert main(["checkpoint", "list", "--config", "c.toml"]) == BAD
    assert "none of a checkpoint" in capsys.readouterr().err
    Manifests(here / "data/trainer").write(manifest | {"small": {"name": 1.5, "checksum": "x"}})
    Manifests(here / "data/trainer").write(manifest | {"small": {"checksum": "x"}})
    assert main(["audit", "--config", "c.toml"]) == BAD
    assert "no whole checkpoint" in capsys.readouterr().err


def test_columns_whose_names_are_not_utf_8_are_named(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pq.write_table(pa.table({"item_id": ["i"], "qqqq": ["x"]}), path := here / "items.parquet")
    path.write_bytes(path.read_bytes().replace(b"qqqq", b"\xf3qqq"))
    assert main(["replay", "--events", "items.parquet"]) == BAD
    assert "items.parquet" in capsys.readouterr().err
    assert main(["import", "items", "items.parquet", "--url", "http://127.0.0.1:9"]) == BAD
    assert "items.parquet" in capsys.readouterr().err
