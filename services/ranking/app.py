"""The HTTP API. Routes read bytes and write bytes; what they mean is in `parse`, `RankingService` and `answers`."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response

from recsys import metrics
from recsys.errors import BadInput
from recsys.events import messages
from recsys.events.schemas import HTTP_FEEDBACK
from services.ranking import answers, catalogue_api, parse
from services.ranking.problems import install, problem
from services.ranking.service import RankingService

T = TypeVar("T")
Next = Callable[[Request], Awaitable[Response]]


class Limits:
    """How much work may be under way: scoring threads, other threads, requests at once."""

    def __init__(self, max_inflight: int) -> None:
        self.scoring = ThreadPoolExecutor(2, thread_name_prefix="score")
        self.other = ThreadPoolExecutor(16, thread_name_prefix="api")
        self.inflight = 0
        self.max_inflight = max_inflight

    async def run(self, pool: ThreadPoolExecutor, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(pool, work)


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body, or BadInput (413) as soon as it is over the limit."""
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise BadInput(
                f"the body is over {limit} bytes: send smaller batches, or raise ranking.max_body_bytes", field="body"
            )
        chunks.append(chunk)
    return b"".join(chunks)


def _json_body(schema: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _batch(schema: dict[str, Any], name: str) -> dict[str, Any]:
    return {
        "oneOf": [
            schema,
            {"type": "object", "properties": {name: {"type": "array", "items": schema}}, "required": [name]},
        ]
    }


def create_app(service: RankingService) -> FastAPI:
    """The FastAPI application over a started (or starting) service."""
    app = FastAPI(
        title="recsys", version="1", description="A recommender that learns from what a user did a moment ago."
    )
    install(app)
    limits = Limits(service.config.ranking.max_inflight)
    body_limit = service.config.ranking.max_body_bytes
    _observe(app)
    _recommend_route(app, service, limits, body_limit)
    _feedback_route(app, service, limits, body_limit)
    _user_routes(app, service, limits)
    _health_routes(app, service)
    catalogue_api.add_routes(
        app, service, lambda work: limits.run(limits.other, work), lambda request: read_body(request, body_limit)
    )
    return app


def _observe(app: FastAPI) -> None:
    @app.middleware("http")
    async def observe(request: Request, call_next: Next) -> Response:
        try:
            response = await call_next(request)
        except Exception:
            metrics.HTTP_REQUESTS.labels(_route(request), "500").inc()
            raise
        metrics.HTTP_REQUESTS.labels(_route(request), str(response.status_code)).inc()
        return response


def _route(request: Request) -> str:
    return getattr(request.scope.get("route"), "path", "other")


def _recommend_route(app: FastAPI, service: RankingService, limits: Limits, body_limit: int) -> None:
    @app.post(
        "/v1/recommend", openapi_extra=_json_body(answers.RECOMMEND_SCHEMA), responses={200: {"description": "a list"}}
    )
    async def recommend(request: Request) -> Response:
        started = time.perf_counter()
        body = await read_body(request, body_limit)
        asked = parse.recommend(body, uuid.uuid4().hex)
        if limits.inflight >= limits.max_inflight:
            metrics.DEGRADED.labels("shed").inc()
            return problem(
                503,
                f"{limits.inflight} requests are under way: try again in a second, or add a process",
                headers={"Retry-After": "1"},
            )
        limits.inflight += 1
        try:
            answer, _ = await limits.run(limits.scoring, lambda: service.recommend(asked))
        finally:
            limits.inflight -= 1
        metrics.RECOMMEND_SECONDS.observe(time.perf_counter() - started)
        return Response(
            answers.dump(answer, service), headers={"X-Request-ID": answer.request_id}, media_type="application/json"
        )


def _feedback_route(app: FastAPI, service: RankingService, limits: Limits, body_limit: int) -> None:
    def event_ids() -> Iterator[str]:
        prefix = uuid.uuid4().hex
        number = 0
        while True:
            yield f"{prefix}-{number}"
            number += 1

    @app.post(
        "/v1/feedback",
        openapi_extra=_json_body(_batch(HTTP_FEEDBACK, "events")),
        responses={200: {"description": "one outcome an event"}},
    )
    async def feedback(request: Request) -> Response:
        body = await read_body(request, body_limit)

        def work() -> list[dict[str, str]]:
            return service.accept(parse.feedback(body, event_ids(), service.clock.now_ms()))

        outcomes = await limits.run(limits.other, work)
        all_bad = bool(outcomes) and all(o["status"] == "rejected" for o in outcomes)
        return answers.json({"outcomes": outcomes}, 400 if all_bad else 200)


def _user_routes(app: FastAPI, service: RankingService, limits: Limits) -> None:
    @app.get("/v1/users/{user_id:path}", response_model=None)
    async def user(user_id: str) -> Response:
        state = await limits.run(limits.other, lambda: service.user(messages.parse_id(user_id, "user_id")))
        return answers.user(user_id, state, service)

    @app.delete("/v1/users/{user_id:path}", status_code=202, response_model=None)
    async def forget(user_id: str) -> Response:
        await limits.run(limits.other, lambda: service.forget(messages.parse_id(user_id, "user_id"), uuid.uuid4().hex))
        return answers.json({"user_id": user_id, "status": "accepted"}, 202)


def _health_routes(app: FastAPI, service: RankingService) -> None:
    @app.get("/healthz", response_model=None)
    async def healthz() -> Response:
        return answers.json({"status": "alive"})

    @app.get("/readyz", response_model=None)
    async def readyz() -> Response:
        reason = service.not_ready()
        metrics.READY.set(not reason)
        return answers.json({"status": "not ready" if reason else "ready", "reason": reason}, 503 if reason else 200)

    @app.get("/metrics", response_model=None)
    async def prometheus() -> Response:
        return Response(metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")
