"""Valid files of every format that a command of `recsys` reads, a few rows each: what hostile input is made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from recsys.types import Feedback, Impression, Item, ShownItem

SMALL = {"model": {"dim": 4}}
PLAIN: dict[str, Any] = SMALL | {"training": {"two_tower": False}, "ranking": {"scorer": "sources"}}
"""Without a network: where words are wrong, not events."""
CONFIG: dict[str, Any] = {
    "data_dir": "data",
    "seed": 3,
    "tasks": [{"name": "click", "types": ["click"], "window_s": 60.0, "weight": 1.0}],
    "catalogue": {"attributes": ["category", "tags"], "multivalued": ["tags"]},
    "features": {"context": ["device"], "crosses": [], "numbers": ["price"]},
    "model": {"dim": 8, "attention": [16]},
    "ranking": {"host": "127.0.0.1", "port": 8123, "deadline_ms": 300},
    "training": {"batch_size": 64, "checkpoint_s": 30.0},
    "table": {"precision": "float32", "admission": 2},
    "log": {"kind": "sqlite"},
}


def toml(value: dict[str, Any]) -> str:
    """A table as TOML: what JSON says, in its words."""
    return "".join(f"{json.dumps(key)} = {_toml(each)}\n" for key, each in value.items())


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return '"null"' if value is None else json.dumps(value)


def world() -> tuple[list[Item], list[Impression], list[Feedback]]:
    """Twenty answers whose second position was drawn, and what was clicked."""
    pool = tuple((name, 0.25) for name in "abcd")
    items = [Item(item_id=name, title=name, attributes={"category": "c", "tags": ["t"]}) for name in ("top", *"abcd")]
    impressions, feedback = [], []
    for n in range(20):
        drawn = "abcd"[n % 4]
        shown = (
            ShownItem(item_id="top", position=1, propensity=1.0, score=9.0, predictions={"click": 0.5}),
            ShownItem(item_id=drawn, position=2, propensity=0.25, pool=pool, score=float(n % 4)),
        )
        user = f"u{n % 5}"
        impressions.append(Impression(request_id=f"r{n}", user_id=user, time_ms=n * 1000, items=shown))
        liked = {"event_id": f"e{n}", "user_id": user, "item_id": drawn, "time_ms": n * 1000, "request_id": f"r{n}"}
        feedback.append(Feedback(type=("click", "like")[n % 2], **liked))
    return items, impressions, feedback


def convertible(folder: Path) -> None:
    """The three public data sets, a few rows of each."""

    def write(name: str, *rows: dict[str, Any]) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(list(rows)), path)

    outcomes = dict.fromkeys(
        ["is_click", "is_like", "is_follow", "is_comment", "is_forward", "is_hate", "long_view"], 1
    )
    shown = {"user_id": 1, "video_id": 10, "time_ms": 1_650_000_000_000, "tab": 1, "author_id": 9, "tag": "3,4"}
    shown |= {"upload_dt": "2022-04-01", "duration_ms": 5000.0}
    write("kuairand/kuairand_impressions_1.parquet", *({**shown, **outcomes, "video_id": n} for n in (10, 11)))
    degrees = dict.fromkeys(["follow_user_num_range", "fans_user_num_range", "friend_user_num_range"], "0")
    flags = dict.fromkeys(["is_lowactive_period", "is_live_streamer", "is_video_author"], 0)
    write(
        "kuairand/kuairand_users.parquet",
        {"user_id": 1, "user_active_degree": "full", "register_days_range": "730+", **degrees, **flags},
    )
    video = {"video_id": 10, "author_id": 91, "tag": "5", "upload_dt": "2022-04-02", "video_type": "NORMAL"}
    video |= {"upload_type": None, "music_id": 7, "music_type": 9.0, "video_duration": 10_000.0}
    write("kuairand/kuairand_videos.parquet", video)
    history = {"user_id": 1, "last_time_ms": 1_649_000_000_000, "watch_seq": "10 20", "like_seq": "20"}
    write("kuairand/kuairand_history.parquet", history | {"long_watch_seq": "30 20"})
    click = {"user_id": 1, "session_id": 2, "item_id": 3, "time_ms": 1_500_000_000_000, "country": 1, "region": 21}
    click |= {"environment": 4, "device_group": 3, "os": 2, "referrer_type": 1}
    write("globo/clicks.parquet", *({**click, "item_id": n, "time_ms": click["time_ms"] + n} for n in range(3)))
    write("movielens/ml1m_movies.parquet", *({"movie_id": n, "title": f"Film {n}", "genres": "a|b"} for n in range(3)))
    rating = {"user_id": 1, "rating": 4.0, "timestamp": 978_300_000}
    write("movielens/ml1m_ratings.parquet", *({**rating, "movie_id": n} for n in range(3)))
