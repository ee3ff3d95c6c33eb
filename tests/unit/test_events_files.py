"""Event files: what is written is read back in time order; what is wrong is named with file, row, column and remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys.errors import BadInput
from recsys.events.event_files import BATCH_ROWS, count_rows, merged, read_items, write_events
from recsys.types import Feedback, Impression, Item, ShownItem

ITEMS = [
    Item(item_id="a", title="Ä", attributes={"tags": ["x", "y"], "year": 1999, "price": 1.5, "new": True}),
    Item(item_id="b"),
    Item(item_id="gone", deleted=True),
]
IMPRESSIONS = [
    Impression(
        request_id="r1",
        user_id="u",
        time_ms=10,
        items=(
            ShownItem(item_id="a", position=1, sources=("trending", "nearest"), score=1.5, predictions={"click": 0.25}),
            ShownItem(item_id="b", position=2, propensity=0.5, pool=(("b", 0.5), ("a", 0.5))),
        ),
        context={"tab": 1, "x": "y"},
        session_id="s",
        activation="deferred",
        schema="abc",
        features=b"\x00\xff",
        bandit=b"\xff\x01",
        policy="p",
        model_version="m",
        generation="g",
    ),
    Impression(request_id="r2", user_id="u", time_ms=20, items=(ShownItem(item_id="b", position=1),)),
]
FEEDBACK = [
    Feedback(event_id="1", user_id="u", item_id="a", type="click", time_ms=5, session_id="s", context={"os": 2}),
    Feedback(event_id="2", user_id="u", item_id="b", type="click", time_ms=10, request_id="r1", value=1.5),
    Feedback(event_id="3", user_id="v", item_id="b", type="like", time_ms=20),
]
ONE = {"event_id": ["1"], "user_id": ["u"], "item_id": ["i"], "type": ["click"], "time_ms": [1]}


@pytest.mark.parametrize("jsonl", [False, True])
def test_what_is_written_is_read_back_in_time_order_impressions_first(tmp_path: Path, jsonl: bool) -> None:
    counts = write_events(tmp_path, ITEMS, IMPRESSIONS, FEEDBACK, jsonl=jsonl)
    assert counts == {"items": 3, "impressions": 2, "feedback": 3}
    assert count_rows(tmp_path) == {"item": 3, "impression": 2, "feedback": 3}
    assert sorted(p.stem for p in tmp_path.iterdir()) == ["feedback", "impressions", "items"]
    assert list(read_items(tmp_path)) == ITEMS
    order = [*ITEMS, FEEDBACK[0], IMPRESSIONS[0], FEEDBACK[1], IMPRESSIONS[1], FEEDBACK[2]]
    assert [message for _, _, message in merged(tmp_path)] == order
    assert [time for time, _, _ in merged(tmp_path)] == [5, 5, 5, 5, 10, 10, 20, 20]
    assert [kind for _, kind, _ in merged(tmp_path)][3:5] == ["feedback", "impression"]


def test_several_files_of_one_kind_are_merged(tmp_path: Path) -> None:
    write_events(tmp_path / "a", ITEMS, [], FEEDBACK[1:])
    write_events(tmp_path / "b", [], [], FEEDBACK[:1], jsonl=True)
    (tmp_path / "b" / "feedback.jsonl").rename(tmp_path / "b" / "feedback_day2.jsonl")
    files = [tmp_path / "a" / "feedback.parquet", tmp_path / "b" / "feedback_day2.jsonl"]
    assert [message for _, _, message in merged(files)] == FEEDBACK


def test_a_file_of_many_batches_streams_whole(tmp_path: Path) -> None:
    num = 2 * BATCH_ROWS + 7
    feedback = (Feedback(event_id=str(i), user_id="u", item_id="i", type="click", time_ms=i) for i in range(num))
    write_events(tmp_path, [], [], feedback)
    assert [time for time, _, _ in merged(tmp_path)] == list(range(num))


def test_integer_ids_and_other_encodings_of_a_column_are_accepted(tmp_path: Path) -> None:
    table = pa.table(
        {
            "event_id": pa.array([7], pa.int32()),
            "user_id": pa.array(["u"], pa.large_string()),
            "item_id": pa.array(["i"]).dictionary_encode(),
            "type": ["click"],
            "time_ms": pa.array([1], pa.int32()),
            "value": [2],
            "session_id": pa.nulls(1),
        }
    )
    pq.write_table(table, tmp_path / "feedback.parquet")
    expected = Feedback(event_id="7", user_id="u", item_id="i", type="click", time_ms=1, value=2.0)
    assert list(merged(tmp_path)) == [(1, "feedback", expected)]


def test_shown_items_need_only_id_and_position_in_any_order(tmp_path: Path) -> None:
    shown = pa.array([[{"position": 1, "item_id": 5}]])
    table = pa.table({"request_id": ["r"], "user_id": ["u"], "time_ms": [1], "items": shown})
    pq.write_table(table, tmp_path / "impressions.parquet")
    [(_, _, impression)] = merged(tmp_path)
    assert impression == Impression(request_id="r", user_id="u", time_ms=1, items=(ShownItem(item_id="5", position=1),))


@pytest.mark.parametrize(
    ("change", "field", "says"),
    [
        ({"time_ms": None}, "time_ms", "missing"),
        ({"itemid": ["i"]}, "itemid", "did you mean 'item_id'"),
        ({"time_ms": ["1"]}, "time_ms", "must be int64"),
        ({"time_ms": [1.5]}, "time_ms", "must be int64"),
        ({"user_id": [1.5]}, "user_id", "must be string or an integer"),
        ({"time_ms": [-1]}, "time_ms", "row 1"),
        ({"user_id": [None]}, "user_id", "is required"),
        ({"user_id": [""]}, "user_id", "row 1"),
        ({"user_id": ["a\nb"]}, "user_id", "control"),
        ({"user_id": ["x" * 257]}, "user_id", "256"),
        ({"type": ["$forget"]}, "type", "reserved"),
        ({"type": [None]}, "type", "required"),
        ({"value": [float("nan")]}, "value", "finite"),
        ({"value": [float("inf")]}, "value", "finite"),
        ({"context": ["{"]}, "context", "not JSON"),
        ({"context": ['{"a":{}}']}, "context.a", "row 1"),
        ({"request_id": [""]}, "request_id", "row 1"),
    ],
)
def test_a_bad_feedback_column_is_named(tmp_path: Path, change: dict[str, Any], field: str, says: str) -> None:
    columns = {name: values for name, values in {**ONE, **change}.items() if values is not None}
    pq.write_table(pa.table(columns), tmp_path / "feedback.parquet")
    with pytest.raises(BadInput, match=r"feedback\.parquet") as error:
        list(merged(tmp_path))
    assert error.value.field == field
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("items", "field"),
    [
        ([], "items"),
        (None, "items"),
        ([{"item_id": "a", "position": 0}], "items[0].position"),
        ([{"item_id": "a", "position": 1}, {"item_id": "a", "position": 2}], "items[1].item_id"),
        ([{"item_id": "a", "position": 1}, {"item_id": "", "position": 2}], "items[1].item_id"),
        ([{"item_id": "a", "position": 1}, None], "items[1].item_id"),
        ([{"item_id": "a", "position": None}], "items[0].position"),
        ([{"item_id": "a", "position": 1, "propensity": 0.0}], "items[0].propensity"),
        ([{"item_id": "a", "position": 1, "pool": [{"item_id": "b", "probability": 1.0}]}], "items[0].pool"),
        ([{"item_id": "a", "position": 1, "predictions": '{"click":2}'}], "items[0].predictions.click"),
        ([{"item_id": "a", "position": 2**40}], "events"),
    ],
)
def test_a_bad_shown_item_is_named_with_the_row_of_its_impression(tmp_path: Path, items: Any, field: str) -> None:
    good = [{"item_id": "g", "position": 1}]
    table = pa.table({"request_id": ["r", "q"], "user_id": ["u", "u"], "time_ms": [1, 2], "items": [good, items]})
    pq.write_table(table, tmp_path / "impressions.parquet")
    with pytest.raises(BadInput, match=r"impressions\.parquet") as error:
        list(merged(tmp_path))
    assert error.value.field == field
    if field != "events":
        assert "row 2" in str(error.value)


@pytest.mark.parametrize("jsonl", [False, True])
def test_a_row_that_goes_back_in_time_is_named(tmp_path: Path, jsonl: bool) -> None:
    write_events(tmp_path, [], [], FEEDBACK, jsonl=jsonl)
    with pytest.raises(BadInput, match="feedback row 2: time_ms = 10 is before 20 of the row above: sort"):
        write_events(tmp_path, [], [], FEEDBACK[::-1], jsonl=jsonl)
    assert len(list(merged(tmp_path))) == 3  # the complete file is still there


def test_an_unsorted_file_is_refused_across_batches(tmp_path: Path) -> None:
    times = [*range(1, BATCH_ROWS + 1), 5]
    table = pa.table(
        {name: values * len(times) for name, values in ONE.items() if name != "time_ms"} | {"time_ms": times}
    )
    pq.write_table(table, tmp_path / "feedback.parquet")
    with pytest.raises(BadInput, match=f"row {BATCH_ROWS + 1}: time_ms = 5"):
        list(merged(tmp_path))


def test_a_bad_json_line_is_named(tmp_path: Path) -> None:
    write_events(tmp_path, [], [], FEEDBACK, jsonl=True)
    with (tmp_path / "feedback.jsonl").open("ab") as lines:
        lines.write(b'\n{"version":1,"event_id":4}\n')
    with pytest.raises(BadInput, match=r"feedback\.jsonl row 5: type"):
        list(merged(tmp_path))


def test_files_that_are_not_there_empty_or_damaged_are_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="does not exist"):
        merged(tmp_path / "none")
    with pytest.raises(BadInput, match="has no items, impressions or feedback"):
        merged(tmp_path)
    with pytest.raises(BadInput, match="no impression and no feedback"):
        write_events(tmp_path / "empty", ITEMS, [], [])
        merged(tmp_path / "empty")
    (tmp_path / "feedback.parquet").write_bytes(b"")
    with pytest.raises(BadInput, match=r"feedback\.parquet.*is not a Parquet file"):
        merged(tmp_path)
    write_events(tmp_path, [], [], FEEDBACK)
    whole = (tmp_path / "feedback.parquet").read_bytes()
    (tmp_path / "feedback.parquet").write_bytes(whole[:4] + bytes(200) + whole[204:])
    with pytest.raises(BadInput, match=r"feedback\.parquet.*cannot be read"):
        list(merged(tmp_path))
    with pytest.raises(BadInput, match="is none of"):
        merged(Path(__file__))


def test_one_file_as_parquet_and_as_json_lines_is_refused(tmp_path: Path) -> None:
    write_events(tmp_path, ITEMS, IMPRESSIONS, FEEDBACK)
    write_events(tmp_path, ITEMS, IMPRESSIONS, FEEDBACK, jsonl=True)
    with pytest.raises(BadInput, match="given twice"):
        merged(tmp_path)


def test_an_unwritable_folder_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="cannot be written"):
        write_events(tmp_path / "file", [], [], [])
