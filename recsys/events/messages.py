"""The three public messages (`item`, `impression`, `feedback`), versioned JSON: parsed strictly, dumped briefly.

Every parse function takes the bytes of one JSON object, or the object already parsed, and either returns the value or
raises BadInput that names the field, the value and the remedy. An optional field that is null counts as absent. The
same rules, as JSON Schema: `recsys.events.schemas`; as prose: `docs/events.md`.
"""

from __future__ import annotations

import base64
from collections.abc import Collection, Iterable, Mapping
from math import isfinite
from typing import Any

import orjson

from recsys.errors import BadInput, nearest
from recsys.events.fields import (
    MAX_FIELDS,
    MAX_ID_BYTES,
    MAX_ITEMS,
    MAX_NAME_CHARS,
    MAX_PLAIN,
    MAX_POSITION,
    MAX_TEXT_BYTES,
    bad,
    optional_text,
    parse_attributes,
    parse_base64,
    parse_context,
    parse_id,
    parse_number,
    parse_pool,
    parse_position,
    parse_predictions,
    parse_propensity,
    parse_sources,
    parse_time,
    parse_type,
    shorten,
)
from recsys.types import FORGET, Feedback, Impression, Item, ShownItem

__all__ = [
    "check_milliseconds",
    "dump_feedback",
    "dump_forget",
    "dump_impression",
    "dump_item",
    "parse_context",
    "parse_feedback",
    "parse_id",
    "parse_impression",
    "parse_item",
    "shorten",
]

VERSION = 1
MAX_MESSAGE_BYTES = 2**20
"""Kafka brokers refuse larger records by default; a full impression of 100 items is below 50 kB."""
YEAR_2000_MS = 946_684_800_000
ACTIVATIONS = ("shown", "deferred")

FEEDBACK_FIELDS = frozenset(
    ("version", "event_id", "user_id", "item_id", "type", "time_ms", "session_id", "request_id", "value", "context")
)
_OPAQUE_FIELDS = ("schema", "features", "bandit", "policy", "model_version", "generation")
IMPRESSION_FIELDS = frozenset(
    ("version", "request_id", "user_id", "time_ms", "items", "context", "session_id", "activation", *_OPAQUE_FIELDS)
)
_SHOWN_ORDER = ("item_id", "position", "sources", "score", "predictions", "propensity", "pool")
SHOWN_FIELDS = frozenset(_SHOWN_ORDER)
ITEM_FIELDS = frozenset(("version", "item_id", "title", "attributes", "deleted"))

_NOTHING: dict[str, Any] = {}


def parse_feedback(
    message: bytes | Mapping[str, Any],
    *,
    event_id: str | None = None,
    time_ms: int | None = None,
    internal: bool = False,
) -> Feedback:
    """Parse one feedback message; `event_id` and `time_ms` stand in where the message has none.

    Types that begin with `$` are reserved: refused, but for FORGET where `internal`.
    """
    m = _object(message, FEEDBACK_FIELDS)
    get = m.get
    event = get("event_id")
    when = get("time_ms")
    session = get("session_id")
    request = get("request_id")
    value = get("value")
    context = get("context")
    kind = parse_type(get("type"), internal=internal)
    return Feedback(
        event_id=event_id if event is None and event_id is not None else parse_id(event, "event_id"),
        user_id=parse_id(get("user_id"), "user_id"),
        item_id=parse_id(get("item_id"), "item_id"),
        type=kind,
        time_ms=time_ms if when is None and time_ms is not None else parse_time(when),
        session_id=None if session is None else parse_id(session, "session_id"),
        request_id=None if request is None else parse_id(request, "request_id"),
        value=None if value is None else parse_number(value, "value"),
        context=None if context is None else parse_context(context),
    )


def parse_impression(message: bytes | Mapping[str, Any]) -> Impression:
    """Parse one impression message: one answer shown, all of its items."""
    m = _object(message, IMPRESSION_FIELDS)
    get = m.get
    session, context, schema = get("session_id"), get("context"), optional_text(get("schema"), "schema", MAX_NAME_CHARS)
    features = parse_base64(get("features"), "features")
    if features and not schema:
        raise bad("schema", schema, "must name the slot list that `features` was written with")
    activation = get("activation")
    if activation is not None and activation not in ACTIVATIONS:
        raise bad("activation", activation, "must be 'shown' or 'deferred'")
    return Impression(
        request_id=parse_id(get("request_id"), "request_id"),
        user_id=parse_id(get("user_id"), "user_id"),
        time_ms=parse_time(get("time_ms")),
        items=_shown_items(get("items")),
        context=_NOTHING if context is None else parse_context(context),
        session_id=None if session is None else parse_id(session, "session_id"),
        activation=activation or "shown",
        schema=schema,
        features=features,
        bandit=parse_base64(get("bandit"), "bandit"),
        policy=optional_text(get("policy"), "policy", MAX_ID_BYTES),
        model_version=optional_text(get("model_version"), "model_version", MAX_ID_BYTES),
        generation=optional_text(get("generation"), "generation", MAX_ID_BYTES),
    )


