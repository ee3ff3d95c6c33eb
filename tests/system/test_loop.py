"""Twenty thousand events through running services on real Kafka and Redis: each is learned once, and answers follow."""

from __future__ import annotations

import base64
import contextlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from kafka import KafkaProducer

from recsys.evaluation.measures import auc
from recsys.state.open_state import open_state
from recsys.testing.servers import Server
from recsys.testing.world import World
from tests.shared_data import shared
from tests.system import ledger
from tests.system.embedded import recsys, wait_for
from tests.system.services import Services, now_ms, on_servers, scrape

ROUNDS, REQUESTS, BACKGROUND = 20, 35, 450
LEARNED_EVERY = 5
"""Rounds after which all labels are waited for: what the AUC measures must not depend on the speed of the machine."""
N = 20
ENOUGH = 15_000
AUC = 0.60
BAD = [
    ("feedback", b"not json"),
    ("feedback", b'{"version":1,"event_id":"b1","user_id":"bad","item_id":"item-1","type":"click"}'),
    ("feedback", b'{"version":2,"event_id":"b2","user_id":"bad","item_id":"item-1","type":"click","time_ms":1}'),
    ("feedback", b'{"version":1,"event_id":"b3","user_id":"bad","item_id":"item-1","type":"$x","time_ms":1}'),
    ("feedback", b'{"version":1,"event_id":"b4","user_id":"bad","itemid":"item-1","type":"click","time_ms":1}'),
    ("impression", b'{"version":1,"request_id":"b5","user_id":"bad","time_ms":1,"items":[]}'),
    ("impression", b"\xff\xfe"),
    ("item", b'{"version":1,"item_id":"b6","attributes":{"category":{}}}'),
]
"""(topic, value): made bad on purpose."""


@pytest.fixture
def system(kafka: Server, redis: Server, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Services]:
    name = request.node.name.replace("test_", "")[:20]
    extra = on_servers(kafka, redis, name) + "training.checkpoint_s = 5\n"
    with contextlib.closing(Services(tmp_path, extra)) as running:
        yield running.start()


@dataclass
class Seen:
    """What the world's users saw, and did: one entry an item shown."""

    predictions: list[float] = field(default_factory=list)
    best: list[float] = field(default_factory=list)
    clicks: list[bool] = field(default_factory=list)


