"""What serves is what replays: converted requests through the real services, then the trainer's journal run again on their log."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from recsys.clock import SystemClock
from recsys.events import messages
from recsys.events.event_files import merged, read_items
from recsys.features.build import decode
from recsys.model.layouts import layouts
from recsys.parameters.deltas import DeltaReader
from recsys.parameters.dense_weights import DenseWeights
from recsys.parameters.in_process import OwnRows
from recsys.parameters.store import ParameterStore
from recsys.ranking.scorer import Scorer
from recsys.streams.base import EventLog
from recsys.streams.open_log import open_log
from recsys.table.tables import Tables
from recsys.training.checkpoint import network_bytes
from recsys.training.journal import Journal
from recsys.training.trainer import Trainer
from recsys.types import Feedback, Impression, Record
from services.cli.convert_command import convert_kuairand
from tests.system.embedded import ROOT, wait_for
from tests.system.services import Services

REQUESTS = 2000
T = 1_650_000_000_000

pytestmark = [pytest.mark.system, pytest.mark.slow]


def kuairand(folder: Path) -> Path:
    """2,000 impressions of 300 users and 200 videos in KuaiRand's columns, a history each; converted."""
    rng = np.random.default_rng(0)
    author = [int(rng.integers(1000, 1040)) for _ in range(200)]
    tag = [str(int(rng.integers(1, 20))) for _ in range(200)]
    rows, likes = [], rng.random(300) < 0.2
    for n in range(REQUESTS):
        user, video = int(rng.integers(300)), int(200 * rng.random() ** 2)
        clicked = rng.random() < (0.7 if (user + int(tag[video])) % 2 else 0.2)
        shown = {"user_id": user, "video_id": video, "time_ms": T + n * 1000, "tab": n % 3, "author_id": author[video]}
        outcomes = {"is_click": clicked, "long_view": clicked and n % 2, "is_like": clicked and likes[user]}
        outcomes |= dict.fromkeys(("is_follow", "is_comment", "is_forward", "is_hate"), 0)
        attributes = {"tag": tag[video], "upload_dt": "2022-04-01", "duration_ms": 1000 * (5 + video)}
        rows.append(shown | attributes | {name: int(value) for name, value in outcomes.items()})
    users = ["user_active_degree", "follow_user_num_range", "fans_user_num_range", "friend_user_num_range"]
    users += ["register_days_range", "is_lowactive_period", "is_live_streamer", "is_video_author"]
    videos = ["author_id", "tag", "upload_dt", "video_type", "upload_type", "music_id", "music_type", "video_duration"]
    history = [
        {
            "user_id": u,
            "last_time_ms": T - 1,
            "watch_seq": f"{u % 200} {(u + 7) % 200}",
            "like_seq": f"{u % 200}" if likes[u] else None,
        }
        | {"long_watch_seq": f"{(u + 7) % 200}"}
        for u in range(300)
    ]
    for name, table in (
        ("impressions", rows),
        ("users", [dict.fromkeys(users, "x") | {"user_id": u} for u in range(300)]),
        ("videos", [dict.fromkeys(videos) | {"video_id": 0, "author_id": author[0], "tag": tag[0]}]),
        ("history", history),
    ):
        pq.write_table(pa.Table.from_pylist(table), folder / f"kuairand_{name}.parquet")
    convert_kuairand(folder, folder / "events")
    return folder / "events"


def settings() -> str:
    """The committed configuration; labels wait a second, not a minute, and no checkpoint cuts the journal."""
    text = (ROOT / "deploy" / "configs" / "kuairand.toml").read_text(encoding="utf-8")
    return text.replace("window_s = 60\n", "window_s = 1\n").replace("[training]\n", "[training]\ncheckpoint_s = 1e6\n")


def play(system: Services, events: Path) -> set[str]:
    """Every converted request with its own candidates, and what the user did right after it; which were answered from rows that
    ranking knew, the parameter service not being in time: those have no version."""
    degraded = set()
    items = [{"version": 1, "item_id": i.item_id, "attributes": dict(i.attributes)} for i in read_items(events)]
    system.call("PUT", "/v1/items", {"items": items})
    wait_for(lambda: system.metric("recsys_catalogue_items") == len(items), "the catalogue")
    outcomes: dict[str, list[Feedback]] = defaultdict(list)
    requests: list[Impression] = []
    before = []
    for _, kind, message in merged(events):
        if isinstance(message, Impression):
            requests.append(message)
        elif isinstance(message, Feedback) and message.request_id:
            outcomes[message.request_id].append(message)
        elif kind == "feedback":
            before.append({"user_id": message.user_id, "item_id": message.item_id, "type": message.type})
    for start in range(0, len(before), 500):
        system.click(*before[start : start + 500])
    for request in requests:
        candidates = [item.item_id for item in request.items]
        asked = {"user_id": request.user_id, "context": dict(request.context), "candidates": candidates, "n": 1}
        answer = system.call("POST", "/v1/recommend", asked)
        if answer["degraded"]:
            degraded.add(answer["request_id"])
        did = [{"user_id": f.user_id, "item_id": f.item_id, "type": f.type} for f in outcomes[request.request_id]]
        if did:
            system.click(*({**one, "request_id": answer["request_id"]} for one in did))
    return degraded


