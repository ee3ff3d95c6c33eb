"""Values to JSON answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import orjson
from fastapi import Response

from recsys.ranking.shown import Shown
from recsys.types import AsOf, UserState
from services.ranking.parse import Refused
from services.ranking.problems import problem

FULL_RETRY_S = "60"
"""When to try again what there is no room for: somebody has to make some."""
_ID = {"oneOf": [{"type": "string", "minLength": 1, "maxLength": 256}, {"type": "integer"}]}
_VALUE = {"type": ["string", "number", "boolean"]}
_VALUES = {"anyOf": [_VALUE, {"type": "array", "items": _VALUE, "minItems": 1, "maxItems": 1000}]}
_BOUND = {"type": "number"}
_CONDITION: dict[str, Any] = {
    "description": "one of these values; or an object of conditions, all of which hold",
    "anyOf": [
        *_VALUES["anyOf"],
        {
            "type": "object",
            "minProperties": 1,
            "additionalProperties": False,
            "properties": {"any": _VALUES, "all": _VALUES, "none": _VALUES, "min": _BOUND, "max": _BOUND},
        },
    ],
}
_FILTERS = {"type": "object", "additionalProperties": _CONDITION}
_BOOST = {
    "type": "object",
    "description": "the score of items that pass the filters, and were brought by one of the sources, is score * times + plus",
    "additionalProperties": False,
    "properties": {
        "filters": _FILTERS,
        "sources": {"type": "array", "items": {"type": "string"}},
        "times": {"type": "number", "minimum": 0, "maximum": 1e6, "default": 1},
        "plus": {"type": "number", "minimum": -1e6, "maximum": 1e6, "default": 0},
    },
}
_PIN = {
    "type": "object",
    "additionalProperties": False,
    "required": ["position", "item_id"],
    "properties": {"position": {"type": "integer", "minimum": 1}, "item_id": _ID},
}
RECOMMEND_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["user_id"],
    "additionalProperties": False,
    "properties": {
        "user_id": _ID,
        "n": {"type": "integer", "minimum": 1, "maximum": 100, "default": 20},
        "session_id": _ID,
        "context": {"type": "object"},
        "exclude": {"type": "array", "items": _ID, "maxItems": 1000},
        "candidates": {"type": "array", "items": _ID, "maxItems": 1000},
        "filters": _FILTERS,
        "boosts": {"type": "array", "items": _BOOST, "maxItems": 20},
        "pins": {"type": "array", "items": _PIN, "maxItems": 20},
        "activation": {"enum": ["shown", "deferred"], "default": "shown"},
    },
    "examples": [
        {"user_id": "u1", "n": 10},
        {"user_id": "u1", "filters": {"category": ["lamps", "boots"], "tags": {"none": ["sold out"]}}},
    ],
}


def json_body(schema: dict[str, Any]) -> dict[str, Any]:
    """OpenAPI of a JSON request body."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def one_or_many(schema: dict[str, Any], name: str, example: dict[str, Any]) -> dict[str, Any]:
    """OpenAPI of a body that is one message, or many of them under `name`."""
    many = {"type": "object", "properties": {name: {"type": "array", "items": schema}}, "required": [name]}
    return json_body({"anyOf": [schema, many], "examples": [example, {name: [example]}]})


def json(value: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(value), status, media_type="application/json")


def as_of(value: AsOf) -> dict[str, Any]:
    return {"time_ms": value.time_ms, "positions": dict(value.positions)}


def outcomes(found: Sequence[dict[str, str]], rows: Sequence[object]) -> Response:
    """One outcome a row; a problem that carries them when every row was refused."""
    first = next(iter(rows), None)
    if isinstance(first, Refused) and all(outcome["status"] == "rejected" for outcome in found):
        if first.full:
            headers = {"Retry-After": FULL_RETRY_S}
            return problem(503, first.reason, field=first.field, headers=headers, extra={"outcomes": found})
        return problem(400, first.reason, field=first.field, extra={"outcomes": found})
    return json({"outcomes": found})


def dump(answer: Shown, contains: Mapping[str, AsOf]) -> bytes:
    """The body of an answer; `contains` is its `as_of`."""
    items = []
    for shown, title, reason in zip(answer.items, answer.titles, answer.reasons, strict=True):
        items.append(
            {
                "item_id": shown.item_id,
                "title": title,
                "position": shown.position,
                "sources": shown.sources,
                "score": shown.score,
                "predictions": shown.predictions,
                "propensity": shown.propensity,
                "reason": reason,
            }
        )
    return orjson.dumps(
        {
            "request_id": answer.request_id,
            "items": items,
            "as_of": {part: as_of(value) for part, value in contains.items()},
            "model_version": answer.model_version,
            "generation": answer.generation,
            "policy": answer.policy,
            "degraded": answer.degraded,
            "note": answer.note,
        }
    )


def user(user_id: str, state: UserState, contains: AsOf) -> Response:
    """The body of GET /v1/users/{id}."""
    history = [
        {"event_id": e.event_id, "item_id": e.item_id, "type": e.type, "time_ms": e.time_ms, "session_id": e.session_id}
        for e in state.history
    ]
    acted = [{"item_id": e.item_id, "time_ms": e.time_ms, "session_id": e.session_id} for e in state.acted]
    body = {
        "user_id": user_id,
        "history": history,
        "seen": state.seen,
        "acted": acted,
        "hidden": state.hidden,
        "as_of": as_of(contains),
    }
    return json(body)