class Stream:
    """The world's users at work: they click what they like, with or without having been shown a list."""

    def __init__(self, system: Services, kafka: Server, threads: ThreadPoolExecutor) -> None:
        self.system, self.threads = system, threads
        self.world, self.rng = World(num_users=40, num_items=400, num_kinds=8, taste=2.0), np.random.default_rng(1)
        self.seen, self.sent = Seen(), Counter[str]()
        self.shown: list[tuple[str, str, list[str]]] = []
        self._producer = KafkaProducer(bootstrap_servers=f"127.0.0.1:{kafka.port}", acks="all", linger_ms=5)
        self._prefix = system.loaded.log.topic_prefix
        ids = [item.item_id for item in self.world.items()]
        chance = np.stack([self.world.probability(user, ids) ** 2 for user in range(len(self.world.users))])
        self._ids, self._chance = np.array(ids), np.cumsum(chance / chance.sum(1, keepdims=True), axis=1)

    def event(self, user_id: str, item_id: str, **more: Any) -> dict[str, Any]:
        """A click of a moment ago: client times are not in the order of the log."""
        self.sent["events"] += 1
        event = {"version": 1, "event_id": f"e-{self.sent['events']}", "user_id": user_id, "item_id": item_id}
        return event | {"type": "click", "time_ms": now_ms() - int(self.rng.integers(10_000)), **more}

    def background(self) -> list[dict[str, Any]]:
        """Clicks outside any list."""
        events = []
        for _ in range(BACKGROUND):
            user = self.world.any_user()
            item = min(int(np.searchsorted(self._chance[user], self.rng.random())), len(self._ids) - 1)
            events.append(self.event(self.world.users[user], str(self._ids[item])))
        return events

    def answers(self) -> list[dict[str, Any]]:
        """Lists shown to users; their clicks, and likes of some of what was clicked."""
        users = [self.world.any_user() for _ in range(REQUESTS)]
        asked = [{"user_id": self.world.users[user], "n": N} for user in users]
        answers = self.threads.map(lambda body: self.system.call("POST", "/v1/recommend", body), asked)
        events = []
        for user, answer in zip(users, answers, strict=True):
            assert len(answer["items"]) == N
            ids = [item["item_id"] for item in answer["items"]]
            clicks = self.world.clicks(user, ids)
            self.shown.append((self.world.users[user], answer["request_id"], ids))
            self.seen.predictions += [item["predictions"]["click"] for item in answer["items"]]
            self.seen.best += self.world.probability(user, ids).tolist()
            self.seen.clicks += clicks.tolist()
            for item_id in np.array(ids)[clicks].tolist():
                about = self.world.users[user], item_id
                events.append(self.event(*about, request_id=answer["request_id"]))
                if self.rng.random() < 0.3:
                    events.append(self.event(*about, request_id=answer["request_id"], type="like"))
        return events

    def over_http(self, events: Sequence[dict[str, Any]], status: str = "accepted") -> None:
        outcomes = self.system.call("POST", "/v1/feedback", {"events": list(events)})["outcomes"]
        assert [o["status"] for o in outcomes] == [status] * len(events)
        self.sent[f"http_{status}"] += len(events)

    def into_topic(self, events: Sequence[dict[str, Any]]) -> None:
        """Any producer's way: plain kafka-python, key = user_id."""
        for event in events:
            self.put("feedback", event["user_id"], json.dumps(event).encode())
        self._producer.flush()

    def put(self, topic: str, key: str, value: bytes) -> None:
        self._producer.send(self._prefix + topic, key=key.encode(), value=value)

    def play(self) -> None:
        """Half of everything over HTTP, half straight into the topic; a tenth of each a second time."""
        first = self.background()
        self.over_http(first)
        wait_for(lambda: self.system.history(first[-1]["user_id"]), "the first clicks in the histories")
        for number in range(ROUNDS):
            background, reactions = self.background(), self.answers()
            self.over_http(background[::2] + reactions[::2])
            self.into_topic(background[1::2] + reactions[1::2])
            self.over_http((background[::2] + reactions[::2])[::10], "duplicate")
            self.into_topic((background[1::2] + reactions[1::2])[::10])
            self.settle(learned=number % LEARNED_EVERY == LEARNED_EVERY - 1)
            if number == ROUNDS // 2:
                user_id, request_id, ids = self.shown[-1]
                other = next(item_id for item_id in self._ids.tolist() if item_id not in ids)
                self.over_http([self.event(user_id, other, request_id=request_id)])
                for topic, value in BAD:
                    self.put(topic, "bad", value)

    def settle(self, *, learned: bool) -> None:
        """Wait until answers know all that was sent, and where `learned` until all labels of the lists are learned, too."""
        sent_ms = now_ms()
        wait_for(lambda: self._known_ms() >= sent_ms, "answers that know what was sent", 60.0)
        if learned:
            labels = N * len(self.shown)
            wait_for(lambda: self.system.metric("recsys_examples_total", "trainer") >= 2 * labels, "labels", 60.0)

    def _known_ms(self) -> int:
        answer = self.system.call("POST", "/v1/recommend", {"user_id": "nobody", "candidates": []})
        known: int = answer["as_of"]["user_state"]["time_ms"]
        return known

    def close(self) -> None:
        self._producer.close()


@pytest.fixture
def stream(system: Services, kafka: Server) -> Iterator[Stream]:
    with ThreadPoolExecutor(8) as threads:
        playing = Stream(system, kafka, threads)
        items = [
            {"version": 1, "item_id": i.item_id, "title": i.title, "attributes": dict(i.attributes)}
            for i in playing.world.items()
        ]
        system.call("PUT", "/v1/items", {"items": items})
        wait_for(lambda: system.metric("recsys_catalogue_items") == len(items), "the catalogue")
        yield playing
        playing.close()


@pytest.mark.system
def test_events_through_http_and_kafka_are_learned_once_and_change_answers(system: Services, stream: Stream) -> None:
    bad = [value for _, value in BAD]
    stream.play()
    lists_follow_clicks(system, stream)
    open_lists = ledger.of(system.loaded, system.records("impression"), system.records("feedback"), bad)
    ledger.wait_until_learned(system, open_lists.labels)
    user_id, request_id, ids = stream.shown[0]
    stream.over_http([stream.event(user_id, item_id, request_id=request_id) for item_id in ids[:5]])
    records = {topic: system.records(topic) for topic in ("item", "impression", "feedback")}
    assert sum(map(len, records.values())) >= ENOUGH
    expected = ledger.of(system.loaded, records["impression"], records["feedback"], bad)
    assert expected.labels == open_lists.labels and min(expected.labels.values()) > 100
    assert expected.outcomes["too_late"] >= 5 and expected.outcomes["unknown_item"] == 1
    ledger.check_outcomes(system, expected)
    histories_lie_in_redis(system, expected)
    for status in ("accepted", "duplicate"):
        assert system.samples("ranking", "recsys_feedback_total")[status,] == stream.sent[f"http_{status}"]
    only_what_was_bad_is_dead(system)
    freshness_was_measured(system)
    predictions_are_good(stream.seen)