def served(log: EventLog, degraded: set[str]) -> dict[int, list[Impression]]:
    """The impressions made with trained networks, by the step of the rows that they were scored with; none of `degraded`."""
    found: dict[int, list[Impression]] = defaultdict(list)
    for record in all_of(log, "impression"):
        impression = messages.parse_impression(record.value)
        _, step, dense = map(int, impression.model_version.split("."))
        if dense > 1 and impression.request_id not in degraded:
            found[step].append(impression)
    return found


def all_of(log: EventLog, topic: str, start: int = 0, end: int | None = None) -> list[Record]:
    records: list[Record] = []
    end = log.end(topic, 0) if end is None else end
    while start < end:
        batch = [record for record in log.read(topic, 0, start, 1000) if record.offset < end]
        records += batch
        start = batch[-1].offset + 1
    return records


def test_the_journal_run_again_gives_equal_predictions_and_bit_equal_rows(tmp_path: Path) -> None:
    events = kuairand(tmp_path)
    with contextlib.closing(Services(tmp_path / "system", settings())) as system:
        degraded = play(system.start(), events)
        wait_for(lambda: system.metric("recsys_open_impressions", "trainer") == 0, "all windows closed")
        for name in ("trainer", "ranking", "parameter"):
            system.kill(name)
        config = system.loaded
    log = open_log(config, SystemClock(), "test")
    expected, dense = served(log, degraded), dict[int, bytes]()
    wanted = {int(i.model_version.split(".")[2]) for found in expected.values() for i in found}
    torch.set_num_threads(1)  # as the services: more would sum in another order
    trainer = Trainer(config, tmp_path / "again")
    store, reader = ParameterStore(layouts(config, trainer.schema), trainer.schema.hash), DeltaReader()
    deltas = [d for d in (reader.feed(record.value) for record in all_of(log, "parameters")) if d is not None]
    scorer = Scorer(config, trainer.schema, OwnRows(store.tables))
    positions, same, at = defaultdict[str, int](int), 0, 0
    for entry in Journal(config.data_dir / "trainer").entries(1):
        records = [
            r
            for topic in ("item", "impression", "feedback")
            if (key := f"{topic}/0") in entry.ends
            for r in all_of(log, topic, positions[key], entry.ends[key])
        ]
        trainer.step(records, entry)
        positions |= entry.ends
        if entry.step in wanted:
            dense[entry.step] = network_bytes(trainer)
        while at < len(deltas) and deltas[at].version.step <= entry.step:
            delta, at = deltas[at], at + 1
            store.apply(delta)
            if delta.version.step == entry.step:
                compare_rows(store.tables, trainer.tables, delta.rows)
            # A version may name two deltas, rows and dense weights: an answer in between had the first alone.
            left = expected.get(delta.version.step, [])
            expected[delta.version.step] = [i for i in left if not is_same(scorer, trainer, i, dense)]
            same += len(left) - len(expected[delta.version.step])
    different = sum(map(len, expected.values()))
    assert at == len(deltas)
    assert same > REQUESTS / 2
    # Whoever finds a delta half applied waits a millisecond, not for as long as its writer has no core.
    assert different <= same / 200
    log.close()


def compare_rows(serving: Tables, trained: Tables, changed: Sequence[Any]) -> None:
    """Every published row is the trainer's, bit for bit."""
    for rows in changed:
        ours, found = trained[rows.layout].lookup(rows.slots, rows.keys)
        theirs, known = serving[rows.layout].lookup(rows.slots, rows.keys)
        assert found.all() and known.all()
        np.testing.assert_array_equal(ours.view(np.int32), theirs.view(np.int32))


def is_same(scorer: Scorer, trainer: Trainer, impression: Impression, dense: dict[int, bytes]) -> bool:
    """Whether the features in the log give the predictions in the log."""
    version = int(impression.model_version.split(".")[2])
    if scorer.dense_version != version:
        assert isinstance(scorer.networks, DenseWeights)
        scorer.networks.load(dense[version], version)
    (again,) = scorer.predict([decode(trainer.schema, impression.features)])
    logged = [[item.predictions[task] for task in trainer.schema.tasks] for item in impression.items]
    return bool(np.allclose(again, np.array(logged), rtol=0, atol=1e-5))
