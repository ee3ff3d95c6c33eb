"""What a source of candidates is: it is asked for a request's best items, and fed with what happens.

A new one is a module with a class, and a line in `recsys/config/source_list.py`: from that list come its name in the
configuration, its default quota, its place in snapshots and in the documents.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from recsys.candidates.contexts import Shared
from recsys.candidates.explorer import Active, Bandit
from recsys.candidates.generation import Located
from recsys.config import Config
from recsys.features.build import UserFeatures
from recsys.features.catalogue import Catalogue
from recsys.features.schema import Schema
from recsys.retrieval.select import NO_ROWS
from recsys.types import Bool, Float32, Int32

Arrays = dict[str, Any]
Listing = tuple[Int32, Float32]
"""Distinct catalogue rows, the best first, and their scores."""
NOTHING: Listing = NO_ROWS, np.zeros(0, np.float32)


def unscored(rows: Int32) -> Listing:
    """Rows that nothing was counted of: all score 0."""
    return rows, np.zeros(len(rows), np.float32)


class Deadline:
    """When a request must be answered, and which of its stages were left out because it had passed. Of one thread."""

    __slots__ = ("_at_s", "missed")

    def __init__(self, at_s: float) -> None:
        self._at_s = at_s
        self.missed: list[str] = []

    def passed(self, stage: str) -> bool:
        """Whether it has passed; then the stage is left out, and the answer says so."""
        if time.perf_counter() < self._at_s:
            return False
        self.missed.append(stage)
        return True


class Parts(NamedTuple):
    """What sources are made of."""

    config: Config
    schema: Schema
    catalogue: Catalogue


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A request, as far as sources know it."""

    request_id: str
    now_ms: int
    deadline: Deadline
    n: int
    user: UserFeatures | None = None
    """None: neither a source nor the ranker asks for it."""
    history_rows: Sequence[int] = ()
    """Rows of what the user chose in this session (of their history where it is new), newest first."""
    allowed: Bool | None = None
    """Which rows pass the filters; None: all do. Rows beyond its end are newer: not allowed."""
    left_out: Int32
    """Rows that rules leave out of this answer, whatever they are; ascending."""
    listed: Int32 | None = None
    """Rows of the caller's own candidates; None: the sources are asked."""
    pinned: Mapping[int, int]
    """Position → row of the items with a place of their own."""
    located: Located | None = None
    """Where the user is in the generation in use."""
    active: Active | None = None
    """The clusters nearest to them."""
    bandit: Bandit | None = None


class Counted(NamedTuple):
    """An event that sources count: of the item at `row`, after the session's earlier ones."""

    row: int
    before: Sequence[int]
    """Rows of the session's earlier items, newest first; -1: not known yet."""
    now_ms: int
    weight: float
    """How much of an event it is; 0: it was counted before, and is told again of an item before it that is known now."""
    shared: Shared | None
    """Columns of the user and the context it happened in."""


class Reason(NamedTuple):
    """Why a source shows an item. Of several the largest weight is told: the more it says of this user, the larger."""

    weight: int
    text: str


class Source:
    """One source of candidates. Fed by one writer; asked from any thread, so that it locks what it keeps."""

    name: ClassVar[str]
    prior: ClassVar[float | None] = None
    """How many co-visits its whole list is worth, see `mix`; None: its scores are counts, and are added as they are."""
    needs_user: ClassVar[bool] = False
    """Whether it asks for `Asked.user`."""

    def __init__(self, parts: Parts) -> None:
        """Nothing is counted yet."""

    def candidates(self, asked: Asked, quota: int) -> Listing:
        """The `quota` best allowed items that are not left out, best first; some more or worse ones do no harm."""
        raise NotImplementedError

    def reason(self, asked: Asked) -> Reason | None:
        """What an item of this source is shown for; None: nothing worth saying."""
        return None

    def clear(self) -> None:
        """Begin to count anew. What the catalogue told stays."""

    def counted(self, event: Counted) -> None:
        """An event to learn from."""

    def changed(self, row: int) -> None:
        """The item at `row` is new, or changed."""

    def deleted(self, row: int) -> None:
        """The item at `row` was deleted; it may come back."""

    def catalogue_restored(self) -> None:
        """The catalogue was loaded: the items are those that it holds now."""

    def forget_rows(self, rows: Int32) -> None:
        """These rows will be other items': nothing is kept by them."""

    def state(self) -> dict[str, Arrays]:
        """What it counted, as arrays by the names of its parts, for a snapshot."""
        return {}

    def restore(self, state: Mapping[str, Arrays], row_map: Int32, **times: int) -> None:
        """Load `state`; `row_map[old row]` is today's row, -1 where the item is gone; `times`: see `ForwardDecay.restore`.

        `state` has the parts of all sources. SnapshotCorrupt where it cannot be used.
        """

    def popular(self, rows: Int32, scores: Float32) -> None:
        """After a restore: what trends, for a source that saves nothing of its own."""