def lists_follow_clicks(system: Services, stream: Stream) -> None:
    kinds = {item.item_id: item.attributes["category"] for item in stream.world.items()}

    def count(kind: str) -> int:
        answer = system.call("POST", "/v1/recommend", {"user_id": "newcomer", "n": N})
        return sum(kinds[item["item_id"]] == kind for item in answer["items"])

    kind, before = min(((kind, count(kind)) for kind in sorted(set(kinds.values()))[:3]), key=lambda pair: pair[1])
    chosen = [item_id for item_id in kinds if kinds[item_id] == kind][:3]
    stream.over_http([stream.event("newcomer", item_id) for item_id in chosen])
    wait_for(lambda: count(kind) >= before + 3, f"a list with three more of {kind} than {before}", 60.0)


def histories_lie_in_redis(system: Services, expected: ledger.Ledger) -> None:
    ledger.check_histories(system, expected)
    store = open_state(system.loaded)
    for user, events in expected.histories.items():
        assert [event.event_id for event in store.get(user).history] == events
    store.close()


def only_what_was_bad_is_dead(system: Services) -> None:
    letters = [json.loads(record.value) for record in system.records("dead_letter")]
    assert Counter((le["topic"], base64.b64decode(le["value"])) for le in letters) == Counter(BAD)
    assert all(letter["reason"] and letter["key"] == "bad" for letter in letters)


def freshness_was_measured(system: Services) -> None:
    for service, kind in (("ranking", "user_state"), ("ranking", "counters"), ("parameter", "parameters")):
        buckets = sorted(
            (float(labels["le"]), value)
            for name, labels, value in scrape(system.url(service))
            if name == "recsys_freshness_seconds_bucket" and labels["kind"] == kind
        )
        assert buckets[-1][1] > 0, kind
        p50 = next(le for le, count in buckets if count >= buckets[-1][1] / 2)
        print(f"freshness of {kind}: p50 <= {p50} s over {buckets[-1][1]:.0f}")


def predictions_are_good(seen: Seen) -> None:
    """Each prediction was made before its click: the AUC of the later half, beside the best that can be had."""
    half = len(seen.clicks) // 2
    clicks = np.array(seen.clicks[half:])
    found, best = (auc(np.array(values[half:]), clicks) for values in (seen.predictions, seen.best))
    print(f"progressive AUC {found:.3f}, best possible {best:.3f}, click rate {clicks.mean():.3f} of {len(clicks)}")
    assert found >= AUC


@pytest.mark.system
def test_real_clicks_are_learned_once(system: Services, tmp_path: Path) -> None:
    """Five thousand clicks of real readers of news, by `recsys send`, their feedback straight into the topic."""
    file, events = tmp_path / "globo.parquet", tmp_path / "events"
    pq.write_table(pq.read_table(shared("globo_clicks_5d.parquet")).slice(0, 5000), file)
    done = recsys("data", "convert", "globo", file, events)
    assert done.returncode == 0, done.stderr
    how = ("--rate", "400", "--requests", "first", "--to", "kafka", "--json")
    done = recsys("send", "--config", system.config, "--events", events, *how, timeout_s=300.0)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["sent"] == result["accepted"] == 5000 and result["requests"] > 500, result
    records = {topic: system.records(topic) for topic in ("impression", "feedback")}
    assert len(records["feedback"]) == 5000
    expected = ledger.of(system.loaded, records["impression"], records["feedback"])
    assert expected.labels["1", "click"] > 10, expected.labels
    ledger.wait_until_learned(system, expected.labels)
    ledger.check_outcomes(system, expected)
    sample = dict(list(expected.histories.items())[:300])
    ledger.check_histories(system, ledger.Ledger(**{**vars(expected), "histories": sample}))
    assert system.records("dead_letter") == []
