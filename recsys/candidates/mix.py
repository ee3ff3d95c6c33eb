"""One candidate list from several sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from recsys.compiled import compiled
from recsys.retrieval.select import may_show, place_of, room_for
from recsys.types import Bool, Float32, Int32, Int64

Found = tuple[str, Int32, Float32]
"""A source's name, distinct rows, and their scores."""
Mixed = tuple[Int32, Float32, Int64]
_ANY = 2**31 - 1


class Showable(NamedTuple):
    """Which rows may be shown: both masks say so (rows beyond their ends may not), and they are not left out (ascending)."""

    alive: Bool
    allowed: Bool
    left_out: Int32


@compiled
def _kept(rows: Any, scores: Any, ends: Any, quotas: Any, may: Any, out_rows: Any, evidence: Any) -> None:
    """Of each list as many as its quota that may be shown, in place of them all; `ends` of the lists move along."""
    alive, allowed, left_out = may
    count, start = 0, 0
    for source in range(len(ends)):
        left = quotas[source]
        for entry in range(start, ends[source]):
            row = rows[entry]
            if left > 0 and may_show(row, alive, left_out) and row < len(allowed) and allowed[row]:
                out_rows[count], evidence[count] = row, max(np.float64(scores[entry]), 0.0)
                count += 1
                left -= 1
        start = ends[source]
        ends[source] = count


@compiled
def _summed(rows: Any, evidence: Any, ends: Any, out_rows: Any, totals: Any, masks: Any) -> int:
    places, count, start = room_for(len(rows)), 0, 0
    for source in range(len(ends)):
        for entry in range(start, ends[source]):
            at = place_of(rows[entry], places, out_rows)
            if places[at] == 0:
                out_rows[count], totals[count], masks[count] = rows[entry], 0.0, 0
                count += 1
                places[at] = count
            totals[places[at] - 1] += evidence[entry]
            masks[places[at] - 1] |= np.int64(1) << source
        start = ends[source]
    return count


def mix(
    found: Sequence[Found],
    limit: int,
    priors: Mapping[str, float],
    may: Showable,
    quotas: Mapping[str, int] | None = None,
) -> Mixed:
    """Merge the sources' lists into one: rows, scores, best first, ties by row, and a bit for each source.

    Of each list as many as its quota count, the first that may be shown. The score is the posterior mean of a multinomial, up to a
    factor: a source without a prior (co-visited, caller) brings counts that are added as they are; the list of one with a prior is a
    distribution worth that many counts. Negative scores count as 0. Bit i of the mask says that `found[i]` had the row. At most 63 sources.
    """
    size = sum(len(rows) for _, rows, _ in found)
    if not size:
        return np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(0, np.int64)
    ends = np.cumsum([len(rows) for _, rows, _ in found])
    quota = np.array([_ANY if quotas is None else quotas.get(name, _ANY) for name, _, _ in found])
    rows, evidence = np.empty(size, np.int32), np.empty(size)
    _kept(
        np.concatenate([rows for _, rows, _ in found], dtype=np.int32),
        np.concatenate([scores for _, _, scores in found], dtype=np.float32),  # no other type is compiled
        ends,
        quota,
        tuple(may),
        rows,
        evidence,
    )
    start = 0
    for (name, _, _), end in zip(found, ends.tolist(), strict=True):
        if name in priors and (mass := evidence[start:end].sum()) > 0:
            evidence[start:end] *= priors[name] / mass
        start = end
    out, totals, masks = np.empty(start, np.int32), np.empty(start), np.empty(start, np.int64)
    count = _summed(rows[:start], evidence, ends, out, totals, masks)
    out, totals = out[:count], totals[:count]
    best = np.lexsort((out, -totals))[:limit]
    return out[best], totals[best].astype(np.float32), masks[best]


def warm_up() -> None:
    """Compile: not in the first request."""
    rows, every = np.zeros(1, np.int32), np.ones(1, np.bool_)
    mix([("", rows, np.zeros(1, np.float32))], 1, {}, Showable(every, every, rows[:0]))
