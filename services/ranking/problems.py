"""Errors as `application/problem+json` (RFC 9457): field, value and remedy are in `detail`."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from recsys.errors import BadInput, LogError, RecsysError, StateUnavailable
from recsys.events.fields import MAX_NAME_CHARS
from recsys.events.messages import shorten
from services.common.process import logger

_TITLES = {
    400: "bad input",
    404: "not found",
    405: "method not allowed",
    408: "request timeout",
    413: "too large",
    431: "header fields too large",
    500: "internal error",
    503: "unavailable",
}
_CLIENT_GONE = 499
_TEXT = {"type": "string"}
OPENAPI: dict[int | str, dict[str, Any]] = {
    "default": {
        "description": "what is wrong: field, value and remedy",
        "content": {
            "application/problem+json": {
                "schema": {
                    "type": "object",
                    "required": ["type", "title", "status", "detail"],
                    "properties": {
                        "type": _TEXT,
                        "title": _TEXT,
                        "status": {"type": "integer"},
                        "detail": _TEXT,
                        "field": _TEXT,
                        "request_id": _TEXT,
                        "outcomes": {"type": "array", "items": {"type": "object"}},
                    },
                },
                "example": {
                    "type": "about:blank",
                    "title": "bad input",
                    "status": 400,
                    "detail": "n = 0: ask for an integer from 1 to 100",
                    "field": "n",
                },
            }
        },
    }
}


class TooLarge(BadInput):
    """A body over the limit."""


class Overloaded(RecsysError):
    """More requests are under way than this process takes."""


def problem(
    status: int,
    detail: str,
    *,
    field: str = "",
    headers: dict[str, str] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Response:
    """One problem document; `extra` are further members."""
    body: dict[str, Any] = {
        "type": "about:blank",
        "title": _TITLES.get(status, "error"),
        "status": status,
        "detail": detail,
    }
    if field:
        body["field"] = field
    return Response(orjson.dumps(body | dict(extra or {})), status, headers, "application/problem+json")


def failed(request: Request, error: Exception) -> Response:
    """Our own fault: the traceback goes to the log under an id, and only the id to the client."""
    request_id = uuid.uuid4().hex
    logger.error("request %s: %s %s failed", request_id, request.method, shorten(request.scope["path"]), exc_info=error)
    detail = f"this is a fault of the service: look for {request_id} in its log"
    return problem(500, detail, headers={"X-Request-ID": request_id}, extra={"request_id": request_id})


def install(app: FastAPI) -> None:
    """Map every error that a route may raise."""

    @app.exception_handler(BadInput)
    async def bad_input(_: Request, error: BadInput) -> Response:
        return problem(413 if isinstance(error, TooLarge) else 400, str(error), field=error.field)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        # Not request.url: it is made with the Host header, which anybody may write as no host at all.
        asked = f"{request.method} {shorten(request.scope['path'])}"
        allowed = (error.headers or {}).get("Allow")
        detail = {404: f"{asked}: nothing is here; /docs lists what is", 405: f"{asked}: use {allowed}, see /docs"}
        headers = dict(error.headers) if error.headers else None
        return problem(error.status_code, detail.get(error.status_code, str(error.detail)), headers=headers)

    @app.exception_handler(RequestValidationError)
    async def validation(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        field = str(first["loc"][-1])[:MAX_NAME_CHARS]
        return problem(400, f"{field} = {shorten(first.get('input'))}: {first['msg']}", field=field)

    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, __: ClientDisconnect) -> Response:
        return Response(status_code=_CLIENT_GONE)  # nobody reads it; the counter of answers does

    for kind in (LogError, StateUnavailable, Overloaded):
        app.add_exception_handler(kind, _unavailable)


async def _unavailable(_: Request, error: Exception) -> Response:
    return problem(503, str(error), headers={"Retry-After": "1"})
