"""What a user's feedback does to their own lists and to those of strangers, over HTTP."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from tests.system.embedded import ITEMS, Embedded, embedded, wait_for

pytestmark = pytest.mark.system

IDS = [item["item_id"] for item in ITEMS]


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Embedded]:
    with embedded(tmp_path_factory.mktemp("counts")) as running:
        running.call("PUT", "/v1/items", {"items": ITEMS})
        wait_for(lambda: running.metric("recsys_catalogue_items") == len(ITEMS), "the catalogue")
        yield running


def events(user: str, items: Sequence[str], kind: str = "click") -> list[dict[str, Any]]:
    return [
        {"event_id": f"{user}-{kind}-{n}", "user_id": user, "item_id": i, "type": kind} for n, i in enumerate(items)
    ]


def send(system: Embedded, sent: Sequence[dict[str, Any]]) -> None:
    """Send events, and wait until answers know the last of them."""
    outcomes = system.click(*sent)
    assert [o["status"] for o in outcomes] == ["accepted"] * len(sent)
    accepted = system.metric("recsys_feedback_total")

    def known() -> bool:
        as_of = system.call("POST", "/v1/recommend", {"user_id": "nobody", "n": 1})["as_of"]
        return all(as_of[part]["positions"]["feedback/0"] >= accepted for part in ("user_state", "counters"))

    wait_for(known, "the events in the counters")


def shown(system: Embedded, user: str, n: int = 100, **fields: Any) -> list[str]:
    answer = system.call("POST", "/v1/recommend", {"user_id": user, "n": n, **fields})
    return [item["item_id"] for item in answer["items"]]


def test_what_was_acted_upon_is_left_out_however_much_came_after(system: Embedded) -> None:
    send(system, [*events("fan", [*IDS[:20], *IDS[20:21] * 55]), *events("buyer", IDS[:60], "purchase")])
    assert not {*shown(system, "fan")} & {*IDS[:21]}
    assert not {*shown(system, "buyer")} & {*IDS[:60]}
    state = system.call("GET", "/v1/users/fan")
    assert {e["item_id"] for e in (*state["history"], *state["acted"])} == {*IDS[:21]}


def test_hidden_and_disliked_items_do_not_come_back(system: Embedded) -> None:
    first = shown(system, "picky", 4)
    hidden, disliked = first[:2], first[2:]
    both = [*events("picky", hidden[:1], "hide"), *events("picky", hidden[1:], "not_interested")]
    send(system, [*both, *events("picky", disliked, "dislike"), *events("picky", IDS[100:160])])
    assert not {*shown(system, "picky")} & {*first}
    assert not {*shown(system, "picky", candidates=first)}
    state = system.call("GET", "/v1/users/picky")
    assert state["hidden"] == hidden and {*disliked} <= {e["item_id"] for e in state["acted"]}
    system.call("DELETE", "/v1/users/picky", status=202)
    wait_for(lambda: not system.call("GET", "/v1/users/picky")["hidden"], "the user is forgotten")
    assert not system.call("GET", "/v1/users/picky")["acted"]
    assert {*shown(system, "picky", candidates=first)} == {*first}
