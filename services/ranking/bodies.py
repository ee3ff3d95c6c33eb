"""Bodies of requests: each within its limit, and all that are under way together within theirs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from fastapi import Request

from recsys import metrics
from services.ranking.parse import Body
from services.ranking.problems import Overloaded, TooLarge

_TOGETHER = 4
"""Bodies of the largest size that may be held at once: while they are parsed, they take up to twenty times as much."""
_SMALL_BYTES = 65_536
"""So much of each body is held in any case: what somebody waits for goes on while others send large batches."""
_LARGE_BYTES = 2**20
"""A body above this is parsed while at most one other is."""


class Bodies:
    """Reads bodies for one event loop."""

    def __init__(self, max_bytes: int) -> None:
        self._each, self._together = max_bytes, _TOGETHER * max_bytes
        self._held = 0
        self._large = asyncio.Semaphore(2)

    @contextlib.asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[Body]:
        """The whole body, held until the block's end; TooLarge as soon as it is over its limit or says that it will be.

        Overloaded where all bodies together would be over theirs.
        """
        self._check(request.headers.get("content-length", "0"))
        body, held = bytearray(), 0
        try:
            async for chunk in request.stream():
                if len(body) + len(chunk) > self._each:
                    raise self._too_large()
                more = max(len(body) + len(chunk) - _SMALL_BYTES, 0) - held
                if more > 0:
                    self._hold(more)
                    held += more
                body += chunk
            if len(body) <= _LARGE_BYTES:
                yield body
            else:
                async with self._large:
                    yield body
        finally:
            if held:
                self._hold(-held)

    def _check(self, said: str) -> None:
        size = int(said) if said.isascii() and said.isdigit() else 0
        if size > self._each:
            raise self._too_large()
        if size > _SMALL_BYTES and self._held + size > self._together:
            raise self._overloaded()

    def _hold(self, size: int) -> None:
        if size > 0 and self._held + size > self._together:
            raise self._overloaded()
        self._held += size
        metrics.BODIES_FULL.set(self._held / self._together)

    def _too_large(self) -> TooLarge:
        return TooLarge(
            f"the body is over {self._each} bytes: send smaller batches, or raise ranking.max_body_bytes", field="body"
        )

    def _overloaded(self) -> Overloaded:
        return Overloaded(
            f"{self._held} bytes of other bodies are under way, {self._together} may be: send smaller batches, or try again in a second"
        )
