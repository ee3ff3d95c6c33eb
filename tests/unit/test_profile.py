"""What is made of samples: each thread's time shared out, rooms by the innermost frame of ours, a graph as wide as its weights."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from load_tests import performance
from load_tests.common import Report
from load_tests.flame import LEAST, WIDTH, flame_graph
from load_tests.profile import ENDED, NATIVE, REST, room, shared_out, told

SCORE = "thread (7): score_0;run (threading.py);rank (recsys/ranking/scorer.py)"
SAMPLES = [
    f"{SCORE};dot (numpy/core.py) 30",
    f"{SCORE} 10",
    "thread (8): score_1;run (threading.py);_worker (concurrent/futures/thread.py) 500",
    "thread (9): MainThread;serve (services/ranking/app.py) 5",
    "no thread 3",
]


def test_a_threads_time_is_shared_out_by_its_own_samples_and_the_rest_is_of_no_python() -> None:
    used = shared_out("ranking", SAMPLES, {7: 4.0, 8: 0.0, 9: 1.0}, 6.5)
    by_room = {room(stack): seconds for stack, seconds in used.items()}
    assert sum(used.values()) == pytest.approx(6.5)
    assert (
        used[("ranking", "score", "run (threading.py)", "rank (recsys/ranking/scorer.py)", "dot (numpy/core.py)")]
        == 3.0
    )
    assert by_room["ranking | MainThread | services/ranking/app"] == 1.0
    assert by_room["ranking | score | concurrent"] == 0.0, (
        "a thread that waits weighs nothing, however often it is seen"
    )
    assert by_room[f"ranking | {NATIVE} | -"] == 1.5


def test_a_figure_is_what_a_request_adds_and_the_parts_make_the_whole() -> None:
    scorer, app = (
        ("ranking", "score", "rank (recsys/ranking/scorer.py)"),
        ("ranking", "MainThread", "f (services/x.py)"),
    )
    small = ("trainer", "MainThread", "g (recsys/y/z.py)")
    report = Report("profile", {})
    told(report, {scorer: 2.0, app: 0.5, small: 0.001, ("ranking", ENDED): 9.0}, {scorer: 1.0, app: 0.6}, requests=100)
    rows = {row["name"]: row["value"] for row in report.finish()["results"]}
    assert rows["request"] == pytest.approx(9.01) and rows["request_ranking"] == pytest.approx(9.0)
    assert rows["ranking | score"] == rows["ranking | score | recsys/ranking/scorer"] == pytest.approx(10.0)
    assert rows["ranking | MainThread | services/x"] == pytest.approx(-1.0)
    assert "trainer | MainThread | recsys/y/z" not in rows and rows[REST] == pytest.approx(0.01)
    assert rows["builders_with_requests"] == 9.0


def test_flame_graph_is_as_wide_as_its_weights_and_says_them() -> None:
    drawn = flame_graph("one & all", "ms", {("a", "b<c>"): 3.0, ("a", "d"): 1.0, ("e",): LEAST / 2, ("f",): -1.0})
    widths = {name: float(width) for name, width in re.findall(r"<title>([^:]+):.*?width=\"([0-9.]+)\"", drawn)}
    assert widths.keys() == {"a", "b&lt;c&gt;", "d"}, "what is too narrow, or below 0, is left out"
    assert widths["a"] == pytest.approx(WIDTH, rel=0.01)
    assert widths["b&lt;c&gt;"] == pytest.approx(3 * widths["d"], rel=0.01)
    assert "one &amp; all" in drawn
    with pytest.raises(ValueError, match="no stack"):
        flame_graph("none", "ms", {})


def test_page_tells_a_saved_profile_and_what_was_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(performance, "RESULTS", tmp_path)
    page = performance.document()
    assert "Not measured yet." in page and "| `knee_one` | not measured yet | ≥ 60 | **no** |" in page
    report = Report("profile", {"items": 5, "rate": 20.0, "events": 200.0})
    told(report, {("ranking", "score", "rank (recsys/ranking/scorer.py)"): 1.0}, {}, requests=100)
    (tmp_path / "profile.json").write_text(json.dumps(report.finish()))
    page = performance.document()
    assert "| ranking | score | recsys/ranking/scorer | 10.00 | 100% |" in page and "performance_flame.svg" in page
