"""Bodies of the HTTP API to values: strict, with the field, the value and the remedy in every refusal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import orjson

from recsys.config import Config
from recsys.errors import BadInput, nearest
from recsys.events import messages
from recsys.events.fields import MAX_NAME_CHARS
from recsys.ranking.filter_rules import parse_boosts, parse_filters, parse_pins
from recsys.ranking.request import Request
from recsys.types import Feedback, Item
from services.ranking import salvage

MAX_N = 100
MAX_EVENTS = 10_000
MAX_LIST = 1000
T = TypeVar("T")
Body: TypeAlias = bytes | bytearray
_RECOMMEND = (
    "user_id",
    "n",
    "context",
    "exclude",
    "candidates",
    "filters",
    "boosts",
    "pins",
    "activation",
    "session_id",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """One row of a batch that is not taken: its id where it had a readable one, the field and the reason."""

    id: str
    field: str
    reason: str
    full: bool = False
    """It would be taken if there were room."""


def each(found: Iterable[Any], id_field: str, parse: Callable[[Mapping[str, Any]], T]) -> list[T | Refused]:
    """Every row parsed or refused by itself."""
    taken: list[T | Refused] = []
    for row in found:
        try:
            if isinstance(row, BadInput):  # the row is no JSON
                raise row
            if not isinstance(row, dict):
                raise BadInput(f"{messages.shorten(row)} is not an object: send one with {id_field}", field=id_field)
            row.setdefault("version", 1)  # over HTTP the path says which version is meant
            taken.append(parse(row))
        except BadInput as error:
            taken.append(Refused(id=_readable_id(row, id_field), field=error.field, reason=str(error)))
    return taken


def _readable_id(row: Any, id_field: str) -> str:
    try:
        return messages.parse_id(row.get(id_field) if isinstance(row, dict) else row, id_field)
    except BadInput:
        return ""


def body_object(body: Body) -> dict[str, Any]:
    """The body as a JSON object."""
    try:
        value = orjson.loads(_without_mark(body))
    except orjson.JSONDecodeError as error:
        raise BadInput(
            f"the body is not valid JSON ({error}): send one JSON object in UTF-8, without NaN or infinity",
            field="body",
        ) from None
    if not isinstance(value, dict):
        raise BadInput(f"the body is a JSON {type(value).__name__}: send one JSON object", field="body")
    return value


def recommend(body: Body, request_id: str, config: Config) -> Request:
    """Body of POST /v1/recommend; the configuration says which attributes and sources there are to name."""
    raw = body_object(body)
    for name in raw:
        if name not in _RECOMMEND:
            near = nearest(name, _RECOMMEND)
            raise BadInput(
                f"{messages.shorten(name)} is not a known field: did you mean {near!r}?", field=name[:MAX_NAME_CHARS]
            )
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
        filters=parse_filters(raw.get("filters"), config.catalogue.attributes),
        boosts=parse_boosts(raw.get("boosts"), config),
        pins=parse_pins(raw.get("pins")),
        activation=activation,
    )


def _ids(value: Any, field: str) -> tuple[str, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or len(value) > MAX_LIST:
        raise BadInput(f"{field}: send a list of at most {MAX_LIST} item ids", field=field)
    return tuple(messages.parse_id(item, f"{field}[{index}]") for index, item in enumerate(value))


def feedback(body: Body, event_ids: Iterator[str], now_ms: int) -> list[Feedback | Refused]:
    """Body of POST /v1/feedback: one event, or {"events": [...]}; each parsed or refused by itself."""

    def event(row: Mapping[str, Any]) -> Feedback:
        found = messages.parse_feedback(row, event_id=next(event_ids), time_ms=now_ms)
        messages.check_milliseconds(found.time_ms, now_ms)
        return found

    return each(_rows(body, "events"), "event_id", event)


def items(body: Body) -> list[Item | Refused]:
    """Body of PUT /v1/items: one item, or {"items": [...]}."""
    return each(_rows(body, "items"), "item_id", messages.parse_item)


def patches(body: Body) -> list[Any]:
    """Body of PATCH /v1/items: one or many objects with `item_id` and what changes."""
    return _rows(body, "items")


def deletes(body: Body) -> list[Item | Refused]:
    """Body of DELETE /v1/items: {"item_ids": [...]}."""
    found = _rows(body, "item_ids", may_be_one=False)
    named = (row if isinstance(row, BadInput) else {"item_id": row} for row in found)
    return each(named, "item_id", lambda row: Item(item_id=messages.parse_id(row["item_id"], "item_id"), deleted=True))


def _rows(body: Body, name: str, *, may_be_one: bool = True) -> list[Any]:
    """The list under `name`, or (where it `may_be_one`) the body itself as the one row."""
    try:
        raw = body_object(body)
    except BadInput:
        if (found := _each_alone(_without_mark(body), name, may_be_one)) is None:
            raise
        raw = {name: found}
    if may_be_one and name not in raw:
        return [raw]
    found = raw.get(name)
    if not isinstance(found, list) or len(raw) != 1:
        raise BadInput(f"{name}: send {{'{name}': [...]}} with a list and nothing beside it", field=name)
    if len(found) > MAX_EVENTS:
        raise BadInput(f"{name}: {len(found)} are too many: send at most {MAX_EVENTS} a request", field=name)
    return found


def _each_alone(body: Body, name: str, may_be_one: bool) -> list[Any] | None:
    """The rows of a body that is no JSON as a whole; None where it cannot be told what its rows are."""
    if (found := salvage.split(body, name, MAX_EVENTS)) is not None or not may_be_one:
        return found
    try:
        one = salvage.loads(body)
    except BadInput:
        return None
    return [one] if isinstance(one, dict) and name not in one else None


def _without_mark(body: Body) -> Body:
    return body[len(salvage.BOM) :] if body.startswith(salvage.BOM) else body
