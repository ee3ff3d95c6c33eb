"""The public messages: what they accept, what they refuse and how they say it; that parser and schema agree."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from recsys.errors import BadInput
from recsys.events import messages
from recsys.events.schemas import HTTP_FEEDBACK, HTTP_ITEM, SCHEMAS
from recsys.types import FORGET, Feedback, Impression, Item

PARSE: dict[str, Callable[..., Any]] = {
    "item": messages.parse_item,
    "impression": messages.parse_impression,
    "feedback": messages.parse_feedback,
}
DUMP: dict[str, Callable[..., bytes]] = {
    "item": messages.dump_item,
    "impression": messages.dump_impression,
    "feedback": messages.dump_feedback,
}
VALIDATORS = {name: Draft202012Validator(schema) for name, schema in SCHEMAS.items()}

FEEDBACK = {"version": 1, "event_id": "e", "user_id": "u", "item_id": "i", "type": "click", "time_ms": 5}
SHOWN = {"item_id": "i", "position": 1}
IMPRESSION = {"version": 1, "request_id": "r", "user_id": "u", "time_ms": 5, "items": [SHOWN]}
ITEM = {"version": 1, "item_id": "i"}
MINIMAL: dict[str, dict[str, Any]] = {"item": ITEM, "impression": IMPRESSION, "feedback": FEEDBACK}

ids = st.text(st.characters(codec="utf-8", exclude_categories=("Cc",)), min_size=1, max_size=64) | st.integers(
    -(2**63), 2**64 - 1
)
times = st.integers(0, 2**53)
# Integer-valued floats are left out throughout: JSON Schema counts 1.0 as an integer, the parser does not.
numbers = st.floats(allow_nan=False, allow_infinity=False).filter(lambda x: not x.is_integer()) | st.integers(
    -(2**63), 2**64 - 1
)
texts = st.text(max_size=20)
scalars = texts | numbers | st.booleans()
chances = st.floats(0, 1, exclude_min=True, exclude_max=True)


def fields(values: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.text(min_size=1, max_size=8), values, max_size=4)


@st.composite
def shown_items(draw: st.DrawFn) -> list[dict[str, Any]]:
    chosen = draw(st.lists(ids, min_size=1, max_size=3, unique_by=str))
    optional = {
        "sources": st.lists(texts, max_size=3),
        "score": numbers,
        "predictions": fields(chances),
        "propensity": chances,
    }
    items = []
    for item_id in chosen:
        item = draw(st.fixed_dictionaries({"position": st.integers(1, 2**31 - 1)}, optional=optional))
        if draw(st.booleans()):
            others = draw(st.lists(ids.filter(lambda x, i=item_id: str(x) != str(i)), max_size=2, unique_by=str))
            item["pool"] = [[i, draw(chances)] for i in [item_id, *others]]
        items.append({"item_id": item_id, **item})
    return items


VALID: dict[str, st.SearchStrategy[Any]] = {
    "item": st.fixed_dictionaries(
        {"version": st.just(1), "item_id": ids},
        optional={
            "title": texts,
            "attributes": fields(scalars | st.lists(texts, max_size=3)),
            "deleted": st.just(False),
        },
    )
    | st.fixed_dictionaries({"version": st.just(1), "item_id": ids, "deleted": st.just(True)}),
    "impression": st.fixed_dictionaries(
        {"version": st.just(1), "request_id": ids, "user_id": ids, "time_ms": times, "items": shown_items()},
        optional={
            "session_id": ids | st.none(),
            "context": fields(scalars),
            "activation": st.sampled_from(["shown", "deferred"]),
            "schema": st.text(min_size=1, max_size=8),
            "policy": texts,
            "model_version": texts,
            "generation": texts,
            "bandit": st.binary(max_size=9).map(lambda b: base64.b64encode(b).decode()),
        },
    ).flatmap(
        lambda m: st.binary(max_size=9).map(
            lambda b: {**m, "features": base64.b64encode(b).decode()} if "schema" in m else m
        )
    ),
    "feedback": st.fixed_dictionaries(
        {
            "version": st.just(1),
            "event_id": ids,
            "user_id": ids,
            "item_id": ids,
            "type": st.text(st.characters(codec="utf-8", exclude_categories=("Cc",)), min_size=1, max_size=20).filter(
                lambda t: t[0] != "$"
            ),
            "time_ms": times,
        },
        optional={"session_id": ids, "request_id": ids | st.none(), "value": numbers, "context": fields(scalars)},
    ),
}
anything = st.recursive(
    scalars
    | st.none()
    | st.sampled_from(["", "\n", "a\n", "$x", "shown", "AAA=", -1, 0, 1, 2, 2**53 + 1, [], {}, "x" * 65]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def accepted(kind: str, message: Any) -> bool:
    try:
        PARSE[kind](message)
    except BadInput:
        return False
    return True


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values inside a message."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(p for k, v in inner for p in places(v, (*path, k)))]


def distinct(message: Any) -> bool:
    """What a schema cannot say: items and pools name each id once, pools contain the shown item."""
    if not isinstance(message, dict) or not isinstance(message.get("items"), list):
        return True
    shown = [i for i in message["items"] if isinstance(i, dict)]
    pools = [(str(i.get("item_id")), i["pool"]) for i in shown if isinstance(i.get("pool"), list)]
    names = [(item, [str(p[0]) for p in pool if isinstance(p, list) and p]) for item, pool in pools]
    return len({str(i.get("item_id")) for i in shown}) == len(shown) and all(
        item in pool and len(set(pool)) == len(pool) for item, pool in names
    )


@pytest.mark.parametrize("kind", PARSE)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_message_the_schema_describes_is_parsed_and_survives_a_round_trip(kind: str, data: st.DataObject) -> None:
    message = data.draw(VALID[kind])
    VALIDATORS[kind].validate(message)
    value = PARSE[kind](message)
    dumped = DUMP[kind](value)
    assert PARSE[kind](dumped) == value == PARSE[kind](orjson.dumps(message))
    VALIDATORS[kind].validate(orjson.loads(dumped))


@pytest.mark.parametrize("kind", PARSE)
@settings(max_examples=250, deadline=None)
@given(data=st.data())
def test_a_mutated_message_passes_the_parser_exactly_when_it_passes_the_schema(kind: str, data: st.DataObject) -> None:
    message = deepcopy(data.draw(VALID[kind]))
    path = data.draw(st.sampled_from(places(message)))
    if not path:
        message = data.draw(anything)
    else:
        target = message
        for step in path[:-1]:
            target = target[step]
        action = data.draw(st.sampled_from(["replace", "delete", "add"]))
        if action == "delete":
            del target[path[-1]]
        elif action == "add" and isinstance(target, dict):
            target[data.draw(st.text(max_size=70))] = data.draw(anything)
        else:
            target[path[-1]] = data.draw(anything)
    if distinct(message):
        assert accepted(kind, message) == VALIDATORS[kind].is_valid(message), message


@pytest.mark.parametrize(
    ("kind", "change", "field"),
    [
        ("feedback", {"version": 2}, "version"),
        ("feedback", {"version": True}, "version"),
        ("feedback", {"user_id": ""}, "user_id"),
        ("feedback", {"user_id": "x" * 10_240}, "user_id"),
        ("feedback", {"user_id": "é" * 129}, "user_id"),
        ("feedback", {"user_id": "a\x00b"}, "user_id"),
        ("feedback", {"user_id": "a\x85b"}, "user_id"),
        ("feedback", {"user_id": "\ud800"}, "user_id"),
        ("feedback", {"item_id": True}, "item_id"),
        ("feedback", {"item_id": 1.5}, "item_id"),
        ("feedback", {"item_id": 10**5000}, "item_id"),
        ("feedback", {"event_id": None}, "event_id"),
        ("feedback", {"type": FORGET}, "type"),
        ("feedback", {"type": "\ud800"}, "type"),
        ("feedback", {"time_ms": 2**53 + 1}, "time_ms"),
        ("feedback", {"time_ms": -1}, "time_ms"),
        ("feedback", {"time_ms": 1.0}, "time_ms"),
        ("feedback", {"value": math.nan}, "value"),
        ("feedback", {"value": -math.inf}, "value"),
        ("feedback", {"value": 10**5000}, "value"),
        ("feedback", {"context": {"a": {"b": 1}}}, "context.a"),
        ("feedback", {"context": {"a": math.inf}}, "context.a"),
        ("feedback", {"context": {str(i): 1 for i in range(65)}}, "context"),
        ("feedback", {"userid": "u"}, "userid"),
        ("impression", {"items": []}, "items"),
        ("impression", {"items": [SHOWN, SHOWN]}, "items[1].item_id"),
        ("impression", {"items": [{"item_id": str(i), "position": 1} for i in range(1001)]}, "items"),
        ("impression", {"items": [{**SHOWN, "position": 0}]}, "items[0].position"),
        ("impression", {"items": [{**SHOWN, "propensity": 0}]}, "items[0].propensity"),
        ("impression", {"items": [{**SHOWN, "pool": [["other", 0.5]]}]}, "items[0].pool"),
        ("impression", {"items": [{**SHOWN, "pool": [["i", 0.5], ["i", 0.5]]}]}, "items[0].pool"),
        ("impression", {"features": "AAAA"}, "schema"),
        ("impression", {"features": "AAA", "schema": "s"}, "features"),
        ("item", {"title": "x" * 1025}, "title"),
        ("item", {"attributes": {"tags": ["a", 1]}}, "attributes.tags"),
        ("item", {"deleted": True, "title": "t"}, "title"),
    ],
)
def test_a_wrong_field_is_named_with_its_value_and_a_remedy(kind: str, change: dict[str, Any], field: str) -> None:
    with pytest.raises(BadInput) as error:
        PARSE[kind]({**MINIMAL[kind], **change})
    assert error.value.field == field
    assert field.split(".")[0] in str(error.value) and len(str(error.value)) < 400


def test_an_unknown_field_names_the_nearest_known_one() -> None:
    with pytest.raises(BadInput, match="'sesion_id' is not a known field: did you mean 'session_id'"):
        messages.parse_feedback({**FEEDBACK, "sesion_id": "s"})


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"\xff\xfe",
        b'{"version":NaN}',
        b"[" * 500_000,
        b'{"version":1,"context":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001,
        b'{"version":1,"event_id":"' + b"x" * 2_000_000 + b'"}',
    ],
)
@pytest.mark.parametrize("kind", PARSE)
def test_hostile_bytes_are_bad_input(kind: str, raw: bytes) -> None:
    with pytest.raises(BadInput):
        PARSE[kind](raw)


def test_a_deeply_nested_parsed_value_is_bad_input() -> None:
    nested: dict[str, Any] = {}
    for _ in range(100_000):
        nested = {"a": nested}
    with pytest.raises(BadInput):
        messages.parse_feedback({**FEEDBACK, "context": nested})
    with pytest.raises(BadInput):
        messages.parse_feedback({**FEEDBACK, "user_id": nested})


def test_a_feedback_without_id_or_time_takes_those_of_the_server() -> None:
    bare = {k: v for k, v in FEEDBACK.items() if k not in ("event_id", "time_ms")}
    assert messages.parse_feedback(bare, event_id="made", time_ms=7) == Feedback(
        event_id="made", user_id="u", item_id="i", type="click", time_ms=7
    )
    assert messages.parse_feedback(FEEDBACK, event_id="made", time_ms=7).event_id == "e"
    assert messages.parse_feedback(FEEDBACK, event_id="made", time_ms=7).time_ms == 5


def test_integers_are_ids_in_decimal() -> None:
    item = messages.parse_item(b'{"version":1,"item_id":-9223372036854775808}')
    assert item.item_id == "-9223372036854775808"


def test_an_empty_value_deletes_the_item_that_the_key_names() -> None:
    assert messages.parse_item(b"", key="gone") == Item(item_id="gone", deleted=True)


def test_forget_is_written_and_read_only_inside() -> None:
    raw = messages.dump_forget("u", event_id="e", time_ms=3)
    assert messages.parse_feedback(raw, internal=True).type == FORGET
    with pytest.raises(BadInput, match="reserved"):
        messages.parse_feedback(raw)
    with pytest.raises(BadInput, match="reserved"):
        messages.parse_feedback({**FEEDBACK, "type": "$other"}, internal=True)


def test_what_says_nothing_is_not_written() -> None:
    impression = messages.parse_impression(IMPRESSION)
    assert impression == Impression(request_id="r", user_id="u", time_ms=5, items=impression.items)
    written = orjson.loads(messages.dump_impression(impression))
    assert written == {**IMPRESSION, "activation": "shown"}


def test_seconds_are_told_from_milliseconds_where_the_clock_is_right() -> None:
    now_s = 1_800_000_000
    for fine in (0, 946_684_800_000, now_s * 1000, now_s * 1_000_000):
        messages.check_milliseconds(fine, now_s * 1000)
    messages.check_milliseconds(5, 6)  # a clock of a test
    for seconds in (1, now_s, 946_684_799_999):
        with pytest.raises(BadInput, match=f"time_ms = {seconds}.*milliseconds"):
            messages.check_milliseconds(seconds, now_s * 1000)


def test_the_http_schemas_stand_alone_and_leave_event_id_and_time_to_the_server() -> None:
    assert "$ref" not in str(HTTP_FEEDBACK) + str(HTTP_ITEM)
    bare = {k: v for k, v in FEEDBACK.items() if k not in ("event_id", "time_ms")}
    validator = Draft202012Validator(HTTP_FEEDBACK)
    assert validator.is_valid(bare) and validator.is_valid(FEEDBACK)
    assert not validator.is_valid({**bare, "user_id": ""})
    assert not VALIDATORS["feedback"].is_valid(bare)
