"""The values that travel between the parts. Imports nothing of ours."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NewType, TypeAlias

import numpy as np
import numpy.typing as npt

Int64: TypeAlias = npt.NDArray[np.int64]
Int32: TypeAlias = npt.NDArray[np.int32]
Float32: TypeAlias = npt.NDArray[np.float32]
Bool: TypeAlias = npt.NDArray[np.bool_]
UInt8: TypeAlias = npt.NDArray[np.uint8]

UserId = NewType("UserId", str)
ItemId = NewType("ItemId", str)

TOPICS = ("item", "impression", "feedback", "parameters", "dead_letter")
FORGET = "$forget"
"""Reserved feedback type: everything kept of the user is deleted, in log order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One record of a log. `time_ms` is log time: when the log appended it."""

    topic: str
    partition: int
    offset: int
    key: str
    value: bytes
    time_ms: int


class Batch(list[Record]):
    """What one read of a log found, and `next`: the offset to read from after it.

    `next` lies behind the last record, and behind what is no record (markers, records that were taken back or are damaged):
    it may have moved although nothing was found, and it has not moved when there was nothing yet.
    """

    __slots__ = ("next",)

    def __init__(self, records: Iterable[Record], next_offset: int) -> None:
        super().__init__(records)
        self.next = next_offset


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One catalogue entry: upsert, or delete when `deleted`. Attribute values are strings, numbers or lists of strings."""

    item_id: str
    title: str = ""
    attributes: Mapping[str, Any] = field(default_factory=dict)
    deleted: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Feedback:
    """One action of a user on an item. `time_ms` is the client's claim and only orders history."""

    event_id: str
    user_id: str
    item_id: str
    type: str
    time_ms: int
    session_id: str | None = None
    request_id: str | None = None
    value: float | None = None
    context: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownItem:
    """One item of an impression. `pool` is set at a drawn position: item ids and their probabilities, the shown one included."""

    item_id: str
    position: int
    sources: tuple[str, ...] = ()
    score: float | None = None
    predictions: Mapping[str, float] = field(default_factory=dict)
    propensity: float | None = None
    pool: tuple[tuple[str, float], ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Impression:
    """One answer shown. `features` are the keys and numbers as served (empty when somebody else wrote it)."""

    request_id: str
    user_id: str
    time_ms: int
    items: tuple[ShownItem, ...]
    context: Mapping[str, Any] = field(default_factory=dict)
    session_id: str | None = None
    activation: str = "shown"
    schema: str = ""
    features: bytes = b""
    bandit: bytes = b""
    """What the bandit knew as served: see `recsys.bandit.served`."""
    policy: str = ""
    model_version: str = ""
    generation: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryEvent:
    """One event of a user's history. Its identity is (time, event_id); its place is by time, then by arrival."""

    time_ms: int
    event_id: str
    item_id: str = field(compare=False)
    type: str = field(compare=False)
    session_id: str | None = field(compare=False, default=None)
    arrival: int = field(compare=False, default=0)
    """Where its record lies in the log, from 1: what came later has more. 0: not known, as earlier versions wrote it."""

    @property
    def place(self) -> tuple[int, int, str]:
        """What a history is sorted by."""
        return self.time_ms, self.arrival, self.event_id


@dataclass(frozen=True, slots=True, kw_only=True)
class UserState:
    """What is known of one user: history by time, then arrival, oldest first; item ids last seen, oldest first."""

    history: tuple[HistoryEvent, ...] = ()
    seen: tuple[str, ...] = ()
    acted: tuple[HistoryEvent, ...] = ()
    """The last event of each item that was acted upon and is not in the history any more; only item, time and session are known."""
    hidden: tuple[str, ...] = ()
    """Items never to be shown again."""
    shown: tuple[tuple[int, int], ...] = ()
    """Of each seen item: log time when it was last shown, milliseconds (0: not known), and how often it was."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UserUpdate:
    """What one feedback or impression adds to one user's state; `forget` deletes all that came before it."""

    user_id: str
    events: tuple[HistoryEvent, ...] = ()
    acted: tuple[HistoryEvent, ...] = ()
    """Events that are not kept in the history; their items are."""
    hidden: tuple[str, ...] = ()
    seen: tuple[str, ...] = ()
    seen_ms: int = 0
    """Log time when they were seen."""
    forget: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class AsOf:
    """What an answer's part contains: log positions, and the log time up to which every record is in it."""

    positions: Mapping[str, int] = field(default_factory=dict)
    time_ms: int = 0
