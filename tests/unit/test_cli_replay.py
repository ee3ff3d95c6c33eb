"""`recsys replay` on the command line: what its options do to the report, over two days of impressions with feedback before them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

from recsys.evaluation.measures import auc
from recsys.events.event_files import write_events
from recsys.types import Feedback, Impression, Item, ShownItem
from services.cli.main import main

HOUR, DAY = 3_600_000, 86_400_000
START = 20_000 * DAY + 7 * HOUR
"""The first impression; feedback comes 30 hours before, so that neither midnight nor the first event begins a day."""
FIRST_DAY = (0, 6 * HOUR, 12 * HOUR, 18 * HOUR, DAY - 1)
SECOND_DAY = (DAY,)
CONFIG = """
[catalogue]
attributes = []
multivalued = []
[features]
history_attributes = []
crosses = [["user", "item"]]
[[tasks]]
name = "click"
types = ["click"]
prior = 0.3
[[tasks]]
name = "like"
types = ["like"]
prior = 0.1
[model]
dim = 4
expert_hidden = [8, 4]
attention = [8]
[training]
batch_size = 4
two_tower = false
"""


def replay(folder: Path, capsys: pytest.CaptureFixture[str], clicked: str, *options: str) -> dict[str, Any]:
    """The report when `clicked` is what the first day's impressions of a and b led to, ten seconds later, and a the second's."""
    shown, feedback = [], [event("click", "a", START - 30 * HOUR, None)]
    for number, after in enumerate(FIRST_DAY + SECOND_DAY):
        pair = tuple(ShownItem(item_id=item, position=n) for n, item in enumerate("ab", 1))
        shown.append(Impression(request_id=f"r{number}", user_id="u", time_ms=START + after, items=pair))
        item = clicked if after in FIRST_DAY else "a"
        feedback += [event(kind, item, START + after + 10_000, f"r{number}") for kind in ("click", "like")]
    feedback.sort(key=lambda each: each.time_ms)
    write_events(folder / "events", [Item(item_id="a"), Item(item_id="b")], shown, feedback)
    (folder / "c.toml").write_text(CONFIG)
    words = ["replay", "--config", str(folder / "c.toml"), "--events", str(folder / "events"), "--json", *options]
    assert main(words) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


def event(kind: str, item: str, time_ms: int, request_id: str | None) -> Feedback:
    return Feedback(
        event_id=f"{kind}-{time_ms}", user_id="u", item_id=item, type=kind, time_ms=time_ms, request_id=request_id
    )


def means(report: dict[str, Any]) -> list[float]:
    """Mean prediction of a click by day: one of the two of each impression is clicked."""
    return [day["tasks"]["click"]["calibration"] / 2 for day in report["days"]]


def test_the_report_has_each_task_each_day_and_what_it_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = replay(tmp_path, capsys, "a", "--label-delay", "60", "--threads", "2")
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    metrics = ("auc", "normalized_entropy", "gauc", "calibration")
    keys = {"examples", *metrics, *(f"{name}_ci" for name in metrics)}
    assert [(day["day"], day["tasks"].keys()) for day in report["days"]] == [
        (1, {"click", "like"}),
        (2, {"click", "like"}),
    ]
    for found in (report["tasks"], *(day["tasks"] for day in report["days"])):
        assert found["click"].keys() == found["like"].keys() == keys
        assert all(0 <= found["click"][name] <= 1 for name in ("auc", "gauc"))
    # Days count from the first impression: its 24th hour's last millisecond is the first day's, the next the second's.
    assert [day["tasks"]["click"]["examples"] for day in report["days"]] == [2 * len(FIRST_DAY), 2 * len(SECOND_DAY)]
    assert report["tasks"]["like"]["examples"] == 12
    assert report["events"] == 2 + 6 + 13
    for name in ("seconds", "events_per_second", "examples_per_second", "peak_memory_bytes"):
        assert report[name] > 0
    assert report["peak_memory_bytes"] > 50 * 2**20


def test_scored_examples_are_written_in_time_order_as_they_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "scored.parquet"
    report = replay(tmp_path, capsys, "a", "--label-delay", "60", "--predictions", str(path))
    rows = pq.read_table(path)
    for task, found in report["tasks"].items():
        scored = {
            name: column.to_numpy()
            for name, column in zip(rows.column_names, rows.filter(pc.field("task") == task).columns, strict=True)
        }
        assert len(scored["label"]) == found["examples"] == 12
        assert auc(scored["prediction"], scored["label"]) == found["auc"]
        assert scored["day"].tolist() == [1] * 10 + [2] * 2 and len(set(scored["user"])) == 1
    for where in (tmp_path / "no" / "folder", tmp_path):
        assert main(["replay", "--events", str(tmp_path / "events"), "--predictions", str(where)]) == 2
        assert "cannot be written" in capsys.readouterr().err


def test_frozen_days_know_everything_up_to_their_start_and_nothing_of_themselves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frozen = ("--label-delay", "60", "--sync-interval", "86400", "--freeze-user")
    one, other = (means(replay(tmp_path, capsys, clicked, *frozen)) for clicked in "ab")
    assert one[0] == other[0]
    assert one[1] != other[1]
    one, other = (means(replay(tmp_path, capsys, clicked, "--label-delay", "60")) for clicked in "ab")
    assert one[0] != other[0]


def test_tasks_seed_and_label_delay_change_what_is_learned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seven, again, eight = (
        replay(tmp_path, capsys, "a", "--tasks", "click", "--label-delay", "60", "--seed", seed) for seed in "778"
    )
    assert seven["tasks"].keys() == seven["days"][1]["tasks"].keys() == {"click"}
    assert seven["tasks"] == again["tasks"] and seven["days"] == again["days"]
    assert means(seven) != means(eight)
    hasty = replay(tmp_path, capsys, "a", "--label-delay", "9.999")  # each click comes a millisecond too late
    assert (hasty["tasks"]["click"]["examples"], hasty["tasks"]["click"]["calibration"]) == (12, None)
    just = replay(tmp_path, capsys, "a", "--label-delay", "10")
    assert just["tasks"]["click"]["calibration"] is not None
