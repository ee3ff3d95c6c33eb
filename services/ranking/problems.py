"""Errors as `application/problem+json` (RFC 9457): field, value and remedy are in `detail`."""

from __future__ import annotations

from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from recsys.errors import BadInput, LogFull, LogUnavailable, StateUnavailable

_TITLES = {
    400: "bad input",
    404: "not found",
    405: "method not allowed",
    413: "too large",
    422: "bad input",
    503: "unavailable",
}


def problem(status: int, detail: str, *, field: str = "", headers: dict[str, str] | None = None) -> Response:
    """One problem document."""
    body: dict[str, Any] = {
        "type": "about:blank",
        "title": _TITLES.get(status, "error"),
        "status": status,
        "detail": detail,
    }
    if field:
        body["field"] = field
    return Response(orjson.dumps(body), status, headers, "application/problem+json")


def install(app: FastAPI) -> None:
    """Map every error that a route may raise."""

    @app.exception_handler(BadInput)
    async def bad_input(_: Request, error: BadInput) -> Response:
        return problem(413 if error.field == "body" else 400, str(error), field=error.field)

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> Response:
        return problem(error.status_code, str(error.detail), headers=dict(error.headers) if error.headers else None)

    @app.exception_handler(RequestValidationError)
    async def validation(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return problem(400, f"{'.'.join(map(str, first['loc']))}: {first['msg']}", field=str(first["loc"][-1]))

    for kind in (LogFull, LogUnavailable, StateUnavailable):
        app.add_exception_handler(kind, _unavailable)


async def _unavailable(_: Request, error: Exception) -> Response:
    return problem(503, str(error), headers={"Retry-After": "1"})
