"""Which rows make room in a full table: what a row is worth, which rows are looked at, how many go. See docs/decisions.

A row's worth is when it was last seen, in steps, and `HALF_LIFE` steps more for each doubling of how often it was seen. A touch
only ever raises it and time alone never changes it, so it needs no sweep to stay right. Of the rows in a window of hashes those
of least worth go, equal ones by hash; windows follow one another, so each part of the index is thinned as often as the others.
What goes is decided by rows, hashes and where the window begins, never by where a row lies.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from recsys.keys import mix
from recsys.table.base import Layout
from recsys.table.rows import LAST_SEEN_STEP_MS, last_seen
from recsys.types import Bool, Int32, Int64

HALF_LIFE = 86_400_000 // LAST_SEEN_STEP_MS
"""Steps of last-seen: a row that was seen twice as often may be unseen for a day longer. With half a day more of what was often
seen last week is gone; with two, what is new waits longer before it stays."""
MAX_USES = 15
"""Uses are kept as a level 0 … 15, about log2 of how often a row was seen (Morris 1978)."""
LOOKS = 8192
"""Rows looked at at least: a fraction of a millisecond. Half makes the choice of a small eviction cruder."""
LOOKS_EACH = 8
"""Rows looked at for each that goes: the worst eighth of a sample. Double costs twice as much for little; at a quarter the
index is unevenly full, by as much, before and behind the windows."""
_SLACK = 1024
"""Rows that go beyond what is needed now, so that not every call looks; of small tables a 64th."""
_PLACE = np.uint64(0xD1342543DE82EF95)

UInt64 = npt.NDArray[np.uint64]


def tick(now_ms: int) -> int:
    """What the draws of this time's counting begin with; > 0."""
    return int(last_seen(now_ms)) // LAST_SEEN_STEP_MS * 0x9E3779B97F4A7C15 % 2**63 | 1


def counted(level: int, gap: int, key: int, of: int) -> int:
    """The level of a row that is seen again `gap` steps after it was last seen, with the draws of tick `of`.

    It fades by one a half-life and rises by one with probability 2^-level. Within a step a row is counted once, but for the
    second time it is seen at all: what came once and what came twice must differ at once.
    """
    if gap <= 0:
        return max(level, 1)
    level = max(level - gap // HALF_LIFE, 0)
    draw = int(mix(np.array([(key + of) % 2**64], np.uint64))[0])
    return level + (level < MAX_USES and draw & ((1 << level) - 1) == 0)


def level_of(counts: Int64) -> Int64:
    """The level of exact counts [N]."""
    return np.minimum(np.log2(np.maximum(counts, 1)).astype(np.int64), MAX_USES)


def hashes(order: int, places: Int32 | Int64, keys: Int64) -> UInt64:
    """The hash [N] that decides which window a row is in; `places` are those of its slot."""
    head = np.uint64(order % 2**64)
    return mix(places.astype(np.uint64) * _PLACE + keys.view(np.uint64) + head)


class Windows:
    """Windows of the highest 32 bits of hashes, each beginning where the last one ended."""

    def __init__(self) -> None:
        self.at = 0

    def next(self, rows: int, looks: int) -> tuple[int, int]:
        """Begin and width of one that holds about `looks` of `rows` rows, hence all hashes if there are no more."""
        start, width = self.at, 2**32 if looks >= rows else -(-(looks << 32) // rows)
        self.at = (start + width) % 2**32
        return start, width


def within(hashed: UInt64, of: tuple[int, int]) -> Bool:
    """Which hashes [N] are in a window; it may run over the end."""
    start, width = of
    inside: Bool = (hashed >> np.uint64(32)) - np.uint64(start) & np.uint64(0xFFFFFFFF) < np.uint64(width)
    return inside


def least(worth: Int64, hashed: UInt64, count: int) -> Bool:
    """Which `count` rows are worth least [N], the lower hash first where equal; those with equal hashes together."""
    if count >= len(worth):
        return np.ones(len(worth), np.bool_)
    if count <= 0:
        return np.zeros(len(worth), np.bool_)
    above = np.minimum(worth - worth.min(), 2**26 - 1).astype(np.uint64)
    rank = above << np.uint64(38) | hashed >> np.uint64(26)
    chosen: Bool = rank <= np.partition(rank, count - 1)[count - 1]
    return chosen


def target(layout: Layout) -> int:
    """Rows that are kept at most, but for what came since room was made."""
    return layout.capacity - int(layout.capacity * layout.spare)


def surplus(layout: Layout, rows: int, new: int) -> int:
    """How many of `rows` go before `new` more come: to the target in steps of at most twice what comes, and into the capacity at
    once."""
    over = rows + new - target(layout)
    if over <= 0:
        return 0
    return max(with_slack(layout, min(over, 2 * new)), rows + new - layout.capacity)


def with_slack(layout: Layout, count: int) -> int:
    """A few more than must go, so that not every call looks for some."""
    return count + min(_SLACK, layout.capacity // 64)


def looks_for(count: int) -> int:
    """How many rows are looked at so that `count` may go."""
    return max(LOOKS, LOOKS_EACH * count)
