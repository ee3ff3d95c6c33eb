"""The HTTP routes over a service whose parts can be made to wait: nothing waits behind what is slower than itself."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import httpx

from recsys.candidates.sources import Sources
from recsys.clock import ManualClock
from recsys.config import Config
from recsys.features.catalogue import Catalogue
from recsys.features.schema import Schema
from recsys.streams.memory_log import MemoryLog
from recsys.types import AsOf, Item, UserState
from services.ranking.app import create_app
from services.ranking.feedback_intake import Intake


class Service:
    """As much of a RankingService as the routes for items and feedback ask for; settling waits for `settled`."""

    def __init__(self) -> None:
        self.config, self.clock = Config(), ManualClock(1_800_000_000_000)
        schema = Schema.of(self.config)
        self.log = MemoryLog(self.clock)
        self.sources = Sources(self.config, schema, Catalogue(schema))
        for n in range(20):
            self.sources.item(Item(item_id=f"i{n}", deleted=False))
        self.intake = Intake(self.config, self.log, self.clock, self.sources, lambda: True)
        self.accept, self.patching, self.settled = self.intake.take, threading.Lock(), threading.Event()
        self.away = threading.Event()

    def settle_items(self) -> None:
        self.settled.wait()

    def user(self, user_id: str) -> Any:
        self.away.wait()
        return UserState(), AsOf()


def test_feedback_waits_neither_for_patches_nor_for_a_store_that_is_away() -> None:
    service = Service()

    async def all_at_once() -> None:
        app = create_app(service)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x", timeout=30) as http:
            patch, click = {"item_id": "i1", "title": "T"}, {"user_id": "u", "item_id": "i1", "type": "click"}
            slow = [asyncio.create_task(http.patch("/v1/items", json=patch)) for _ in range(40)]
            slow += [asyncio.create_task(http.get(f"/v1/users/u{n}")) for n in range(40)]
            await asyncio.sleep(0)
            for _ in range(20):
                answer = await asyncio.wait_for(http.post("/v1/feedback", json=click), 10)
                assert answer.json()["outcomes"][0]["status"] == "accepted"
            put = await asyncio.wait_for(http.put("/v1/items", json={"item_id": "i2"}), 10)
            assert put.status_code == 200 and not any(task.done() for task in slow)
            service.settled.set()
            service.away.set()
            assert {answer.status_code for answer in await asyncio.gather(*slow)} == {200}

    asyncio.run(all_at_once())


def test_pages_skip_what_is_deleted() -> None:
    service = Service()
    for n in (0, 3, 4, 5, 19):
        service.sources.item(Item(item_id=f"i{n}", deleted=True))

    def pages(get: Callable[[str], httpx.Response]) -> list[str]:
        found, cursor = [], "0"
        while cursor is not None:
            page = get(f"/v1/items?limit=4&cursor={cursor}").json()
            found += [item["item_id"] for item in page["items"]]
            cursor = page["next_cursor"]
        return found

    async def all_pages() -> None:
        app = create_app(service)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as http:
            loop = asyncio.get_running_loop()

            def get(path: str) -> httpx.Response:
                return asyncio.run_coroutine_threadsafe(http.get(path), loop).result()

            found = await asyncio.to_thread(pages, get)
            assert sorted(found) == sorted(f"i{n}" for n in range(20) if n not in (0, 3, 4, 5, 19))

    asyncio.run(all_pages())
