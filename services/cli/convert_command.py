"""Turn known public data sets into event files: what `recsys data convert` does.

Each function reads files of known names and columns, writes `items`, `impressions` and `feedback` into a folder and
returns the rows of each. The output depends on the input only. BadInput names file, column and remedy.
"""

from __future__ import annotations

import argparse
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import Progress as Bar

from recsys.errors import BadInput
from recsys.events.event_files import check_order, write_events
from recsys.types import Feedback, Impression, Item, ShownItem
from services.cli import column_checks
from services.cli.column_checks import INTEGER, INTEGERS, LABEL, NUMBER, SCALAR, TEXT, TIME_MS, TIME_S, WHOLE, Rules
from services.cli.main import DONE, emit

Progress: TypeAlias = Callable[[str, int, int], None]
"""Called with (what is written, rows done, rows in all) every few thousand rows."""
T = TypeVar("T")

# What the user did goes into feedback, never into features: `play_time_ms`, the stay times and every `is_*` but the user's.
_LABELS = {"is_click": "click", "long_view": "long_view", "is_like": "like", "is_follow": "follow"} | {
    "is_comment": "comment",
    "is_forward": "forward",
    "is_hate": "hate",
}
_USER_CONTEXT = (
    "user_active_degree",
    "follow_user_num_range",
    "fans_user_num_range",
    "friend_user_num_range",
    "register_days_range",
    "is_lowactive_period",
    "is_live_streamer",
    "is_video_author",
)
_VIDEO_COLUMNS = {
    "author_id": (INTEGER, True),
    "tag": (TEXT, True),
    "upload_dt": (TEXT, True),
    "video_type": (TEXT, True),
    "upload_type": (TEXT, True),
    "music_id": (WHOLE, True),
    "music_type": (WHOLE, True),
    "video_duration": (NUMBER, True),
}
_SHOWN_VIDEO_COLUMNS = {name: _VIDEO_COLUMNS[name] for name in ("author_id", "tag", "upload_dt")} | {
    "duration_ms": (NUMBER, True)
}
_DURATIONS_S = (7, 15, 30, 60, 120, 240)
"""Bounds of the duration buckets: roughly equal numbers of videos in each."""
_GLOBO_CONTEXT = ("environment", "device_group", "os", "country", "region", "referrer_type")
_ID = (INTEGER, False)
_CHINA_H = 8
"""KuaiRand's users live at UTC+8: the hour of the day is theirs."""
_HISTORY_STEP_MS = 1000
_NEVER = 2**62


def run(arguments: argparse.Namespace) -> int:
    """`recsys data convert`: progress on stderr, the rows of each file on stdout."""
    convert = {"kuairand": convert_kuairand, "globo": convert_globo, "movielens": convert_movielens}[arguments.kind]
    with Bar(console=Console(stderr=True)) as bar:
        tasks = {what: bar.add_task(what, total=None) for what in ("impressions", "feedback")}
        counts = convert(
            arguments.source,
            arguments.out,
            jsonl=arguments.jsonl,
            progress=lambda what, done, total: bar.update(tasks[what], completed=done, total=total),
        )
    rows = ", ".join(f"{count:,} {name}" for name, count in counts.items())
    emit(arguments, counts, f"{arguments.out}: {rows}")
    return DONE


def convert_kuairand(
    folder: Path | str, out: Path | str, *, jsonl: bool = False, progress: Progress | None = None
) -> dict[str, int]:
    """KuaiRand: rows of one user and millisecond are one request; labels come at once; older history has no request.

    Feedback types: `click`, `long_view`, `like`, `follow`, `comment`, `forward`, `hate`; in the history `watch`,
    `long_view` and `like`. The history file gives an order without times: videos are dated one second apart, the last
    at min(last_time_ms, the user's first impression − 1 s); liked and long-watched ones beyond the watched come first.
    """
    folder = Path(folder)
    paths = sorted(folder.glob("kuairand_impressions*.parquet"))
    if not paths:
        raise BadInput(f"folder {str(folder)!r} has no kuairand_impressions*.parquet: name another", field="folder")
    outcomes = dict.fromkeys(_LABELS, (LABEL, False))
    rules = {
        "user_id": _ID,
        "video_id": _ID,
        "time_ms": (TIME_MS, False),
        "tab": _ID,
        **outcomes,
        **_SHOWN_VIDEO_COLUMNS,
    }
    shown = pa.concat_tables([_table(path, rules) for path in paths], promote_options="permissive")
    shown = shown.take(np.lexsort((_numbers(shown, "user_id"), _numbers(shown, "time_ms"))))
    shown = _first_of_each(shown)
    users = _table(folder / "kuairand_users.parquet", {"user_id": _ID, **dict.fromkeys(_USER_CONTEXT, (SCALAR, True))})
    videos = _table(folder / "kuairand_videos.parquet", {"video_id": _ID, **_VIDEO_COLUMNS})
    sequences = dict.fromkeys(("watch_seq", "like_seq", "long_watch_seq"), (INTEGERS, True))
    history = _table(
        folder / "kuairand_history.parquet", {"user_id": _ID, "last_time_ms": (TIME_MS, False), **sequences}
    )
    feedback = _kuairand_feedback(shown, history)
    num_requests = shown.select(["user_id", "time_ms"]).group_by(["user_id", "time_ms"]).aggregate([]).num_rows
    return write_events(
        out,
        _kuairand_items(videos, shown, {item for _, _, item, _, _ in feedback}),
        _counted("impressions", _kuairand_impressions(shown, users), num_requests, progress),
        _counted("feedback", map(_kuairand_event, feedback), len(feedback), progress),
        jsonl=jsonl,
    )


