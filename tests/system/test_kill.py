"""kill -9 in the middle of a stream: nothing accepted is lost, nothing is learned twice, answers go on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from recsys.testing.world import World
from tests.system import ledger
from tests.system.embedded import wait_for
from tests.system.services import Services, now_ms, tasks

N = 10
WINDOW_S = 8.0
"""Longer than a busy machine takes to show some lists and kill a process."""

pytestmark = pytest.mark.system


class Stream:
    """Users who are shown lists and click; every event has an id of its own."""

    def __init__(self, system: Services) -> None:
        self.system, self.world = system, World(num_users=40, num_items=100, num_kinds=10)
        self.sent: list[dict[str, Any]] = []

    def lists(self, count: int) -> list[dict[str, Any]]:
        """Show lists; the clicks on them, not yet sent."""
        clicks = []
        for _ in range(count):
            user = self.world.any_user()
            user_id = self.world.users[user]
            answer = self.system.call("POST", "/v1/recommend", {"user_id": user_id, "n": N})
            ids = [item["item_id"] for item in answer["items"]]
            for item_id, clicked in zip(ids, self.world.clicks(user, ids).tolist(), strict=True):
                if clicked:
                    clicks.append(self.event(user_id, item_id, request_id=answer["request_id"]))
        return clicks

    def event(self, user_id: str, item_id: str, **more: Any) -> dict[str, Any]:
        self.sent.append({"event_id": f"k-{len(self.sent)}", "user_id": user_id, "item_id": item_id, **more})
        return {**self.sent[-1], "time_ms": now_ms()}

    def send(self, events: list[dict[str, Any]]) -> None:
        assert {outcome["status"] for outcome in self.system.click(*events)} == {"accepted"}

    def background(self, count: int) -> None:
        """Clicks outside any list."""
        ids = [item.item_id for item in self.world.items()]
        self.send([self.event(self.world.users[n % 40], ids[7 * n % 100]) for n in range(count)])


@pytest.fixture
def stream(tmp_path: Path) -> Iterator[Stream]:
    extra = tasks(WINDOW_S, WINDOW_S) + "training.checkpoint_s = 1\nparameter.snapshot_s = 1\n"
    with contextlib.closing(Services(tmp_path, extra)) as system:
        playing = Stream(system.start())
        items = [
            {"version": 1, "item_id": i.item_id, "title": i.title, "attributes": dict(i.attributes)}
            for i in playing.world.items()
        ]
        system.call("PUT", "/v1/items", {"items": items})
        playing.background(200)
        wait_for(lambda: system.metric("recsys_catalogue_items") == 100, "the catalogue")
        wait_for(lambda: len(system.call("POST", "/v1/recommend", {"user_id": "w", "n": N})["items"]) == N, "lists")
        yield playing


def expected(system: Services) -> ledger.Ledger:
    return ledger.of(system.loaded, system.records("impression"), system.records("feedback"))


def version(system: Services) -> tuple[int, int]:
    """(epoch, step) that answers are made with; an empty answer is no impression."""
    answer = system.call("POST", "/v1/recommend", {"user_id": "version", "candidates": []})
    positions = answer["as_of"]["parameters"]["positions"]
    return positions["epoch"], positions["step"]


def test_trainer_killed_amid_open_windows_learns_each_label_once(stream: Stream) -> None:
    system = stream.system
    stream.send(stream.lists(10))
    before = expected(system)
    ledger.wait_until_learned(system, before.labels)
    wait_for(lambda: system.metric("recsys_open_impressions", "trainer") == 0, "all windows closed")
    wait_for(lambda: system.metric("recsys_checkpoint_seconds_count", "trainer") > 0, "a checkpoint")
    epoch, step = version(system)
    clicks = stream.lists(10)
    stream.send(clicks[::2])
    opened = before.num_impressions + 10

    def joined() -> dict[tuple[str, ...], float]:
        return system.samples("trainer", "recsys_joined_total")

    wait_for(lambda: joined()["impression_opened",] == opened, "the trainer knows the open lists")
    counted = system.samples("trainer", "recsys_examples_total")
    system.kill("trainer")
    assert counted == before.labels, "the windows of the second half closed before the kill: nothing was tested"
    stream.send(clicks[1::2])
    stream.background(50)
    system.spawn("trainer")
    system.wait_ready("trainer")
    stream.send(stream.lists(10))
    after = expected(system)
    rest = {name: count - before.labels[name] for name, count in after.labels.items()}
    assert min(rest["1", "click"], rest["0", "click"]) > 0
    ledger.wait_until_learned(system, rest)
    wait_for(lambda: version(system) > (epoch + 1, step), f"parameters of epoch {epoch + 1} beyond step {step}")
    assert version(system)[0] == epoch + 1 == system.metric("recsys_trainer_epoch", "trainer")
    ledger.check_histories(system, after)
    assert system.records("dead_letter") == []


def test_answers_go_on_while_parameter_is_dead(stream: Stream) -> None:
    system = stream.system
    stream.send(stream.lists(5))
    ledger.wait_until_learned(system, expected(system).labels)
    known = version(system)
    system.kill("parameter")
    for _ in range(3):
        answer = system.call("POST", "/v1/recommend", {"user_id": "user-1", "n": N})
        assert len(answer["items"]) == N and "no_parameters" in answer["degraded"]
        assert answer["items"][0]["predictions"]["click"] > 0
    stream.send(stream.lists(10))
    learned = expected(system)
    ledger.wait_until_learned(system, learned.labels)
    system.spawn("parameter")
    system.wait_ready("parameter")

    def whole() -> bool:
        return not system.call("POST", "/v1/recommend", {"user_id": "user-1", "n": N})["degraded"]

    wait_for(whole, "answers that are not degraded")
    wait_for(lambda: version(system) > known, f"parameters beyond {known}")
    assert version(system)[0] == known[0]


def test_what_a_killed_ranking_had_accepted_is_kept(stream: Stream) -> None:
    system = stream.system
    stream.send(stream.lists(10))
    clicks = stream.lists(5)
    stream.send(clicks)
    system.kill("ranking")
    with pytest.raises(httpx.TransportError):
        system.call("POST", "/v1/recommend", {"user_id": "user-1", "n": N})
    system.spawn("ranking")
    system.wait_ready("ranking")
    assert {outcome["status"] for outcome in system.click(*clicks)} <= {"accepted", "duplicate"}
    records = system.records("feedback")
    final = expected(system)
    sent = {event["event_id"] for event in stream.sent}
    assert {event_id for events in final.histories.values() for event_id in events} <= sent
    assert len(records) >= len(sent)
    ledger.wait_until_learned(system, final.labels)
    ledger.check_histories(system, final)
