"""Public data sets become event files: what means what, in which order, and that nothing of the outcome leaks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys.errors import BadInput
from recsys.events.event_files import merged, read_items
from recsys.types import Feedback, Impression, Item, ShownItem
from services.cli.convert_command import convert_globo, convert_kuairand, convert_movielens
from tests.shared_data import shared

HOUR_MS = 3_600_000
T = 451_000 * HOUR_MS  # 16:00 UTC, midnight at UTC+8
OUTCOMES = {"is_click", "is_like", "is_follow", "is_comment", "is_forward", "is_hate", "long_view"}
CONTEXT = {"environment": 4, "device_group": 3, "os": 2, "country": 1, "region": 21, "referrer_type": 1}
IMPRESSIONS = [
    # user, video, time, tab, author, tag, upload_dt, duration_ms, outcomes
    (2, 11, T, 1, 90, "3,4", "2022-04-01", 5000, {"is_click", "long_view"}),
    (1, 10, T, 0, 91, "5", "2022-04-02", 10_000, set()),
    (2, 12, T, 1, 92, "unknown", "2022-04-03", 300_000, {"is_hate"}),
    (1, 11, T + 5000, 2, 90, "3,4", "2022-04-01", 5000, {"is_like", "is_follow", "is_comment", "is_forward"}),
]


def events(folder: Path, kind: type) -> list[Any]:
    return [message for _, _, message in merged(folder) if isinstance(message, kind)]


@pytest.fixture
def kuairand(tmp_path: Path) -> Path:
    """Four impressions in two files that overlap, two users, one of them unknown, a history."""
    names = ("user_id", "video_id", "time_ms", "tab", "author_id", "tag", "upload_dt", "duration_ms")
    rows = [
        {**dict(zip(names, row, strict=False)), **{name: int(name in row[8]) for name in OUTCOMES}}
        for row in IMPRESSIONS
    ]
    pq.write_table(pa.Table.from_pylist(rows[2:]), tmp_path / "kuairand_impressions_2.parquet")
    pq.write_table(pa.Table.from_pylist(rows[:3]), tmp_path / "kuairand_impressions_1.parquet")
    user = {
        "user_id": 1,
        "user_active_degree": "full_active",
        "follow_user_num_range": "500+",
        "fans_user_num_range": "0",
        "friend_user_num_range": None,
        "register_days_range": "730+",
        "is_lowactive_period": 0,
        "is_live_streamer": -124,
        "is_video_author": 1,
        "follow_user_num": 514,
    }
    pq.write_table(pa.Table.from_pylist([user]), tmp_path / "kuairand_users.parquet")
    video = {
        "video_id": 10,
        "author_id": 91,
        "tag": "5",
        "upload_dt": "2022-04-02",
        "video_type": "NORMAL",
        "upload_type": None,
        "music_id": 7,
        "music_type": 9.0,
        "video_duration": 10_000.0,
    }
    pq.write_table(pa.Table.from_pylist([video]), tmp_path / "kuairand_videos.parquet")
    history = [
        {"user_id": 1, "last_time_ms": T - 500, "watch_seq": "10 20", "like_seq": "20", "long_watch_seq": "30 20"},
        {"user_id": 3, "last_time_ms": T + 1, "watch_seq": "10", "like_seq": None, "long_watch_seq": None},
    ]
    pq.write_table(pa.Table.from_pylist(history), tmp_path / "kuairand_history.parquet")
    return tmp_path


def test_kuairand_rows_of_one_user_and_millisecond_are_one_request(kuairand: Path, tmp_path: Path) -> None:
    counts = convert_kuairand(kuairand, tmp_path / "out")
    assert counts == {"items": 5, "impressions": 3, "feedback": 7 + 6}
    first, second, third = events(tmp_path / "out", Impression)
    user_1 = {"user_active_degree": "full_active", "follow_user_num_range": "500+", "fans_user_num_range": "0"} | {
        "register_days_range": "730+",
        "is_lowactive_period": 0,
        "is_live_streamer": -124,
        "is_video_author": 1,
    }
    assert first == Impression(
        request_id=f"1-{T}",
        user_id="1",
        time_ms=T,
        items=(ShownItem(item_id="10", position=1),),
        context={"tab": 0, "hour": 0, **user_1},
    )
    assert second.items == (ShownItem(item_id="11", position=1), ShownItem(item_id="12", position=2))
    assert second.context == {"tab": 1, "hour": 0}
    assert (third.time_ms, third.context["tab"]) == (T + 5000, 2)


def test_kuairand_outcomes_are_feedback_at_once_and_never_features(kuairand: Path, tmp_path: Path) -> None:
    convert_kuairand(kuairand, tmp_path / "out")
    answered = [f for f in events(tmp_path / "out", Feedback) if f.request_id]
    assert {(f.request_id, f.item_id, f.type, f.time_ms) for f in answered} == {
        (f"2-{T}", "11", "click", T),
        (f"2-{T}", "11", "long_view", T),
        (f"2-{T}", "12", "hate", T),
        (f"1-{T + 5000}", "11", "like", T + 5000),
        (f"1-{T + 5000}", "11", "follow", T + 5000),
        (f"1-{T + 5000}", "11", "comment", T + 5000),
        (f"1-{T + 5000}", "11", "forward", T + 5000),
    }
    assert len({f.event_id for f in events(tmp_path / "out", Feedback)}) == 13
    features = {name for i in events(tmp_path / "out", Impression) for name in i.context}
    features |= {name for item in read_items(tmp_path / "out") for name in item.attributes}
    assert not features & (OUTCOMES | {"play_time_ms", "profile_stay_time", "comment_stay_time", "is_profile_enter"})


def test_kuairand_history_comes_before_a_second_apart_without_request(kuairand: Path, tmp_path: Path) -> None:
    convert_kuairand(kuairand, tmp_path / "out")
    history = [
        (f.time_ms, f.user_id, f.item_id, f.type) for f in events(tmp_path / "out", Feedback) if not f.request_id
    ]
    assert history == [
        (T - 3000, "1", "30", "long_view"),  # beyond the watched ones: older
        (T - 2000, "1", "10", "watch"),
        (T - 1000, "1", "20", "watch"),  # the first impression − 1 s is before last_time_ms
        (T - 1000, "1", "20", "long_view"),
        (T - 1000, "1", "20", "like"),
        (T + 1, "3", "10", "watch"),  # never shown anything: last_time_ms
    ]


def test_kuairand_items_are_described_wherever_a_description_is(kuairand: Path, tmp_path: Path) -> None:
    convert_kuairand(kuairand, tmp_path / "out")
    items = {item.item_id: item.attributes for item in read_items(tmp_path / "out")}
    assert items["10"] == {
        "author": 91,
        "tag": ["5"],
        "upload_dt": "2022-04-02",
        "video_type": "NORMAL",
        "music_id": 7,
        "music_type": 9,
        "duration": "7-15 s",
    }
    assert items["11"] == {"author": 90, "tag": ["3", "4"], "upload_dt": "2022-04-01", "duration": "0-7 s"}
    assert items["12"]["duration"] == "240+ s"
    assert items["20"] == items["30"] == {}


@pytest.fixture
def globo(tmp_path: Path) -> Path:
    rows = [
        {"user_id": 5, "session_id": 9, "item_id": i, "time_ms": t, **CONTEXT} for i, t in ((30, 1), (4, 1), (30, 7))
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "clicks.parquet")
    return tmp_path / "clicks.parquet"


@pytest.fixture
def movielens(tmp_path: Path) -> Path:
    movies = {"movie_id": [1, 2], "title": ["Toy Story (1995)", "Heat"], "genres": ["Animation|Comedy", None]}
    ratings = {"user_id": [6, 7], "movie_id": [1, 2], "rating": [5, 3], "timestamp": [20, 10]}
    pq.write_table(pa.table(movies), tmp_path / "ml1m_movies.parquet")
    pq.write_table(pa.table(ratings), tmp_path / "ml1m_ratings.parquet")
    return tmp_path


def test_globo_clicks_keep_session_and_context_and_have_no_impressions(globo: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    counts = convert_globo(globo, tmp_path / "out", progress=lambda *p: seen.append(p))
    assert counts == {"items": 2, "impressions": 0, "feedback": 3}
    assert seen == [("feedback", 3, 3)]
    assert [item.item_id for item in read_items(tmp_path / "out")] == ["4", "30"]
    first, *_, last = events(tmp_path / "out", Feedback)
    assert first == Feedback(
        event_id="5-30-1", user_id="5", item_id="30", type="click", time_ms=1, session_id="9", context=CONTEXT
    )
    assert (last.item_id, last.time_ms) == ("30", 7)


@pytest.mark.parametrize("jsonl", [False, True])
def test_movielens_ratings_are_in_time_order_with_their_stars(movielens: Path, tmp_path: Path, jsonl: bool) -> None:
    convert_movielens(movielens, tmp_path / "out", jsonl=jsonl)
    assert {p.suffix for p in (tmp_path / "out").iterdir()} == {".jsonl" if jsonl else ".parquet"}
    assert list(read_items(tmp_path / "out")) == [
        Item(item_id="1", title="Toy Story (1995)", attributes={"genres": ["Animation", "Comedy"]}),
        Item(item_id="2", title="Heat"),
    ]
    assert events(tmp_path / "out", Feedback) == [
        Feedback(event_id="7-2", user_id="7", item_id="2", type="rating", time_ms=10_000, value=3.0),
        Feedback(event_id="6-1", user_id="6", item_id="1", type="click", time_ms=20_000, value=5.0),
    ]


def test_the_same_input_gives_the_same_bytes(kuairand: Path, tmp_path: Path) -> None:
    for out in ("a", "b"):
        convert_kuairand(kuairand, tmp_path / out)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_what_is_missing_is_named(kuairand: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no kuairand_impressions\*\.parquet"):
        convert_kuairand(tmp_path / "none", tmp_path / "out")
    with pytest.raises(BadInput, match=r"kuairand_users\.parquet' has no column 'session_id'"):
        convert_globo(kuairand / "kuairand_users.parquet", tmp_path / "out")
    (kuairand / "kuairand_history.parquet").write_bytes(b"no")
    with pytest.raises(BadInput, match=r"kuairand_history\.parquet' cannot be read"):
        convert_kuairand(kuairand, tmp_path / "out")
    assert not (tmp_path / "out").exists()


NAN = float("nan")


def changed(path: Path, column: str, values: list[Any]) -> None:
    table = pq.read_table(path)
    place = table.column_names.index(column)
    pq.write_table(table.set_column(place, column, pa.array(values)), path)


@pytest.mark.parametrize(
    ("column", "values", "words"),
    [
        ("time_ms", [1, 1, None], "row 3: time_ms = nothing: must be integer milliseconds since 1970: repair the row"),
        ("time_ms", [1.0, NAN, 7.0], "column 'time_ms' is double: must be integer milliseconds since 1970: convert it"),
        ("time_ms", ["1", "1", "7"], "column 'time_ms' is string"),
        ("time_ms", [1, -1, 7], "row 2: time_ms = -1"),
        ("time_ms", [1, 7, 1], "row 3: time_ms = 1 is before 7 of the row above: sort the file"),
        ("user_id", [5, None, 5], "row 2: user_id = nothing: must be an integer"),
        ("user_id", [5.0, 5.0, 5.0], "column 'user_id' is double"),
        ("region", [1.0, NAN, 2.0], "row 2: region = nan: must be a finite number, or text"),
        ("os", [[1], [2], [3]], "column 'os' is list<"),
        ("os", ["linux", "x" * 2000, "mac"], "row 2: os = 'xxx"),
    ],
)
def test_hostile_clicks_of_globo_are_named(
    globo: Path, tmp_path: Path, column: str, values: list[Any], words: str
) -> None:
    changed(globo, column, values)
    with pytest.raises(BadInput, match=re.escape(words)) as error:
        convert_globo(globo, tmp_path / "out")
    assert str(globo) in str(error.value)
    assert not (tmp_path / "out").exists()


def test_globo_context_may_be_absent(globo: Path, tmp_path: Path) -> None:
    changed(globo, "region", [None, 2, 3])
    changed(globo, "os", [None, None, None])
    convert_globo(globo, tmp_path / "out")
    contexts = [f.context for f in events(tmp_path / "out", Feedback)]
    without = {name: value for name, value in CONTEXT.items() if name not in ("os", "region")}
    assert contexts == [without, without | {"region": 2}, without | {"region": 3}]


@pytest.mark.parametrize(
    ("name", "column", "values", "words"),
    [
        ("impressions_1", "time_ms", [T, None, T], "row 2: time_ms = nothing"),
        ("impressions_1", "user_id", [2, None, 2], "row 2: user_id = nothing"),
        ("impressions_1", "user_id", ["2", "1", "2"], "column 'user_id' is string: must be an integer"),
        ("impressions_1", "tab", [None, 1, 1], "row 1: tab = nothing"),
        ("impressions_1", "is_click", ["1", "0", "0"], "column 'is_click' is string: must be 0 or 1"),
        ("impressions_1", "is_click", [1, 2, 0], "row 2: is_click = 2: must be 0 or 1"),
        ("impressions_1", "is_click", [1, None, 0], "row 2: is_click = nothing"),
        ("impressions_1", "tag", [3, 4, 5], "column 'tag' is int64: must be text"),
        ("impressions_1", "duration_ms", [5.0, NAN, 5.0], "row 2: duration_ms = nan"),
        ("users", "user_id", ["1"], "column 'user_id' is string: must be an integer"),
        ("users", "is_video_author", [NAN], "row 1: is_video_author = nan"),
        ("videos", "music_type", [NAN], "row 1: music_type = nan: must be a whole number"),
        ("videos", "music_type", [9.5], "row 1: music_type = 9.5"),
        ("videos", "music_type", [1e308], "row 1: music_type = 1e+308: must be a whole number"),
        ("videos", "video_duration", [NAN], "row 1: video_duration = nan"),
        ("history", "last_time_ms", [T, None], "row 2: last_time_ms = nothing"),
        ("history", "watch_seq", ["10", "10 abc"], "row 2: watch_seq = '10 abc': must be integers with spaces between"),
    ],
)
def test_hostile_rows_of_kuairand_are_named(
    kuairand: Path, tmp_path: Path, name: str, column: str, values: list[Any], words: str
) -> None:
    path = kuairand / f"kuairand_{name}.parquet"
    changed(path, column, values)
    with pytest.raises(BadInput, match=re.escape(words)) as error:
        convert_kuairand(kuairand, tmp_path / "out")
    assert str(path) in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("column", "values", "words"),
    [
        ("timestamp", [20.0, NAN], "column 'timestamp' is double"),
        ("timestamp", ["20", "10"], "column 'timestamp' is string"),
        ("timestamp", [20, 10**13], "row 2: timestamp = 10000000000000: must be integer seconds since 1970"),
        ("rating", [5, None], "row 2: rating = nothing: must be a finite number"),
        ("rating", [5.0, float("inf")], "row 2: rating = inf"),
    ],
)
def test_hostile_ratings_are_named(movielens: Path, tmp_path: Path, column: str, values: list[Any], words: str) -> None:
    changed(movielens / "ml1m_ratings.parquet", column, values)
    with pytest.raises(BadInput, match=re.escape(words)) as error:
        convert_movielens(movielens, tmp_path / "out")
    assert "ml1m_ratings.parquet" in str(error.value)


def test_a_file_without_rows_is_refused(globo: Path, kuairand: Path, tmp_path: Path) -> None:
    for path in (globo, kuairand / "kuairand_users.parquet"):
        pq.write_table(pq.read_table(path).slice(0, 0), path)
    with pytest.raises(BadInput, match=r"clicks\.parquet' has no rows"):
        convert_globo(globo, tmp_path / "out")
    with pytest.raises(BadInput, match=r"kuairand_users\.parquet' has no rows"):
        convert_kuairand(kuairand, tmp_path / "out")


def test_files_of_other_integer_and_text_types_are_joined(kuairand: Path, tmp_path: Path) -> None:
    path = kuairand / "kuairand_impressions_2.parquet"
    table = pq.read_table(path)
    types = {pa.int64(): pa.int32(), pa.string(): pa.large_string()}
    keep = {"time_ms": pa.int64()}
    schema = pa.schema([(f.name, keep.get(f.name, types.get(f.type, f.type))) for f in table.schema])
    pq.write_table(table.cast(schema), path)
    assert convert_kuairand(kuairand, tmp_path / "out") == {"items": 5, "impressions": 3, "feedback": 7 + 6}


def test_the_real_kuairand_has_every_shown_video(tmp_path: Path) -> None:
    for name in ("kuairand_impressions_8d", "kuairand_users", "kuairand_videos"):
        (tmp_path / f"{name}.parquet").symlink_to(shared(f"{name}.parquet"))
    # A part of the history is enough: all of it takes 8 s.
    history = pq.read_table(shared("kuairand_history.parquet")).slice(0, 100)
    pq.write_table(history, tmp_path / "kuairand_history.parquet")
    counts = convert_kuairand(tmp_path, tmp_path / "out")
    assert counts["impressions"] == 129_311
    lengths = [len(m.items) for m in events(tmp_path / "out" / "impressions.parquet", Impression)]
    assert sum(lengths) == 130_321