def convert_globo(
    file: Path | str, out: Path | str, *, jsonl: bool = False, progress: Progress | None = None
) -> dict[str, int]:
    """Globo: a click log in time order. Items are bare ids; there are no impressions."""
    file = Path(file)
    context = dict.fromkeys(_GLOBO_CONTEXT, (SCALAR, True))
    rules = {"user_id": _ID, "session_id": _ID, "item_id": _ID, "time_ms": (TIME_MS, False), **context}
    column_checks.check(file, rules)
    known = pq.read_table(file, columns=["item_id", "time_ms"])
    check_order(str(file), _numbers(known, "time_ms"), 0, 0)
    item_ids = known["item_id"]
    items = (Item(item_id=str(i)) for i in sorted(pc.unique(item_ids).to_pylist()))
    feedback = _counted("feedback", _globo_feedback(file, tuple(rules)), len(item_ids), progress)
    return write_events(out, items, (), feedback, jsonl=jsonl)


def convert_movielens(
    folder: Path | str, out: Path | str, *, jsonl: bool = False, progress: Progress | None = None
) -> dict[str, int]:
    """MovieLens: a rating of 4 or 5 stars is a `click`, a lower one a `rating`, its stars the `value`; there are no impressions."""
    folder = Path(folder)
    movies = _table(folder / "ml1m_movies.parquet", {"movie_id": _ID, "title": (TEXT, True), "genres": (TEXT, True)})
    rules = {"user_id": _ID, "movie_id": _ID, "rating": (NUMBER, False), "timestamp": (TIME_S, False)}
    ratings = _table(folder / "ml1m_ratings.parquet", rules)
    ratings = ratings.take(np.argsort(_numbers(ratings, "timestamp"), kind="stable"))
    items = (
        Item(item_id=str(m), title=title or "", attributes={"genres": genres.split("|")} if genres else {})
        for m, title, genres in _rows(movies, movies.column_names)
    )
    feedback = (
        Feedback(
            event_id=f"{user}-{movie}",
            user_id=str(user),
            item_id=str(movie),
            type="click" if rating >= 4 else "rating",
            time_ms=seconds * 1000,
            value=float(rating),
        )
        for user, movie, rating, seconds in _rows(ratings, ratings.column_names)
    )
    return write_events(out, items, (), _counted("feedback", feedback, ratings.num_rows, progress), jsonl=jsonl)


def _table(path: Path, rules: Rules) -> Any:
    column_checks.check(path, rules)
    return pq.read_table(path, columns=list(rules))


def _numbers(table: Any, name: str) -> Any:
    return table[name].to_numpy()


def _rows(table: Any, columns: Iterable[str]) -> Iterator[tuple[Any, ...]]:
    return zip(*(table[name].to_pylist() for name in columns), strict=True)


def _counted(what: str, stream: Iterable[T], total: int, progress: Progress | None) -> Iterator[T]:
    done = 0
    for done, value in enumerate(stream, 1):
        if progress and done % 8192 == 0:
            progress(what, done, total)
        yield value
    if progress:
        progress(what, done, total)


def _present(values: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value for name, value in values if value is not None}


def _globo_feedback(file: Path, names: tuple[str, ...]) -> Iterator[Feedback]:
    for batch in pq.ParquetFile(file).iter_batches(columns=list(names)):
        for user, session, item, time_ms, *values in _rows(batch, names):
            yield Feedback(
                event_id=f"{user}-{item}-{time_ms}",
                user_id=str(user),
                item_id=str(item),
                type="click",
                time_ms=time_ms,
                session_id=str(session),
                context=_present(zip(_GLOBO_CONTEXT, values, strict=True)),
            )


def _first_of_each(shown: Any) -> Any:
    """Without rows that repeat user, video and time: files may overlap."""
    keys = zip(*(_numbers(shown, name).tolist() for name in ("time_ms", "user_id", "video_id")), strict=True)
    seen: dict[tuple[int, ...], int] = {}
    for row, key in enumerate(keys):
        seen.setdefault(key, row)
    return shown.take(list(seen.values())) if len(seen) < shown.num_rows else shown


