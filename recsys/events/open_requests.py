"""Requests whose outcomes may still come, in bounded memory: one mechanism for all who wait for what becomes of an answer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Generic, Protocol, TypeVar


class Remembered(Protocol):
    """What somebody keeps of a request."""

    time_ms: int
    """Log time of its impression."""
    num_bytes: int
    """What it takes of the bound."""


T = TypeVar("T", bound=Remembered)


class OpenRequests(Generic[T]):
    """By request id, the one opened first in front, within `limit_bytes`. Who keeps them decides whether a new one is refused where there
    is no room, or the oldest makes some. Not thread-safe."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._bytes = 0
        self._open: OrderedDict[str, T] = OrderedDict()

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._open

    def __iter__(self) -> Iterator[str]:
        return iter(self._open)

    def __getitem__(self, request_id: str) -> T:
        return self._open[request_id]

    def get(self, request_id: str | None) -> T | None:
        """What is kept of a request; None: it is not open."""
        return None if request_id is None else self._open.get(request_id)

    def items(self) -> Iterable[tuple[str, T]]:
        """All, the one opened first in front."""
        return self._open.items()

    @property
    def full_ratio(self) -> float:
        """How full it is."""
        return self._bytes / self.limit_bytes

    def has_room(self, num_bytes: int) -> bool:
        """Whether so much more is within the bound."""
        return self._bytes + num_bytes <= self.limit_bytes

    def add(self, request_id: str, opened: T) -> None:
        """Open a request; if it is open already, anew."""
        self.drop(request_id)
        self._open[request_id] = opened
        self._bytes += opened.num_bytes

    def drop(self, request_id: str) -> T | None:
        """Close a request; what was kept of it."""
        opened = self._open.pop(request_id, None)
        if opened is not None:
            self._bytes -= opened.num_bytes
        return opened

    def shrink(self, opened: T, num_bytes: int) -> None:
        """An open one takes so much less."""
        opened.num_bytes -= num_bytes
        self._bytes -= num_bytes

    def drop_before(self, time_ms: int) -> None:
        """Close those in front that were opened earlier."""
        while self._open and next(iter(self._open.values())).time_ms < time_ms:
            self._drop_first()

    def make_room(self) -> None:
        """Close those in front until all is within the bound."""
        while self._open and not self.has_room(0):
            self._drop_first()

    def _drop_first(self) -> None:
        self.drop(next(iter(self._open)))

    def set_back(self, now_ms: int) -> None:
        """Log time was ahead: what was opened ahead of `now_ms` was opened then."""
        for opened in self._open.values():
            opened.time_ms = min(opened.time_ms, now_ms)

    def clear(self) -> None:
        """Close all."""
        self._open.clear()
        self._bytes = 0
