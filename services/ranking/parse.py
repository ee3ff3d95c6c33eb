"""Bodies of the HTTP API to values: strict, with the field, the value and the remedy in every refusal."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import orjson

from recsys.errors import BadInput
from recsys.events import messages
from recsys.ranking.request import Request
from recsys.types import Feedback, Item

MAX_N = 100
MAX_EVENTS = 10_000
MAX_LIST = 1000
_RECOMMEND = ("user_id", "n", "context", "exclude", "candidates", "activation", "session_id")


def body_object(body: bytes) -> dict[str, Any]:
    """The body as a JSON object."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadInput(
            f"the body is not valid JSON ({error}): send one JSON object in UTF-8, without NaN or infinity",
            field="json",
        ) from None
    if not isinstance(value, dict):
        raise BadInput(f"the body is a JSON {type(value).__name__}: send one JSON object", field="json")
    return value


def recommend(body: bytes, request_id: str) -> Request:
    """Body of POST /v1/recommend."""
    raw = body_object(body)
    if unknown := set(raw) - set(_RECOMMEND):
        name = sorted(unknown)[0]
        near = difflib.get_close_matches(name, _RECOMMEND, n=1, cutoff=0.0)[0]
        raise BadInput(f"{name!r} is not a known field: did you mean {near!r}?", field=name)
    n = raw.get("n", 20)
    if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= MAX_N:
        raise BadInput(f"n = {messages.shorten(n)}: ask for an integer from 1 to {MAX_N}", field="n")
    activation = raw.get("activation", "shown")
    if activation not in ("shown", "deferred"):
        raise BadInput(f"activation = {messages.shorten(activation)}: use 'shown' or 'deferred'", field="activation")
    session = raw.get("session_id")
    context = raw.get("context")
    return Request(
        request_id=request_id,
        user_id=messages.parse_id(raw.get("user_id"), "user_id"),
        n=n,
        session_id=None if session is None else messages.parse_id(session, "session_id"),
        context={} if context is None else messages.parse_context(context, "context"),
        exclude=_ids(raw.get("exclude"), "exclude") or (),
        candidates=_ids(raw.get("candidates"), "candidates"),
        activation=activation,
    )


def _ids(value: Any, field: str) -> tuple[str, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or len(value) > MAX_LIST:
        raise BadInput(f"{field}: send a list of at most {MAX_LIST} item ids", field=field)
    return tuple(messages.parse_id(item, f"{field}[{index}]") for index, item in enumerate(value))


def feedback(body: bytes, event_ids: Any, now_ms: int) -> list[Feedback | BadInput]:
    """Body of POST /v1/feedback: one event, or {"events": [...]}; each parsed or refused by itself."""
    raw = body_object(body)
    events: Any = [raw]
    if "events" in raw:
        events = raw["events"]
        if not isinstance(events, list) or len(raw) != 1:
            raise BadInput("events: send {'events': [...]} with a list and nothing beside it", field="events")
        if len(events) > MAX_EVENTS:
            raise BadInput(f"events: {len(events)} are too many: send at most {MAX_EVENTS} a request", field="events")
    parsed: list[Feedback | BadInput] = []
    for event in events:
        try:
            if not isinstance(event, Mapping):
                raise BadInput(f"{messages.shorten(event)} is not an object: send a feedback message", field="events")
            parsed.append(messages.parse_feedback(event, event_id=next(event_ids), time_ms=now_ms))
        except BadInput as error:
            parsed.append(error)
    return parsed


def items(body: bytes) -> list[Item | BadInput]:
    """Body of PUT /v1/items: one item, or {"items": [...]}."""
    parsed: list[Item | BadInput] = []
    for item in _item_list(body):
        try:
            parsed.append(messages.parse_item(item if isinstance(item, dict) else {"item_id": item}))
        except BadInput as error:
            parsed.append(error)
    return parsed


def patches(body: bytes) -> list[dict[str, Any]]:
    """Body of PATCH /v1/items: objects with `item_id` and what changes."""
    found = _item_list(body)
    for index, patch in enumerate(found):
        if not isinstance(patch, dict):
            raise BadInput(f"items[{index}] is not an object: send item_id and what changes", field=f"items[{index}]")
    return found


def item_ids(body: bytes) -> list[str]:
    """Body of DELETE /v1/items: {"item_ids": [...]}."""
    raw = body_object(body)
    value = raw.get("item_ids")
    if not isinstance(value, list) or len(value) > MAX_EVENTS or len(raw) != 1:
        raise BadInput(f"item_ids: send {{'item_ids': [...]}} with at most {MAX_EVENTS} ids", field="item_ids")
    return [messages.parse_id(item, f"item_ids[{index}]") for index, item in enumerate(value)]


def _item_list(body: bytes) -> list[Any]:
    raw = body_object(body)
    if "items" not in raw:
        return [raw]
    found = raw["items"]
    if not isinstance(found, list) or len(raw) != 1:
        raise BadInput("items: send {'items': [...]} with a list and nothing beside it", field="items")
    if len(found) > MAX_EVENTS:
        raise BadInput(f"items: {len(found)} are too many: send at most {MAX_EVENTS} a request", field="items")
    return found
