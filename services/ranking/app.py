"""The HTTP API. Routes read bytes and write bytes; what they mean is in `parse`, `RankingService` and `answers`."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import unquote_to_bytes

from fastapi import FastAPI, Request, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from recsys import metrics
from recsys.events import messages
from recsys.events.schemas import HTTP_FEEDBACK
from services.ranking import answers, catalogue_api, parse
from services.ranking.bodies import Bodies
from services.ranking.problems import OPENAPI, Overloaded, failed, install, problem
from services.ranking.service import RankingService

T = TypeVar("T")
_NO_TEXT = "path: its %-escapes are no UTF-8; send ids as UTF-8, each byte escaped"
_SMALL_BYTES = 65_536
"""A body up to this is read on the event loop, in about a millisecond; a larger one in a thread, where nobody waits behind it."""
_CLICK = {"version": 1, "event_id": "c2f1", "user_id": "u1", "item_id": "42", "type": "click", "time_ms": 1767225600000}
Read = Callable[[Request], AbstractAsyncContextManager[parse.Body]]


class Workers:
    """Threads for one kind of work, and how many requests may be under way in them at once."""

    def __init__(self, name: str, threads: int, max_inflight: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._inflight, self._max_inflight = 0, max_inflight

    async def run(self, work: Callable[[], T]) -> T:
        """The work's result; Overloaded at once when too much is under way."""
        if self._inflight >= self._max_inflight:
            metrics.DEGRADED.labels("shed").inc()
            raise Overloaded(f"{self._inflight} requests are under way: try again in a second, or add a process")
        self._inflight += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, work)
        finally:
            self._inflight -= 1


@dataclass(frozen=True, slots=True)
class Pools:
    """Threads by how long their work may take, so that nothing waits behind what is slower than itself."""

    score: Workers
    writes: Workers
    """Feedback, and items as they come: one append each."""
    reads: Workers
    """One look into the store or the catalogue; the store may be away."""
    patches: Workers
    """Each waits until the catalogue has what was written before it; they follow one another in any case."""


def create_app(service: RankingService) -> FastAPI:
    """The FastAPI application over a started (or starting) service."""
    app = FastAPI(
        title="recsys",
        version="1",
        description="A recommender that learns from what a user did a moment ago.",
        responses=OPENAPI,
    )
    install(app)
    max_inflight = service.config.ranking.max_inflight
    pools = Pools(
        score=Workers("score", 2, max_inflight),
        writes=Workers("writes", 16, 4 * max_inflight),
        reads=Workers("reads", 8, 4 * max_inflight),
        patches=Workers("patches", 1, max_inflight),
    )
    read = Bodies(service.config.ranking.max_body_bytes).read
    app.add_middleware(Observe)
    _recommend_route(app, service, pools, read)
    _feedback_route(app, service, pools, read)
    _user_routes(app, service, pools)
    _health_routes(app, service, pools)
    runs = catalogue_api.Runs(write=pools.writes.run, read=pools.reads.run, patch=pools.patches.run)
    catalogue_api.add_routes(app, service, runs, read)
    return app


def is_text(raw_path: bytes) -> bool:
    """Whether a path's escapes are UTF-8: what is not would be read as another id than was meant."""
    if b"%" not in raw_path:
        return True
    try:
        unquote_to_bytes(raw_path).decode()
    except UnicodeDecodeError:
        return False
    return True


class Observe:
    """Counts every answer; what no route caught becomes a problem with an id instead of a traceback."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # HEAD is GET whose body the server leaves out: it still sees the scope that it made.
        scope = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
        status = 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if is_text(scope["raw_path"]):
                await self._app(scope, receive, watched)
            else:
                await problem(400, _NO_TEXT, field="path")(scope, receive, watched)
        except Exception as error:  # the last resort: logged under an id, raised again once an answer has begun
            response = failed(Request(scope), error)
            if status:
                raise
            await response(scope, receive, watched)
        finally:
            metrics.HTTP_REQUESTS.labels(getattr(scope.get("route"), "path", "other"), str(status or 499)).inc()


def _recommend_route(app: FastAPI, service: RankingService, pools: Pools, read: Read) -> None:
    @app.post(
        "/v1/recommend",
        openapi_extra=answers.json_body(answers.RECOMMEND_SCHEMA),
        responses={200: {"description": "a list"}},
    )
    async def recommend(request: Request) -> Response:
        started = time.perf_counter()
        request_id = uuid.uuid4().hex
        async with read(request) as body:
            if len(body) <= _SMALL_BYTES:
                asked = parse.recommend(body, request_id, service.config)
            else:
                asked = await pools.reads.run(lambda: parse.recommend(body, request_id, service.config))
        answer, contains = await pools.score.run(lambda: service.recommend(asked))
        metrics.RECOMMEND_SECONDS.observe(time.perf_counter() - started)
        return Response(
            answers.dump(answer, contains),
            headers={"X-Request-ID": answer.request_id},
            media_type="application/json",
        )


def _feedback_route(app: FastAPI, service: RankingService, pools: Pools, read: Read) -> None:
    def event_ids() -> Iterator[str]:
        prefix = uuid.uuid4().hex
        number = 0
        while True:
            yield f"{prefix}-{number}"
            number += 1

    @app.post(
        "/v1/feedback",
        openapi_extra=answers.one_or_many(HTTP_FEEDBACK, "events", _CLICK),
        responses={200: {"description": "one outcome an event"}},
    )
    async def feedback(request: Request) -> Response:
        async with read(request) as body:

            def work() -> Response:
                events = parse.feedback(body, event_ids(), service.clock.now_ms())
                return answers.outcomes(service.accept(events), events)

            return await pools.writes.run(work)


def _user_routes(app: FastAPI, service: RankingService, pools: Pools) -> None:
    @app.get("/v1/users/{user_id:path}", response_model=None)
    async def user(user_id: str) -> Response:
        state, contains = await pools.reads.run(lambda: service.user(messages.parse_id(user_id, "user_id")))
        return answers.user(user_id, state, contains)

    @app.delete("/v1/users/{user_id:path}", status_code=202, response_model=None)
    async def forget(user_id: str) -> Response:
        await pools.writes.run(lambda: service.forget(messages.parse_id(user_id, "user_id"), uuid.uuid4().hex))
        return answers.json({"user_id": user_id, "status": "accepted"}, 202)


def _health_routes(app: FastAPI, service: RankingService, pools: Pools) -> None:
    @app.get("/healthz", response_model=None)
    async def healthz() -> Response:
        return answers.json({"status": "alive"})

    @app.get("/v1/system", response_model=None)
    async def system() -> Response:
        return await pools.reads.run(lambda: answers.json({"log": service.identities()}))

    @app.get("/readyz", response_model=None)
    async def readyz() -> Response:
        reason = service.not_ready()
        metrics.READY.set(not reason)
        return answers.json({"status": "not ready" if reason else "ready", "reason": reason}, 503 if reason else 200)

    @app.get("/metrics", response_model=None)
    async def prometheus() -> Response:
        return Response(metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")
