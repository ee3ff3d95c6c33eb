"""What strangers can fill has a bound, a behaviour at it and a gauge: nothing stops, and what is known goes on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from tests.system.embedded import wait_for
from tests.system.services import Services

pytestmark = pytest.mark.system

MEMORY = 10_000_000
"""For everything: 1 MB of items, .6 MB of open impressions, .2 MB of feedback ahead of its impression."""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    """Ranking and trainer with little room."""
    extra = f"capacity.memory_bytes = {MEMORY}\nranking.deadline_ms = 10000\n"
    with contextlib.closing(Services(tmp_path_factory.mktemp("small"), extra)) as system:
        for name in ("trainer", "ranking"):
            system.spawn(name)
        for name in ("trainer", "ranking"):
            system.wait_ready(name)
        yield system


def items(first: int, count: int) -> dict[str, Any]:
    return {"items": [{"item_id": f"item-{n}", "title": f"Thing {n}"} for n in range(first, first + count)]}


def test_a_full_catalogue_refuses_new_items_and_changes_those_it_has(small: Services) -> None:
    taken = 0
    while taken < 5000:
        answer = small.http.put("/v1/items", json=items(taken, 100))
        outcomes = answer.json()["outcomes"]
        accepted = [outcome for outcome in outcomes if outcome["status"] == "accepted"]
        taken += len(accepted)
        small.call("GET", "/v1/items/item-0")  # all that was accepted is in the catalogue
        if len(accepted) < 100:
            break
    assert 500 < taken < 3000 and small.metric("recsys_catalogue_items") == taken
    assert 0.9 < small.metric("recsys_catalogue_full_ratio") < 1
    assert "full" in outcomes[-1]["reason"] and "capacity.memory_bytes" in outcomes[-1]["reason"]
    answer = small.http.put("/v1/items", json={"item_id": "one-more"})
    assert answer.status_code == 503 and int(answer.headers["Retry-After"]) > 0
    small.call("PUT", "/v1/items", {"item_id": "item-7", "title": "changed"})
    assert small.call("GET", "/v1/items/item-7")["title"] == "changed"
    small.call("DELETE", "/v1/items", {"item_ids": [f"item-{n}" for n in range(100, 500)]})
    wait_for(lambda: small.metric("recsys_catalogue_full_ratio") < 0.85, "deleted items make room")
    small.call("PUT", "/v1/items", {"item_id": "one-more", "title": "new"})
    assert small.call("GET", "/v1/items/one-more")["title"] == "new"


def joined(system: Services) -> dict[str, float]:
    return {outcome: count for (outcome,), count in system.samples("trainer", "recsys_joined_total").items()}


def test_invented_requests_and_endless_lists_fill_bounded_room_and_an_honest_click_is_joined(small: Services) -> None:
    small.call("PUT", "/v1/items", items(0, 50))
    small.call("GET", "/v1/items/item-0")
    first = small.call("POST", "/v1/recommend", {"user_id": "honest", "n": 20})
    for start in range(0, 1000, 500):
        small.click(
            *(
                {"user_id": "u", "item_id": "item-1", "request_id": f"no-such-{start + n}", "event_id": f"e{start + n}"}
                for n in range(500)
            )
        )
    for n in range(200):
        small.call("POST", "/v1/recommend", {"user_id": f"u{n}", "n": 20})
    wait_for(lambda: joined(small).get("impression_no_room"), "there is no room for more open impressions")
    wait_for(lambda: joined(small).get("not_held"), "there is no room for more early feedback")
    for name in ("recsys_open_impressions_full_ratio", "recsys_held_feedback_full_ratio"):
        assert 0.8 < small.metric(name, "trainer") <= 1
    before = joined(small).get("joined", 0)
    small.click({"user_id": "honest", "item_id": first["items"][0]["item_id"], "request_id": first["request_id"]})
    wait_for(lambda: joined(small).get("joined", 0) == before + 1, "the honest click is joined")
