"""JSON Schema (2020-12) of the public messages: what `recsys.events.messages` accepts, as far as a schema can say it.

Beyond the schema the parser checks: ids and texts are limited in bytes, not characters; numbers without a fraction are
written without one where an integer is asked for; the items of an impression, and of a pool, are distinct; a pool
contains the shown item.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from recsys.events.fields import (
    CONTROL,
    MAX_FIELDS,
    MAX_ID_BYTES,
    MAX_INT,
    MAX_ITEMS,
    MAX_NAME_CHARS,
    MAX_POSITION,
    MAX_TEXT_BYTES,
    MAX_TIME_MS,
    MAX_VALUES,
    MIN_INT,
)
from recsys.events.messages import ACTIVATIONS, VERSION

Schema: TypeAlias = dict[str, Any]


def _text(max_length: int, **more: Any) -> Schema:
    return {"type": "string", "maxLength": max_length, **more}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _fields(value: Schema) -> Schema:
    names = {"minLength": 1, "maxLength": MAX_NAME_CHARS}
    return {"type": "object", "maxProperties": MAX_FIELDS, "propertyNames": names, "additionalProperties": value}


def _message(title: str, required: list[str], properties: Schema, **more: Any) -> Schema:
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": title,
        "type": "object",
        "required": required,
        "additionalProperties": False,
        "properties": {"version": {"type": "integer", "const": VERSION}, **properties},
        **more,
    }


_ID: Schema = {"$ref": "#/$defs/id"}
_DEFS: Schema = {
    "id": {
        "description": "1 to 256 bytes of UTF-8 without control characters; an integer means its decimal string",
        "anyOf": [
            _text(MAX_ID_BYTES, minLength=1, **{"not": {"pattern": CONTROL}}),
            {"type": "integer", "minimum": MIN_INT, "maximum": MAX_INT},
        ],
    }
}
_TIME: Schema = {"description": "milliseconds since 1970, UTC", "type": "integer", "minimum": 0, "maximum": MAX_TIME_MS}
_NUMBER: Schema = {"type": "number"}
_SCALARS: list[Schema] = [_text(MAX_TEXT_BYTES), _NUMBER, {"type": "boolean"}]
_CONTEXT: Schema = _fields({"anyOf": _SCALARS})
_LIST: Schema = {"type": "array", "maxItems": MAX_VALUES, "items": _text(MAX_TEXT_BYTES)}
_CHANCE: Schema = {"type": "number", "exclusiveMinimum": 0, "maximum": 1}

_SHOWN: Schema = {
    "type": "object",
    "required": ["item_id", "position"],
    "additionalProperties": False,
    "properties": {
        "item_id": _ID,
        "position": {"description": "from 1 for the top", "type": "integer", "minimum": 1, "maximum": MAX_POSITION},
        "sources": _or_null({"type": "array", "maxItems": MAX_FIELDS, "items": _text(MAX_ID_BYTES)}),
        "score": _or_null(_NUMBER),
        "predictions": _or_null(_fields({"type": "number", "minimum": 0, "maximum": 1})),
        "propensity": _or_null(_CHANCE),
        "pool": _or_null(
            {
                "description": "what a drawn position was drawn from: [item_id, probability] pairs",
                "type": "array",
                "minItems": 1,
                "maxItems": MAX_ITEMS,
                "items": {"type": "array", "prefixItems": [_ID, _CHANCE], "minItems": 2, "maxItems": 2},
            }
        ),
    },
}

ITEM: Schema = _message(
    "item",
    ["version", "item_id"],
    {
        "item_id": _ID,
        "title": _or_null(_text(MAX_TEXT_BYTES)),
        "attributes": _or_null(_fields({"anyOf": [*_SCALARS, _LIST]})),
        "deleted": _or_null({"type": "boolean"}),
    },
    **{
        "if": {"required": ["deleted"], "properties": {"deleted": {"const": True}}},
        "then": {"properties": {"title": {"type": "null"}, "attributes": {"type": "null"}}},
        "$defs": _DEFS,
    },
)

FEEDBACK: Schema = _message(
    "feedback",
    ["version", "event_id", "user_id", "item_id", "type", "time_ms"],
    {
        "event_id": _ID,
        "user_id": _ID,
        "item_id": _ID,
        "type": _text(MAX_NAME_CHARS, minLength=1, **{"not": {"pattern": f"^\\$|{CONTROL}"}}),
        "time_ms": _TIME,
        "session_id": _or_null(_ID),
        "request_id": _or_null(_ID),
        "value": _or_null(_NUMBER),
        "context": _or_null(_CONTEXT),
    },
    **{"$defs": _DEFS},
)

_BASE64: Schema = {
    "type": "string",
    "contentEncoding": "base64",
    "pattern": "^([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$",
    "not": {"pattern": "[^A-Za-z0-9+/=]"},
}

IMPRESSION: Schema = _message(
    "impression",
    ["version", "request_id", "user_id", "time_ms", "items"],
    {
        "request_id": _ID,
        "user_id": _ID,
        "time_ms": _TIME,
        "session_id": _or_null(_ID),
        "context": _or_null(_CONTEXT),
        "items": {"type": "array", "minItems": 1, "maxItems": MAX_ITEMS, "items": _SHOWN},
        "activation": _or_null({"enum": list(ACTIVATIONS)}),
        "schema": _or_null(_text(MAX_NAME_CHARS)),
        "features": _or_null(_BASE64),
        "bandit": _or_null(_BASE64),
        "policy": _or_null(_text(MAX_ID_BYTES)),
        "model_version": _or_null(_text(MAX_ID_BYTES)),
        "generation": _or_null(_text(MAX_ID_BYTES)),
    },
    **{
        "if": {"required": ["features"], "properties": {"features": {"type": "string", "minLength": 1}}},
        "then": {"required": ["schema"], "properties": {"schema": {"type": "string", "minLength": 1}}},
        "$defs": _DEFS,
    },
)

SCHEMAS: dict[str, Schema] = {"item": ITEM, "impression": IMPRESSION, "feedback": FEEDBACK}
"""Topic → schema of its messages."""


def inlined(schema: Any) -> Any:
    """The schema without `$ref` and `$defs`: to stand inside another document, such as OpenAPI's."""
    if isinstance(schema, list):
        return [inlined(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if schema == _ID:
        return _DEFS["id"]
    return {name: inlined(part) for name, part in schema.items() if name not in ("$defs", "$schema")}


HTTP_ITEM: Schema = inlined(ITEM)
HTTP_FEEDBACK: Schema = inlined(FEEDBACK)
HTTP_ITEM["required"] = ["item_id"]
HTTP_FEEDBACK["required"] = ["user_id", "item_id", "type"]
for _name in ("event_id", "time_ms"):
    HTTP_FEEDBACK["properties"][_name] = _or_null(HTTP_FEEDBACK["properties"][_name])
"""Over HTTP the server fills in what is missing of `version`, `event_id` and `time_ms`."""
