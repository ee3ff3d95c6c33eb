"""Bodies of the HTTP API: what is wrong with one row costs no other row, and takes bounded work."""

from __future__ import annotations

import itertools
import json
import time
from typing import Any

import pytest

from recsys.config import Config
from recsys.errors import BadInput
from recsys.types import Feedback, Item
from services.ranking import parse

NOW_MS = 1_800_000_000_000
GOOD: dict[str, Any] = {"user_id": "u", "item_id": "i", "type": "click"}


def feedback(body: bytes) -> list[Feedback | parse.Refused]:
    return parse.feedback(body, (str(n) for n in itertools.count()), NOW_MS)


def row(**fields: object) -> bytes:
    return json.dumps({**GOOD, **fields}).encode()


BAD: list[tuple[bytes, str]] = [
    (row(event_id="bad", value=float("nan")), "value"),
    (row(event_id="bad", value=float("-inf")), "value"),
    (row(event_id="bad", value=1).replace(b": 1}", b": 1e999}"), "value"),
    (row(event_id="bad", value=1).replace(b": 1}", b": " + b"9" * 10_000 + b"}"), "value"),
    (row(event_id="bad", context={"q": "cut \ud83d"}), "context.q"),
    (row(event_id="bad", context={"cut \ud83d": "q"}), "context"),
    (row(event_id="bad", user_id="cut \ud83d"), "user_id"),
    (row(event_id="bad", context={"q": "caf\u00e9"}).replace(b"\\u00e9", b"\xe9"), "context.q"),
    (row(event_id="bad", context=[[[[[]]]]]), "context"),
    (row(event_id="bad", type=5), "type"),
    (row(event_id="bad", item_id="x" * 257), "item_id"),
    (row(event_id="bad", time_ms=NOW_MS // 1000), "time_ms"),
    (row(event_id="bad", time_ms=10**400), "time_ms"),
    (row(event_id="bad", colour="red"), "colour"),
    (row(context=1).replace(b": 1}", b": " + b"[" * 100_000 + b"]" * 100_000 + b"}"), "row"),
    (b"nonsense", "row"),
    (b"", "row"),
    (b"NaN", "event_id"),
    (b'"\xff"', "event_id"),
]


@pytest.mark.parametrize(("bad", "field"), BAD, ids=range(len(BAD)))
def test_a_bad_event_is_refused_alone(bad: bytes, field: str) -> None:
    good = [row(event_id=f"g{n}", context={"q": ']},{\\"'}) for n in range(4)]
    body = b' {"events" : [' + b" , ".join([*good[:2], bad, *good[2:]]) + b"] } "
    found = feedback(body)
    refused = found.pop(2)
    assert [event.event_id for event in found if isinstance(event, Feedback)] == ["g0", "g1", "g2", "g3"]
    assert isinstance(refused, parse.Refused) and refused.field == field and refused.reason
    assert json.dumps(refused.reason).encode() and len(refused.reason) < 400
    if b'"event_id": "bad"' in bad:
        assert refused.id == "bad"


def test_items_patches_and_deletes_are_refused_alone_too() -> None:
    body = b'{"items": [{"item_id": "a"}, {"item_id": "b", "title": "cut \\ud83d"}]}'
    good, bad = parse.items(body)
    assert isinstance(good, Item) and isinstance(bad, parse.Refused) and (bad.id, bad.field) == ("b", "title")
    assert parse.patches(body)[0] == {"item_id": "a"}
    good, bad = parse.deletes(b'{"item_ids": ["a", NaN]}')
    assert isinstance(good, Item) and isinstance(bad, parse.Refused)


def test_a_single_event_that_is_no_json_names_its_field() -> None:
    (bad,) = feedback(row(event_id="e", value=float("nan")))
    assert isinstance(bad, parse.Refused) and (bad.id, bad.field) == ("e", "value")


def test_a_byte_order_mark_is_no_part_of_a_body() -> None:
    (event,) = feedback(b"\xef\xbb\xbf" + row(event_id="e"))
    assert isinstance(event, Feedback)
    assert parse.recommend(b'\xef\xbb\xbf{"user_id": "u"}', "r", Config()).user_id == "u"


@pytest.mark.parametrize(
    "body",
    [
        b'{"events": [{"a": [ }, {}]}',
        b'{"events": [1, NaN]',
        b'{"events": [NaN]} x',
        b'{"events": [NaN], "x": 1}',
        b'{"events": [' + b"NaN," * 20_000 + b"1]}",
        b'{"events": ["' + b'\\"' * 4_000_000,
        b'{"events": [' + b"[]," * 2_500_000,
        json.dumps({"events": [GOOD]}).encode("utf-16"),
    ],
    ids=range(8),
)
def test_a_body_whose_rows_cannot_be_told_apart_is_refused_whole_and_soon(body: bytes) -> None:
    started_s = time.process_time()
    with pytest.raises(BadInput, match="the body is not valid JSON"):
        feedback(body)
    assert time.process_time() - started_s < 10


LONG = "ab" * 2_000_000


@pytest.mark.parametrize(
    "asked",
    [
        {LONG: 1},
        {"filters": {LONG: 1}},
        {"filters": {"category": {LONG: 1}}},
        {"filters": {"category": LONG}},
        {"boosts": [{LONG: 1}]},
        {"boosts": [{"filters": {LONG: 1}}]},
        {"boosts": [{"sources": [LONG]}]},
        {"pins": [{LONG: 1}]},
        {"pins": [{"position": 1, "item_id": LONG}]},
        {"context": {LONG: 1}},
        {"activation": LONG},
        {"session_id": LONG},
        {"exclude": [LONG]},
        {"n": LONG},
        {str(n): n for n in range(200_000)},
    ],
    ids=range(15),
)
def test_a_long_name_or_value_is_refused_at_once_in_few_words(asked: dict[str, Any]) -> None:
    body = json.dumps({"user_id": "u", **asked}).encode()
    started_s = time.process_time()
    with pytest.raises(BadInput) as error:
        parse.recommend(body, "r", Config())
    assert time.process_time() - started_s < 2
    assert len(str(error.value)) < 1000 and len(error.value.field) < 200