def parse_item(message: bytes | Mapping[str, Any], *, key: str | None = None) -> Item:
    """Parse one item message; an empty value is a delete of the item that the record's `key` names (a tombstone)."""
    if isinstance(message, bytes) and not message:
        return Item(item_id=parse_id(key, "key"), deleted=True)
    m = _object(message, ITEM_FIELDS)
    item_id = parse_id(m.get("item_id"), "item_id")
    deleted, attributes = m.get("deleted"), m.get("attributes")
    if deleted is not None and type(deleted) is not bool:
        raise bad("deleted", deleted, "must be true or false")
    if deleted:
        for field in ("title", "attributes"):
            if m.get(field) is not None:
                raise bad(field, m[field], "a deleted item has none: leave it out, or leave out `deleted`")
        return Item(item_id=item_id, deleted=True)
    return Item(
        item_id=item_id,
        title=optional_text(m.get("title"), "title", MAX_TEXT_BYTES),
        attributes=_NOTHING if attributes is None else parse_attributes(attributes),
    )


def dump_feedback(feedback: Feedback) -> bytes:
    """The message of a feedback."""
    f = feedback
    message: dict[str, Any] = {
        "version": VERSION,
        "event_id": f.event_id,
        "user_id": f.user_id,
        "item_id": f.item_id,
        "type": f.type,
        "time_ms": f.time_ms,
    }
    for name in ("session_id", "request_id", "value", "context"):
        if (value := getattr(f, name)) is not None:
            message[name] = value
    return orjson.dumps(message, option=orjson.OPT_SERIALIZE_NUMPY)


def dump_forget(user_id: str, *, event_id: str, time_ms: int) -> bytes:
    """The internal message after which nothing of the user is kept."""
    return dump_feedback(Feedback(event_id=event_id, user_id=user_id, item_id=FORGET, type=FORGET, time_ms=time_ms))


def dump_impression(impression: Impression) -> bytes:
    """The message of an impression."""
    i = impression
    message: dict[str, Any] = {
        "version": VERSION,
        "request_id": i.request_id,
        "user_id": i.user_id,
        "time_ms": i.time_ms,
        "items": [_filled(item, SHOWN_FIELDS) for item in i.items],
    }
    message |= _filled(i, IMPRESSION_FIELDS - message.keys() - {"features", "bandit"})
    for name in ("features", "bandit"):
        if data := getattr(i, name):
            message[name] = base64.b64encode(data).decode()
    return orjson.dumps(message, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_SORT_KEYS)


def dump_item(item: Item) -> bytes:
    """The message of an item."""
    fields = {"item_id", "deleted"} if item.deleted else ITEM_FIELDS - {"version"}
    return orjson.dumps(
        {"version": VERSION, **_filled(item, fields)}, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_SORT_KEYS
    )


def check_milliseconds(time_ms: int, now_ms: int) -> None:
    """BadInput for a client's time that must be of another unit: seconds, taken as milliseconds, all lie in January 1970."""
    if 0 < time_ms < YEAR_2000_MS <= now_ms:
        raise bad("time_ms", time_ms, "is before the year 2000 and looks like seconds: send milliseconds since 1970")


def _shown_items(value: Any) -> tuple[ShownItem, ...]:
    """The items of an impression: 1 to 1,000, distinct."""
    if not isinstance(value, list) or not 0 < len(value) <= MAX_ITEMS:
        raise bad("items", value, f"must be a list of 1 to {MAX_ITEMS} shown items")
    items = tuple([_plain(v) or _shown(v, f"items[{i}]") for i, v in enumerate(value)])
    check_distinct(items)
    return items


def check_distinct(items: Collection[ShownItem]) -> None:
    """Refuse an impression that shows one item twice: feedback could not be joined."""
    if len({item.item_id for item in items}) == len(items):
        return
    seen: set[str] = set()
    for i, item in enumerate(items):
        if item.item_id in seen:
            raise bad(f"items[{i}].item_id", item.item_id, "is shown twice: the items of one impression are distinct")
        seen.add(item.item_id)


