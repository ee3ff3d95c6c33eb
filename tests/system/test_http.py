"""Every route of the HTTP API, on the running embedded system."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote

import httpx
import jsonschema
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from services.ranking.app import Observe
from services.ranking.problems import install
from tests.system.embedded import ITEMS, NOW_MS, Embedded, wait_for

pytestmark = pytest.mark.system


def test_answer_has_exactly_the_promised_fields(running: Embedded) -> None:
    raw = running.http.post("/v1/recommend", json={"user_id": "fields", "n": 7, "context": {"device": "phone"}})
    answer = raw.json()
    assert answer.keys() == {
        "request_id",
        "items",
        "as_of",
        "model_version",
        "generation",
        "policy",
        "degraded",
        "note",
    }
    assert raw.headers["x-request-id"] == answer["request_id"]
    assert answer["as_of"].keys() == {"user_state", "counters", "parameters"}
    assert [item["position"] for item in answer["items"]] == list(range(1, 8))
    for item in answer["items"]:
        assert item.keys() == {
            "item_id",
            "title",
            "position",
            "sources",
            "score",
            "predictions",
            "propensity",
            "reason",
        }
        assert item["sources"] and item["reason"]
        assert item["predictions"].keys() == {"click", "like"}
        assert all(0 < p < 1 for p in item["predictions"].values())
        assert 0 < item["propensity"] <= 1


@pytest.mark.parametrize("n", [1, 20, 100])
def test_unknown_user_gets_as_many_items_as_asked_for(running: Embedded, n: int) -> None:
    assert len(running.call("POST", "/v1/recommend", {"user_id": f"stranger-{n}", "n": n})["items"]) == n


def test_candidates_exclude_session_and_activation_are_honoured(running: Embedded) -> None:
    asked = {
        "user_id": "rules",
        "session_id": "s1",
        "candidates": ["item-3", "unknown", "item-4", "item-3"],
        "exclude": ["item-4"],
        "activation": "deferred",
    }
    answer = running.call("POST", "/v1/recommend", asked)
    assert [(item["item_id"], item["sources"]) for item in answer["items"]] == [("item-3", ["caller"])]
    assert running.call("POST", "/v1/recommend", {"user_id": "rules", "candidates": []})["items"] == []
    # The deferred answer was not shown; the feedback behind it in the log says when it must have been read.
    running.click({"event_id": "rules-1", "user_id": "rules", "item_id": "item-9"})
    wait_for(lambda: running.history("rules"), "the click")
    assert "item-3" not in running.call("GET", "/v1/users/rules")["seen"]


def test_filters_pins_and_boosts_are_honoured_and_a_short_list_says_why(running: Embedded) -> None:
    kinds = {item["item_id"]: item["attributes"]["category"] for item in ITEMS}
    kind = kinds["item-1"]
    of_kind = [item_id for item_id, other in kinds.items() if other == kind]
    asked = {"user_id": "filters", "n": 100, "filters": {"category": [kind]}}
    answer = running.call("POST", "/v1/recommend", asked)
    assert {item["item_id"] for item in answer["items"]} == set(of_kind)
    assert answer["note"]
    pinned = asked | {"n": 3, "pins": [{"position": 2, "item_id": of_kind[-1]}]}
    assert running.call("POST", "/v1/recommend", pinned)["items"][1]["item_id"] == of_kind[-1]
    boosted = {"user_id": "filters", "n": 3, "boosts": [{"filters": {"category": kind}, "plus": 1000.0}]}
    boosted["candidates"] = list(kinds)
    assert {kinds[item["item_id"]] for item in running.call("POST", "/v1/recommend", boosted)["items"]} == {kind}
    nothing = running.call("POST", "/v1/recommend", {"user_id": "filters", "filters": {"tags": "nowhere"}})
    assert (nothing["items"], "tags any of nowhere" in nothing["note"]) == ([], True)


def test_filters_look_at_every_value_an_item_has(running: Embedded) -> None:
    """Features take the first four tags and the first category; what is sold out is so wherever it says it."""
    many = ["red", "metal", "desk", "led", "sold out"]
    running.call("PUT", "/v1/items", {"item_id": "five-tags", "attributes": {"category": "sale", "tags": many}})
    running.call("PUT", "/v1/items", {"item_id": "two-kinds", "attributes": {"category": ["sale", "sport"]}})

    def shown(**filters: Any) -> list[str]:
        answer = running.call("POST", "/v1/recommend", {"user_id": "all-values", "n": 100, "filters": filters})
        return sorted(item["item_id"] for item in answer["items"])

    wait_for(lambda: len(shown(category="sale")) == 2, "both items are in the catalogue")
    assert shown(category="sale", tags={"none": "sold out"}) == ["two-kinds"]
    assert shown(tags="sold out") == ["five-tags"]
    assert shown(tags={"all": ["red", "sold out"]}) == ["five-tags"]
    assert shown(category="sport") == ["two-kinds"]
    assert shown(category={"any": "sale", "none": "sport"}) == ["five-tags"]
    plain = {"item_id": "two-kinds", "attributes": {"category": "sale", "tags": many[::-1]}}
    running.call("PATCH", "/v1/items", plain)
    wait_for(lambda: shown(category="sport") == [], "the change is in the catalogue")
    assert shown(tags={"all": many}) == ["five-tags", "two-kinds"]
    for item_id in ("five-tags", "two-kinds"):
        running.call("DELETE", f"/v1/items/{item_id}")


def test_feedback_has_one_outcome_an_event_in_order(running: Embedded) -> None:
    one = {"version": 1, "user_id": "orders", "item_id": "item-1", "type": "click", "event_id": "orders-1"}
    assert running.call("POST", "/v1/feedback", one) == {"outcomes": [{"event_id": "orders-1", "status": "accepted"}]}
    outcomes = running.click(
        {"event_id": "orders-1", "user_id": "orders", "item_id": "item-1"},
        {"event_id": "orders-2", "user_id": "orders", "item_id": "item-2", "time_ms": "now"},
        {"event_id": "orders-3", "user_id": "orders", "item_id": "item-3"},
        {"event_id": "orders-3", "user_id": "orders", "item_id": "item-3"},
        {"event_id": 4, "user_id": "orders", "item_id": 5},
        {"user_id": "orders", "item_id": "item-6"},
    )
    assert [o["status"] for o in outcomes] == [
        "duplicate",
        "rejected",
        "accepted",
        "duplicate",
        "accepted",
        "accepted",
    ]
    assert [o["event_id"] for o in outcomes][:5] == ["orders-1", "orders-2", "orders-3", "orders-3", "4"]
    assert "time_ms = 'now'" in outcomes[1]["reason"]
    assert outcomes[5]["event_id"]
    wait_for(lambda: len(running.history("orders")) == 4, "four clicks")


def test_answers_cover_what_their_as_of_promises(running: Embedded) -> None:
    for turn in range(20):
        user = f"promise-{turn}"
        running.click({"event_id": user, "user_id": user, "item_id": "item-7", "time_ms": NOW_MS})
        accepted_ms = time.time_ns() // 1_000_000

        def covered(user: str = user, accepted_ms: int = accepted_ms) -> bool:
            answer = running.call("POST", "/v1/recommend", {"user_id": user, "n": 100})
            known = answer["as_of"]["user_state"]["time_ms"] >= accepted_ms
            # The history rule hides what was clicked: an answer that claims the click must not show the item.
            assert not known or "item-7" not in {item["item_id"] for item in answer["items"]}
            return known

        wait_for(covered, "an answer that covers the click")


def test_history_is_in_the_order_of_clients_times_and_only_the_future_is_clamped(running: Embedded) -> None:
    month_ms, now_ms = 30 * 86_400_000, time.time_ns() // 1_000_000
    times = {"clock-b": now_ms - 1000, "clock-2100": 4_102_444_800_000, "clock-1970": 0, "clock-a": now_ms - month_ms}
    outcomes = running.click(
        *({"event_id": e, "user_id": "clock", "item_id": "item-1", "time_ms": t} for e, t in times.items())
    )
    assert {o["status"] for o in outcomes} == {"accepted"}
    wait_for(lambda: len(running.history("clock")) == 4, "four clicks")
    events = running.call("GET", "/v1/users/clock")["history"]
    assert [e["event_id"] for e in events] == ["clock-1970", "clock-a", "clock-b", "clock-2100"]
    after_ms = time.time_ns() // 1_000_000
    assert [e["time_ms"] for e in events[:3]] == [0, now_ms - month_ms, now_ms - 1000]
    assert now_ms <= events[-1]["time_ms"] <= after_ms


def test_forgotten_user_is_gone(running: Embedded) -> None:
    path = "/v1/users/" + quote("forget/me ünd", safe="")
    running.click({"event_id": "forget-1", "user_id": "forget/me ünd", "item_id": "item-1"})
    wait_for(lambda: running.call("GET", path)["history"], "the click")
    assert running.call("DELETE", path, status=202)["status"] == "accepted"
    wait_for(lambda: not running.call("GET", path)["history"], "the end of the history")
    assert running.call("GET", path)["seen"] == []


@pytest.mark.parametrize("item_id", ["a/b", "日本 語", "a b", "a?b#c", "a//b", "%2F", "007", "-5"])
def test_item_lives_through_put_patch_get_delete(running: Embedded, item_id: str) -> None:
    path = "/v1/items/" + quote(item_id, safe="")
    running.call("PUT", "/v1/items", {"version": 1, "item_id": item_id, "title": "T", "attributes": {"color": "red"}})
    assert running.call("GET", path) == {"item_id": item_id, "title": "T", "attributes": {"color": "red"}}
    for change in ({"title": "U"}, {"attributes": {"size": 3}}, {"attributes": {"color": None}}):
        running.call("PATCH", "/v1/items", {"version": 1, "item_id": item_id, **change})
    assert running.call("GET", path) == {"item_id": item_id, "title": "U", "attributes": {"size": 3}}
    running.call("DELETE", path)
    assert running.call("GET", path, status=404)["field"] == "item_id"
    shown = running.call("POST", "/v1/recommend", {"user_id": "items", "candidates": [item_id, "item-1"]})["items"]
    assert [item["item_id"] for item in shown] == ["item-1"]


def test_item_batches_have_one_outcome_an_item(running: Embedded) -> None:
    good = {"version": 1, "item_id": "batch-1"}
    found = running.call("PUT", "/v1/items", {"items": [good, 5, {"version": 1, "item_id": "batch-2", "title": 5}]})
    assert [o["status"] for o in found["outcomes"]] == ["accepted", "rejected", "rejected"]
    assert found["outcomes"][2]["item_id"] == "batch-2"
    patches = [{**good, "title": "A"}, {**good, "attributes": {"x": "y"}}, {"version": 1, "item_id": "absent"}, None]
    found = running.call("PATCH", "/v1/items", {"items": patches})
    assert [o["status"] for o in found["outcomes"]] == ["accepted", "accepted", "rejected", "rejected"]
    assert running.call("GET", "/v1/items/batch-1") == {"item_id": "batch-1", "title": "A", "attributes": {"x": "y"}}
    found = running.call("DELETE", "/v1/items", {"item_ids": ["batch-1", {}]})
    assert [o["status"] for o in found["outcomes"]] == ["accepted", "rejected"]
    running.call("GET", "/v1/items/batch-1", status=404)


def test_pages_list_every_item_once(running: Embedded) -> None:
    found, cursor = [], 0
    while cursor is not None:
        page = running.call("GET", f"/v1/items?cursor={cursor}&limit=77")
        found += [item["item_id"] for item in page["items"]]
        cursor = page["next_cursor"]
    assert len(found) == len(set(found))
    assert {item["item_id"] for item in ITEMS} <= set(found)


def test_openapi_is_valid_and_its_examples_too(running: Embedded) -> None:
    document = running.call("GET", "/openapi.json")
    assert document["openapi"].startswith("3.1")
    bodies = 0
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert "422" not in operation["responses"], (path, method)
            assert "application/problem+json" in operation["responses"]["default"]["content"]
            if "requestBody" in operation:
                schema = operation["requestBody"]["content"]["application/json"]["schema"]
                jsonschema.Draft202012Validator.check_schema(schema)
                assert schema["examples"], (path, method)
                for example in schema["examples"]:
                    jsonschema.validate(example, schema)
                    status = running.http.request(method, path, json=example).status_code
                    assert status == 200, (path, method, example)
                bodies += 1
    assert bodies == 5
    assert "swagger" in running.http.get("/docs").text


def test_a_fault_of_ours_is_logged_under_an_id_and_not_leaked(caplog: pytest.LogCaptureFixture) -> None:
    application = FastAPI()
    install(application)
    application.add_middleware(Observe)

    @application.get("/")
    async def fault() -> None:
        raise ZeroDivisionError("a secret")

    answer = TestClient(application).get("/")
    assert (answer.status_code, answer.headers["content-type"]) == (500, "application/problem+json")
    assert "secret" not in answer.text
    assert answer.json()["request_id"] == answer.headers["x-request-id"]
    assert answer.json()["request_id"] in caplog.text
    assert "ZeroDivisionError: a secret" in caplog.text


def test_health_and_metrics_of_each_process(running: Embedded) -> None:
    for name in running.ports:
        for path, kind in (
            ("healthz", "application/json"),
            ("readyz", "application/json"),
            ("metrics", "text/plain"),
        ):
            answer = httpx.get(f"{running.url(name)}/{path}")
            assert (answer.status_code, answer.headers["content-type"].split(";")[0]) == (200, kind)
        lost = httpx.get(f"{running.url(name)}/nowhere")
        assert (lost.status_code, lost.headers["content-type"]) == (404, "application/problem+json")
        for method in ("HEAD", "OPTIONS", "TRACE"):
            assert httpx.request(method, f"{running.url(name)}/healthz").status_code in (200, 405, 501)


def test_fifty_parallel_requests_are_all_answered(running: Embedded) -> None:
    def ask(number: int) -> int:
        return httpx.post(
            f"{running.url('ranking')}/v1/recommend", json={"user_id": f"parallel-{number}"}, timeout=20.0
        ).status_code

    with ThreadPoolExecutor(50) as threads:
        assert set(threads.map(ask, range(50))) == {200}
