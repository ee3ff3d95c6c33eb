"""/v1/items: put, patch, delete and get, one or many."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response

from recsys.errors import BadInput, CatalogueFull, LogError
from recsys.events import messages
from recsys.events.fields import parse_attributes
from recsys.events.schemas import HTTP_ITEM
from recsys.keys import key_of
from recsys.types import Item
from services.ranking import answers, parse
from services.ranking.problems import problem
from services.ranking.service import RankingService

Run = Callable[[Callable[[], Any]], Awaitable[Any]]
Read = Callable[[Request], AbstractAsyncContextManager[parse.Body]]
PAGE = 1000
ROOM = 0.95
"""New items are accepted up to this share of the catalogue's bound: what is accepted by one call is not counted yet in another's."""
_CURSOR = re.compile("[0-9a-f]{16}")
"""The key of a page's last item, as a number from 0: the next page begins behind it, whatever came or went."""


@dataclass(frozen=True, slots=True)
class Runs:
    """Where each kind of work is done."""

    write: Run
    read: Run
    patch: Run


_IDS = {
    "type": "object",
    "properties": {"item_ids": {"type": "array", "items": HTTP_ITEM["properties"]["item_id"]}},
    "required": ["item_ids"],
    "examples": [{"item_ids": ["42", "43"]}],
}
_EXAMPLE = {"version": 1, "item_id": "42", "title": "Red boots", "attributes": {"category": "boots", "tags": ["red"]}}


def add_routes(app: FastAPI, service: RankingService, runs: Runs, read: Read) -> None:
    """Add the catalogue's routes."""
    one_or_many = answers.one_or_many(HTTP_ITEM, "items", _EXAMPLE)

    @app.put("/v1/items", openapi_extra=one_or_many, response_model=None)
    async def put(request: Request) -> Response:
        async with read(request) as body:
            return await runs.write(lambda: write(service, parse.items(body)))

    @app.patch("/v1/items", openapi_extra=one_or_many, response_model=None)
    async def patch(request: Request) -> Response:
        async with read(request) as body:
            return await runs.patch(lambda: patch_items(service, parse.patches(body)))

    @app.delete("/v1/items", openapi_extra=answers.json_body(_IDS), response_model=None)
    async def delete(request: Request) -> Response:
        async with read(request) as body:
            return await runs.write(lambda: write(service, parse.deletes(body)))

    @app.delete("/v1/items/{item_id:path}", response_model=None)
    async def delete_one(item_id: str) -> Response:
        item = Item(item_id=messages.parse_id(item_id, "item_id"), deleted=True)
        return await runs.write(lambda: write(service, [item]))

    @app.get("/v1/items", response_model=None)
    async def page(cursor: str = "0", limit: int = 100) -> Response:
        return await runs.read(lambda: answers.json(_page(service, cursor, limit)))

    @app.get("/v1/items/{item_id:path}", response_model=None)
    async def get(item_id: str) -> Response:
        return await runs.read(lambda: _get(service, messages.parse_id(item_id, "item_id")))


def write(service: RankingService, items: Sequence[Item | parse.Refused]) -> Response:
    """Append the good ones to topic `item`; one outcome an item, in order."""
    rows = [_dumped(item) for item in _with_room(service, items)]
    good = [row for row in rows if not isinstance(row, parse.Refused)]
    if good:
        service.log.append("item", good)
        service.intake.put(item_id for item_id, _ in good)
    outcomes = [
        {"item_id": row.id, "status": "rejected", "reason": row.reason}
        if isinstance(row, parse.Refused)
        else {"item_id": row[0], "status": "accepted"}
        for row in rows
    ]
    return answers.outcomes(outcomes, rows)


def _with_room(service: RankingService, items: Sequence[Item | parse.Refused]) -> list[Item | parse.Refused]:
    """New items are refused a little before the catalogue is full: it would refuse what comes at once by several ways."""
    taken, catalogue, more = list(items), service.sources.catalogue, 0
    for index, item in enumerate(items):
        if isinstance(item, Item):
            try:
                more += catalogue.room_for(item, ROOM, more)
            except CatalogueFull as error:
                taken[index] = parse.Refused(id=item.item_id, field=error.field, reason=str(error), full=True)
    return taken


def _dumped(item: Item | parse.Refused) -> tuple[str, bytes] | parse.Refused:
    """Key and message; what no consumer would read is refused here instead of being lost there."""
    if isinstance(item, parse.Refused):
        return item
    message = messages.dump_item(item)
    if len(message) > messages.MAX_MESSAGE_BYTES:
        reason = (
            f"attributes: the item has {len(message)} bytes, at most {messages.MAX_MESSAGE_BYTES} are kept: send less"
        )
        return parse.Refused(id=item.item_id, field="attributes", reason=reason)
    return item.item_id, message


def patch_items(service: RankingService, patches: Sequence[Any]) -> Response:
    """Change items as they are after all that was written before."""
    with service.patching:
        service.settle_items()
        changed: dict[str, Item] = {}

        def patched(patch: Mapping[str, Any]) -> Item:
            item = _patched(service, patch, changed)
            changed[item.item_id] = item
            return item

        return write(service, parse.each(patches, "item_id", patched))


def _patched(service: RankingService, patch: Mapping[str, Any], changed: Mapping[str, Item]) -> Item:
    """The present item with the patch's title and attributes; an attribute set to null is removed."""
    attributes = {} if patch.get("attributes") is None else patch["attributes"]
    if not isinstance(attributes, dict):
        raise BadInput(f"attributes = {messages.shorten(attributes)}: send an object", field="attributes")
    item = messages.parse_item({**patch, "attributes": {n: v for n, v in attributes.items() if v is not None}})
    present = changed.get(item.item_id) or _present(service, item.item_id)
    merged = {n: v for n, v in {**present.attributes, **attributes}.items() if v is not None}
    title = item.title if patch.get("title") is not None else present.title
    return Item(item_id=item.item_id, title=title, attributes=parse_attributes(merged), deleted=item.deleted)


def _present(service: RankingService, item_id: str) -> Item:
    catalogue = service.sources.catalogue
    with catalogue.reading():
        row = catalogue.row(item_id)
        if row is not None and catalogue.alive[row]:
            return catalogue.item(row)
    raise BadInput(
        f"item_id = {messages.shorten(item_id)}: not in the catalogue, PUT it to /v1/items first", field="item_id"
    )


def _get(service: RankingService, item_id: str) -> Response:
    with contextlib.suppress(LogError):  # then what is known is better than nothing
        service.settle_items()
    try:
        return answers.json(_dump(_present(service, item_id)))
    except BadInput as error:
        return problem(404, str(error), field=error.field)


def _page(service: RankingService, cursor: str, limit: int) -> dict[str, Any]:
    """Items from the cursor on, in the order of their keys, which no restart changes; `next_cursor` is null at the end."""
    if not (cursor == "0" or _CURSOR.fullmatch(cursor)) or not 1 <= limit <= PAGE:
        raise BadInput(
            f"cursor = {messages.shorten(cursor)}, limit = {limit}: send 0 or a cursor from an answer, and a limit from 1 to {PAGE}",
            field="limit",
        )
    after = None if cursor == "0" else int(cursor, 16) - 2**63
    items = service.sources.catalogue.page(after, limit + 1)
    following = f"{key_of(items[limit - 1].item_id) + 2**63:016x}" if len(items) > limit else None
    return {"items": [_dump(item) for item in items[:limit] if not item.deleted], "next_cursor": following}


def _dump(item: Item) -> dict[str, Any]:
    return {"item_id": item.item_id, "title": item.title, "attributes": dict(item.attributes)}
