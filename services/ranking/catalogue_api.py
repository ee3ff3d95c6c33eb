"""/v1/items: put, patch, delete and get, one or many."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request, Response

from recsys.errors import BadInput
from recsys.events import messages
from recsys.events.schemas import HTTP_ITEM
from recsys.types import Item
from services.ranking import answers, parse
from services.ranking.problems import problem
from services.ranking.service import RankingService

Run = Callable[[Callable[[], Any]], Awaitable[Any]]
Read = Callable[[Request], Awaitable[bytes]]
PAGE = 1000


def _openapi(schema: dict[str, Any]) -> dict[str, Any]:
    many = {"type": "object", "properties": {"items": {"type": "array", "items": schema}}, "required": ["items"]}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": {"oneOf": [schema, many]}}}}}


def add_routes(app: FastAPI, service: RankingService, run: Run, read: Read) -> None:
    """Add the catalogue's routes."""

    @app.put("/v1/items", openapi_extra=_openapi(HTTP_ITEM), response_model=None)
    async def put(request: Request) -> Response:
        body = await read(request)
        return _outcomes(await run(lambda: write(service, parse.items(body))))

    @app.patch("/v1/items", openapi_extra=_openapi(HTTP_ITEM), response_model=None)
    async def patch(request: Request) -> Response:
        body = await read(request)
        return _outcomes(await run(lambda: write(service, [_patched(service, p) for p in parse.patches(body)])))

    @app.delete("/v1/items", response_model=None)
    async def delete(request: Request) -> Response:
        body = await read(request)
        return _outcomes(
            await run(lambda: write(service, [Item(item_id=i, deleted=True) for i in parse.item_ids(body)]))
        )

    @app.delete("/v1/items/{item_id:path}", response_model=None)
    async def delete_one(item_id: str) -> Response:
        item = Item(item_id=messages.parse_id(item_id, "item_id"), deleted=True)
        return _outcomes(await run(lambda: write(service, [item])))

    @app.get("/v1/items", response_model=None)
    async def page(cursor: int = 0, limit: int = 100) -> Response:
        return answers.json(_page(service, cursor, limit))

    @app.get("/v1/items/{item_id:path}", response_model=None)
    async def get(item_id: str) -> Response:
        catalogue = service.sources.catalogue
        row = catalogue.row(item_id)
        if row is None or not catalogue.alive[row]:
            return problem(
                404,
                f"item {messages.shorten(item_id)} is not in the catalogue: PUT it to /v1/items first",
                field="item_id",
            )
        return answers.json(_dump(catalogue.item(row)))


def write(service: RankingService, items: list[Item | BadInput]) -> list[dict[str, str]]:
    """Append the good ones to topic `item`; one outcome an item, in order."""
    good = [item for item in items if isinstance(item, Item)]
    if good:
        service.log.append("item", [(item.item_id, messages.dump_item(item)) for item in good])
    return [
        {"item_id": item.item_id, "status": "accepted"}
        if isinstance(item, Item)
        else {"item_id": "", "status": "rejected", "reason": str(item)}
        for item in items
    ]


def _patched(service: RankingService, patch: dict[str, Any]) -> Item | BadInput:
    """The present item with the patch's title and attributes; an attribute set to null is removed."""
    try:
        attributes = patch.get("attributes") or {}
        if not isinstance(attributes, dict):
            raise BadInput("attributes: send an object", field="attributes")
        removed = {name for name, value in attributes.items() if value is None}
        item = messages.parse_item(patch | {"attributes": {n: v for n, v in attributes.items() if v is not None}})
    except BadInput as error:
        return error
    catalogue = service.sources.catalogue
    row = catalogue.row(item.item_id)
    if row is None or not catalogue.alive[row]:
        return BadInput(
            f"item {messages.shorten(item.item_id)} is not in the catalogue: PUT it to /v1/items first", field="item_id"
        )
    present = catalogue.item(row)
    kept = {name: value for name, value in present.attributes.items() if name not in removed}
    title = item.title if patch.get("title") is not None else present.title
    return Item(item_id=item.item_id, title=title, attributes={**kept, **item.attributes}, deleted=item.deleted)


def _page(service: RankingService, cursor: int, limit: int) -> dict[str, Any]:
    """Items from row `cursor` on, deleted ones left out; `next_cursor` is null at the end."""
    if cursor < 0 or not 1 <= limit <= PAGE:
        raise BadInput(
            f"cursor = {cursor}, limit = {limit}: send a cursor from an answer and a limit from 1 to {PAGE}",
            field="limit",
        )
    catalogue = service.sources.catalogue
    found: list[dict[str, Any]] = []
    row, size = cursor, len(catalogue)
    while row < size and len(found) < limit:
        if catalogue.alive[row]:
            found.append(_dump(catalogue.item(row)))
        row += 1
    return {"items": found, "next_cursor": row if row < size else None}


def _dump(item: Item) -> dict[str, Any]:
    return {"item_id": item.item_id, "title": item.title, "attributes": dict(item.attributes)}


def _outcomes(outcomes: list[dict[str, str]]) -> Response:
    all_bad = bool(outcomes) and all(o["status"] == "rejected" for o in outcomes)
    return answers.json({"outcomes": outcomes}, 400 if all_bad else 200)