def _object(message: bytes | Mapping[str, Any], known: frozenset[str]) -> Mapping[str, Any]:
    if not isinstance(message, dict):
        message = _decode(message)
    if not message.keys() <= known:
        raise _unknown(message, known, "")
    version = message.get("version")
    if version != VERSION or type(version) is not int:
        raise bad("version", version, "must be 1: the version of this message format")
    return message


def _decode(message: Any) -> dict[str, Any]:
    if not isinstance(message, bytes | bytearray | memoryview):
        raise bad("message", message, "must be a JSON object")
    if len(message) > MAX_MESSAGE_BYTES:
        raise BadInput(
            f"message = {len(message)} bytes: must be at most {MAX_MESSAGE_BYTES}; send less at once", field="message"
        )
    try:
        value = orjson.loads(message)
    except orjson.JSONDecodeError as error:
        raise BadInput(
            f"message = {shorten(bytes(message))}: is not JSON ({error}); send one UTF-8 JSON object", field="message"
        ) from None
    if not isinstance(value, dict):
        raise bad("message", value, "must be a JSON object")
    return value


def _unknown(message: Mapping[str, Any], known: Iterable[str], where: str) -> BadInput:
    name = next(n for n in message if n not in known)
    if not isinstance(name, str):
        return bad(where or "message", name, "field names must be strings")
    field = where + name[:MAX_NAME_CHARS].encode("utf-8", "replace").decode()
    return BadInput(
        f"{where}{shorten(name)} is not a known field: did you mean {nearest(name, known)!r}? "
        "Fields of your own belong into `context` or `attributes`",
        field=field,
    )


def _plain(value: Any) -> ShownItem | None:
    """What `_shown` says of an item as ranking writes most of them; None: it has to say."""
    if type(value) is not dict or not value.keys() <= SHOWN_FIELDS:
        return None
    item_id, position, sources, score, predictions, propensity, pool = map(value.get, _SHOWN_ORDER)
    if (
        type(item_id) is not str
        or not 0 < len(item_id) <= MAX_PLAIN
        or not item_id.isprintable()
        or type(position) is not int
        or not 1 <= position <= MAX_POSITION
        or pool is not None
        or not (score is None or (type(score) is float and isfinite(score)))
        or not (propensity is None or (type(propensity) is float and 0.0 < propensity <= 1.0))
        or not (sources is None or (type(sources) is list and len(sources) <= MAX_FIELDS))
        or not (predictions is None or (type(predictions) is dict and len(predictions) <= MAX_FIELDS))
    ):
        return None
    for source in sources or ():
        if type(source) is not str or len(source) > MAX_PLAIN or not source.isascii():
            return None
    for name, p in (predictions or _NOTHING).items():
        if type(p) is not float or not 0.0 <= p <= 1.0:
            return None
        if type(name) is not str or not 0 < len(name) <= MAX_PLAIN or not name.isprintable():
            return None
    return ShownItem(
        item_id=item_id,
        position=position,
        sources=tuple(sources or ()),
        score=score,
        predictions=dict(predictions or _NOTHING),
        propensity=propensity,
    )


def _shown(value: Any, where: str) -> ShownItem:
    if not isinstance(value, dict):
        raise bad(where, value, "must be an object")
    if not value.keys() <= SHOWN_FIELDS:
        raise _unknown(value, SHOWN_FIELDS, where + ".")
    get = value.get
    item_id = parse_id(get("item_id"), where + ".item_id")
    sources, score, predictions, propensity = map(get, ("sources", "score", "predictions", "propensity"))
    return ShownItem(
        item_id=item_id,
        position=parse_position(get("position"), where + ".position"),
        sources=() if sources is None else parse_sources(sources, where + ".sources"),
        score=None if score is None else parse_number(score, where + ".score"),
        predictions=_NOTHING if predictions is None else parse_predictions(predictions, where + ".predictions"),
        propensity=None if propensity is None else parse_propensity(propensity, where + ".propensity"),
        pool=parse_pool(get("pool"), item_id, where + ".pool"),
    )


def _filled(value: Any, fields: Collection[str]) -> dict[str, Any]:
    """The fields that say something: neither None nor empty nor false."""
    return {
        name: v
        for name in fields
        if (v := getattr(value, name)) is not None and v != "" and v != () and v != {} and v is not False
    }
