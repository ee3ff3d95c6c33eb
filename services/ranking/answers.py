"""Values to JSON answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson
from fastapi import Response

from recsys.ranking.request import Answer, AsOf
from recsys.types import UserState

if TYPE_CHECKING:
    from services.ranking.service import RankingService

_ID = {"oneOf": [{"type": "string", "minLength": 1, "maxLength": 256}, {"type": "integer"}]}
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
        "activation": {"enum": ["shown", "deferred"], "default": "shown"},
    },
    "examples": [{"user_id": "u1", "n": 10}],
}


def json(value: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(value), status, media_type="application/json")


def as_of(value: AsOf) -> dict[str, Any]:
    return {"time_ms": value.time_ms, "positions": dict(value.positions)}


def dump(answer: Answer, service: RankingService) -> bytes:
    """The body of an answer."""
    catalogue = service.sources.catalogue
    items = []
    for shown, reason in zip(answer.items, answer.reasons, strict=True):
        row = catalogue.row(shown.item_id)
        items.append(
            {
                "item_id": shown.item_id,
                "title": catalogue.titles[row] if row is not None else "",
                "position": shown.position,
                "sources": shown.sources,
                "score": shown.score,
                "predictions": shown.predictions,
                "propensity": shown.propensity,
                "reason": reason,
            }
        )
    consumer = service.consumer
    return orjson.dumps(
        {
            "request_id": answer.request_id,
            "items": items,
            "as_of": {
                "user_state": as_of(consumer.user_state),
                "counters": as_of(consumer.counters),
                "parameters": as_of(answer.parameters),
            },
            "model_version": answer.model_version,
            "generation": answer.generation,
            "policy": answer.policy,
            "degraded": answer.degraded,
        }
    )


def user(user_id: str, state: UserState, service: RankingService) -> Response:
    """The body of GET /v1/users/{id}."""
    history = [
        {"event_id": e.event_id, "item_id": e.item_id, "type": e.type, "time_ms": e.time_ms, "session_id": e.session_id}
        for e in state.history
    ]
    body = {"user_id": user_id, "history": history, "seen": state.seen, "as_of": as_of(service.consumer.user_state)}
    return json(body)
