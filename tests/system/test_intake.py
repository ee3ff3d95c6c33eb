"""Feedback from many at once, in wrong forms and at wrong times, over HTTP: one outcome an event, one effect each."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.system.embedded import Embedded, recsys, wait_for

pytestmark = pytest.mark.system
DAY_MS = 86_400_000


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def notes(system: Embedded, *clicks: dict[str, Any]) -> list[str]:
    return [f"{outcome['status']} {outcome.get('note', '')}".strip() for outcome in system.click(*clicks)]


@pytest.mark.parametrize("claims", [None, 0, -1000, -2 * DAY_MS], ids=["no time", "now", "a second ago", "days ago"])
def test_a_storm_of_copies_has_one_accepted_and_one_effect(running: Embedded, claims: int | None) -> None:
    name = f"storm{claims}"
    event = {"event_id": name, "user_id": name, "item_id": "item-2"}
    if claims is not None:
        event["time_ms"] = now_ms() + claims
    with ThreadPoolExecutor(12) as pool:
        outcomes = [found[0]["status"] for found in pool.map(lambda _: running.click(event), range(12))]
    assert sorted(outcomes) == ["accepted"] + ["duplicate"] * 11
    running.click({"event_id": f"{name} after", "user_id": name, "item_id": "item-3"})
    wait_for(lambda: f"{name} after" in running.history(name), "the event after the storm")
    assert running.history(name) == [name, f"{name} after"]


def test_a_batch_without_ids_and_times_stays_in_order(running: Embedded) -> None:
    events = [{"user_id": "in order", "item_id": f"item-{n}", "type": "click"} for n in range(15)]
    running.call("POST", "/v1/feedback", {"events": events})
    wait_for(lambda: len(running.history("in order")) == 15, "all events")
    found = running.call("GET", "/v1/users/in order")["history"]
    assert [event["item_id"] for event in found] == [f"item-{n}" for n in range(15)]


def test_of_many_old_events_the_newest_stay_in_their_order(running: Embedded) -> None:
    first_ms = now_ms() - 100 * DAY_MS
    clicks = [
        {"event_id": f"old-{n}", "user_id": "old", "item_id": f"item-{n}", "time_ms": first_ms + n * DAY_MS}
        for n in range(70)
    ]
    assert set(notes(running, *clicks)) == {"accepted too_late"}
    wait_for(lambda: "old-69" in running.history("old"), "the last event")
    assert running.history("old") == [f"old-{n}" for n in range(20, 70)]


def test_notes_say_what_will_not_use_an_event(running: Embedded) -> None:
    before = running.metric('recsys_feedback_notes_total{note="unknown_type"}')
    request_id = running.call("POST", "/v1/recommend", {"user_id": "noted", "n": 1})["request_id"]
    about = {"user_id": "noted", "item_id": "item-1"}
    assert notes(running, about, {**about, "request_id": request_id}) == ["accepted", "accepted"]
    assert notes(running, {**about, "type": "Click"}, {**about, "item_id": "nowhere"}) == [
        "accepted unknown_type",
        "accepted unknown_item",
    ]
    running.call("PUT", "/v1/items", {"item_id": "just put"})
    assert notes(running, {**about, "item_id": "just put"}) == ["accepted"]
    assert notes(running, {**about, "time_ms": now_ms() + DAY_MS}, {**about, "request_id": "nobody's"}) == [
        "accepted clamped_time",
        "accepted unknown_request",
    ]
    assert running.metric('recsys_feedback_notes_total{note="unknown_type"}') == before + 1
    assert "no section of the configuration" in (running.data / "ranking.log").read_text()
    [seconds] = running.click({**about, "time_ms": now_ms() // 1000})
    assert seconds["status"] == "rejected" and "milliseconds" in seconds["reason"]


def test_one_bad_event_of_a_thousand_is_rejected_alone(running: Embedded) -> None:
    for number, bad in enumerate((float("nan"), "cut \ud83d")):
        events = [
            {"event_id": f"{number}-{n}", "user_id": f"bad{n}", "item_id": "item-1", "type": "click"}
            for n in range(1000)
        ]
        events[500]["value" if number == 0 else "session_id"] = bad  # type: ignore[assignment]
        answer = running.http.post("/v1/feedback", content=json.dumps({"events": events}))
        statuses = [outcome["status"] for outcome in answer.json()["outcomes"]]
        assert answer.status_code == 200 and statuses.count("accepted") == 999 and statuses[500] == "rejected"
    items = json.dumps({"items": [{"item_id": "whole"}, {"item_id": "cut", "title": "cut \ud83d"}]})
    outcomes = running.http.put("/v1/items", content="\ufeff" + items).json()["outcomes"]
    assert [outcome["status"] for outcome in outcomes] == ["accepted", "rejected"]


def test_a_history_is_imported_once_into_the_system_that_says_who_it_is(running: Embedded, tmp_path: Path) -> None:
    assert all(running.call("GET", "/v1/system")["log"][topic] for topic in ("item", "feedback"))
    path = tmp_path / "history.jsonl"
    about = {"version": 1, "user_id": "imported", "type": "click"}
    rows = [{**about, "item_id": f"item-{n}", "time_ms": now_ms() - (100 - n) * DAY_MS} for n in range(70)]
    path.write_text("\ufeff" + "".join(json.dumps(row) + "\n" for row in rows))
    for accepted in (70, 0):
        done = recsys("import", "events", path, "--json", "--url", running.url("ranking"))
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["accepted"] == accepted
    wait_for(lambda: len(running.history("imported")) == 50, "the newest of the history")
    found = running.call("GET", "/v1/users/imported")["history"]
    assert [event["item_id"] for event in found] == [f"item-{n}" for n in range(20, 70)]


def test_slow_large_bodies_are_bounded_together_and_nobody_waits_for_them(running: Embedded) -> None:
    ranking = psutil.Process(running.pids()["ranking"])
    before = ranking.memory_info().rss
    head = b"POST /v1/feedback HTTP/1.1\r\nHost: x\r\nContent-Length: 6000000\r\n\r\n"
    with contextlib.ExitStack() as stack:
        for _ in range(150):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", running.ports["ranking"]), 20.0))
            with contextlib.suppress(OSError):  # refused while it sends
                connection.sendall(head + b" " * 1_500_000)
        assert len(running.call("POST", "/v1/recommend", {"user_id": "other", "n": 3})["items"]) == 3
        assert running.click({"user_id": "other", "item_id": "item-1"})[0]["status"] == "accepted"
        assert ranking.memory_info().rss - before < 120e6
        assert running.metric("recsys_bodies_full_ratio") > 0.5
    wait_for(lambda: running.metric("recsys_bodies_full_ratio") == 0, "the end of the bodies")
    wait_for(lambda: ranking.memory_info().rss - before < 60e6, "the memory back")


def test_a_long_name_keeps_nobody_waiting(running: Embedded) -> None:
    name = "ab" * 3_000_000
    started_s = time.monotonic()
    for asked in ({name: 1}, {"filters": {name: 1}}, {"boosts": [{name: 1}]}, {"filters": {"category": {name: 1}}}):
        answer = running.http.post("/v1/recommend", json={"user_id": "u", **asked})
        assert answer.status_code == 400 and len(answer.content) < 2000
    assert time.monotonic() - started_s < 10


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics", "/v1/items", "/v1/users/u", "/v1/items/item-1"])
def test_head_answers_as_get_does_without_a_body(running: Embedded, path: str) -> None:
    head, get = running.http.head(path), running.http.get(path)
    assert (head.status_code, head.content) == (get.status_code, b"") == (200, b"")
    assert head.headers["content-type"] == get.headers["content-type"]


@pytest.mark.parametrize("method", ["GET", "DELETE"])
@pytest.mark.parametrize("thing", ["users", "items"])
@pytest.mark.parametrize(
    "name", ["%FF", "a%C3", "%ED%A0%80", "%00", "%", "%zz", "a%0Ab", "..%2f..", "%2e%2e/%2e%2e", "x" * 9000]
)
def test_a_malformed_path_is_the_clients_fault(running: Embedded, method: str, thing: str, name: str) -> None:
    with httpx.Client(timeout=20.0) as client:
        answer = client.send(client.build_request(method, raw_url(running, f"/v1/{thing}/{name}")))
    assert answer.status_code in (200, 202, 400, 404), answer.text
    if name in ("%FF", "a%C3", "%ED%A0%80", "%00"):
        assert answer.status_code == 400 and answer.json()["detail"]


def raw_url(system: Embedded, path: str) -> httpx.URL:
    """A URL whose path goes out as it is."""
    url = httpx.URL(system.url("ranking"))
    return url.copy_with(raw_path=path.encode())


def test_a_host_that_is_none_does_no_harm(running: Embedded) -> None:
    for path in ("/nowhere", "/v1/recommend"):
        assert running.http.get(path, headers={"Host": "[::1"}).status_code in (404, 405)