def _kuairand_items(videos: Any, shown: Any, others: set[int]) -> Iterator[Item]:
    """All videos that are described, shown or in a history, by id; described in `videos`, else by their first impression."""
    described = {i: _video(dict(zip(_VIDEO_COLUMNS, v, strict=True))) for i, *v in _rows(videos, videos.column_names)}
    for video, *values in _rows(shown, ("video_id", *_SHOWN_VIDEO_COLUMNS)):
        if video not in described:
            described[video] = _video(dict(zip(_SHOWN_VIDEO_COLUMNS, values, strict=True)))
    for video in sorted(described.keys() | others):
        yield Item(item_id=str(video), attributes=described.get(video, {}))


def _video(v: dict[str, Any]) -> dict[str, Any]:
    duration_ms = v.get("video_duration", v.get("duration_ms"))
    attributes = {
        "author": v["author_id"],
        "tag": v["tag"].split(",") if v["tag"] else None,
        "upload_dt": v["upload_dt"],
        "video_type": v.get("video_type"),
        "upload_type": v.get("upload_type"),
        "music_id": _whole(v.get("music_id")),
        "music_type": _whole(v.get("music_type")),
        "duration": None if duration_ms is None else _duration(duration_ms / 1000),
    }
    return _present(attributes.items())


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def _duration(seconds: float) -> str:
    bounds = ("0", *map(str, _DURATIONS_S), "")
    bucket = bisect_right(_DURATIONS_S, seconds)
    return f"{bounds[bucket]}-{bounds[bucket + 1]} s" if bounds[bucket + 1] else f"{bounds[bucket]}+ s"


def _kuairand_impressions(shown: Any, users: Any) -> Iterator[Impression]:
    contexts = {
        user: _present(zip(_USER_CONTEXT, values, strict=True)) for user, *values in _rows(users, users.column_names)
    }
    rows = _rows(shown, ("time_ms", "user_id", "video_id", "tab"))
    for (time_ms, user), group in groupby(rows, lambda row: row[:2]):
        requested = list(group)
        hour = (time_ms // 3_600_000 + _CHINA_H) % 24
        yield Impression(
            request_id=f"{user}-{time_ms}",
            user_id=str(user),
            time_ms=time_ms,
            items=tuple(ShownItem(item_id=str(row[2]), position=n) for n, row in enumerate(requested, 1)),
            context={"tab": requested[0][3], "hour": hour, **contexts.get(user, {})},
        )


Event: TypeAlias = tuple[int, int, int, str, int]
"""Time, user, video, type; and the place in the user's history from 0, or −1 for an impression's outcome."""


def _kuairand_feedback(shown: Any, history: Any) -> list[Event]:
    """Everything that users did, in time order; at equal times histories first."""
    first_ms: dict[int, int] = {}
    for user, time_ms in _rows(shown, ("user_id", "time_ms")):
        first_ms.setdefault(user, time_ms)
    events = [
        event
        for user, last_time_ms, *sequences in _rows(history, history.column_names)
        for event in _history(user, min(last_time_ms, first_ms.get(user, _NEVER) - _HISTORY_STEP_MS), *sequences)
    ]
    for name, kind in _LABELS.items():
        rows = shown.filter(pc.equal(shown[name], 1))
        events += [(t, user, video, kind, -1) for t, user, video in _rows(rows, ("time_ms", "user_id", "video_id"))]
    return [events[i] for i in np.argsort(np.array([e[0] for e in events], np.int64), kind="stable")]


def _history(user: int, end_ms: int, watched: str | None, liked: str | None, long: str | None) -> Iterator[Event]:
    by_type = {"watch": _ids(watched), "long_view": _ids(long), "like": _ids(liked)}
    known = set(by_type["watch"])
    older = dict.fromkeys(v for kind in ("long_view", "like") for v in by_type[kind] if v not in known)
    videos = [*older, *by_type["watch"]]
    sets = {kind: set(ids) for kind, ids in by_type.items()}
    for n, video in enumerate(videos):
        time_ms = end_ms - (len(videos) - 1 - n) * _HISTORY_STEP_MS
        for kind, ids in sets.items():
            if video in ids:
                yield time_ms, user, video, kind, n


def _ids(text: str | None) -> list[int]:
    return list(map(int, text.split())) if text else []


def _kuairand_event(event: Event) -> Feedback:
    time_ms, user, video, kind, n = event
    return Feedback(
        event_id=f"{user}-{time_ms}-{video}-{kind}" if n < 0 else f"{user}-history-{n}-{kind}",
        user_id=str(user),
        item_id=str(video),
        type=kind,
        time_ms=time_ms,
        request_id=f"{user}-{time_ms}" if n < 0 else None,
    )
