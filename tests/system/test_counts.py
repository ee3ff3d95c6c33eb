"""What a user's feedback does to their own lists and to those of strangers, over HTTP."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from recsys.clock import ManualClock, SystemClock
from recsys.events import messages
from recsys.streams.sqlite_log import SqliteLog
from recsys.types import Feedback
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


def test_what_is_popular_is_found_after_the_two_hundred_hottest_were_deleted(system: Embedded) -> None:
    hot = [{**ITEMS[0], "item_id": f"hot-{n}"} for n in range(200)]
    system.call("PUT", "/v1/items", {"items": hot})
    ids, popular = [item["item_id"] for item in hot], IDS[100:120]
    wait_for(lambda: system.metric("recsys_catalogue_items") == len(ITEMS) + 200, "the hot items")
    send(system, [event for user in range(5) for event in events(f"early-{user}", ids)])
    send(system, [event for user in range(2) for event in events(f"late-{user}", popular)])
    system.call("DELETE", "/v1/items", {"item_ids": ids})
    wait_for(lambda: system.metric("recsys_catalogue_items") == len(ITEMS), "the deletion")
    for fields in ({}, {"filters": {"tags": "red"}}):
        items = system.call("POST", "/v1/recommend", {"user_id": "stranger", "n": 20, **fields})["items"]
        assert {i["item_id"] for i in items if "trending" in i["sources"]} == {*popular}
    assert {*popular} <= {*shown(system, "early-0")}


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


def count(system: Embedded, *items: str) -> dict[str, int]:
    """How often each was trending, in places of a stranger's list: -1 where it is not in it."""
    answer = shown(system, "stranger", 20)
    return {item: answer.index(item) if item in answer else -1 for item in items}


def test_twenty_newcomers_do_not_make_a_trend_and_two_hundred_people_do(system: Embedded) -> None:
    pushed, real = IDS[198], IDS[199]
    people = [events(f"person-{n}", [IDS[n % 40], IDS[(n * 7 + 3) % 40], IDS[(n * 11 + 5) % 40]]) for n in range(200)]
    send(system, [event for person in people for event in person])
    attack = [event for n in range(20) for event in events(f"fresh-{n}", [pushed] * 500)]
    for start in range(0, len(attack), 2000):
        system.click(*attack[start : start + 2000])
    send(system, [{**events(f"person-{n}", [real])[0], "event_id": f"real-{n}"} for n in range(200)])
    place = count(system, pushed, real)
    assert place[pushed] == -1 and 0 <= place[real] < 10
    assert system.metric("recsys_not_counted_total") >= 9900


def test_items_put_and_clicked_together_are_all_counted(system: Embedded) -> None:
    new = [{**ITEMS[0], "item_id": f"new-{n}", "title": "New"} for n in range(60)]
    for start in range(0, 60, 6):
        part = new[start : start + 6]
        ids = [item["item_id"] for item in part]
        clicks = [
            {"user_id": f"fan-{start}-{u}", "item_id": i, "type": "click"} for u in range(4) for i in (IDS[0], *ids)
        ]
        with ThreadPoolExecutor(2) as pool:
            both = [
                pool.submit(system.http.post, "/v1/feedback", json={"events": [{"version": 1, **c} for c in clicks]}),
                pool.submit(system.http.put, "/v1/items", json={"items": part}),
            ]
            assert all(sent.result().status_code in (200, 202) for sent in both)

    def trending() -> int:
        answer = system.call("POST", "/v1/recommend", {"user_id": "stranger", "n": 100})
        return sum(i["item_id"].startswith("new-") and "trending" in i["sources"] for i in answer["items"])

    wait_for(lambda: trending() == 60, "all sixty are trending")


def trends(system: Embedded) -> list[tuple[str, float, float]]:
    """A stranger's list: item, score, predicted click."""
    items = system.call("POST", "/v1/recommend", {"user_id": "stranger", "n": 20})["items"]
    return [(i["item_id"], i["score"], i["predictions"]["click"]) for i in items]


def test_a_clock_that_was_ahead_and_other_half_lives_leave_counts_what_they_were(system: Embedded) -> None:
    """The last test of this system: it is restarted."""
    now_ms = SystemClock().now_ms()
    ahead = SqliteLog(system.data / "log", clock=ManualClock(now_ms + 86_400_000))
    skewed = Feedback(event_id="skewed", user_id="skewed", item_id=IDS[0], type="click", time_ms=now_ms)
    ahead.append("feedback", [("skewed", messages.dump_feedback(skewed))])
    ahead.close()
    wait_for(lambda: system.history("skewed"), "the record of a clock a day ahead")
    send(system, [{**events(f"person-{n}", [IDS[150]])[0], "event_id": f"now-{n}"} for n in range(200)])
    assert IDS[150] in [item for item, _, _ in trends(system)[:5]]
    as_of = system.call("GET", "/v1/users/skewed")["as_of"]["time_ms"]
    assert now_ms - 60_000 < as_of <= SystemClock().now_ms()
    system.stop()
    with system.config.open("a", encoding="utf-8") as file:
        file.write(
            "retrieval.trending_half_life_s = 60\nretrieval.covisit_half_life_s = 1e6\nbandit.half_life_s = 60\n"
        )
    system.start()
    after = trends(system)
    assert IDS[150] in [item for item, _, _ in after[:5]]
    assert all(0 < score < 10 and 0 < click < 0.99 for _, score, click in after)
    assert system.metric("recsys_dead_letters_total", "trainer") == 0
