"""One candidate list from several sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from recsys.types import Float32, Int32

PRIORS = {"trending": 10.0, "nearest": 3.0, "followed": 3.0, "bandit": 3.0}
"""How many co-visits a source's whole list is worth, spread over it in proportion to the scores. For
trending 1, 3 and 10 differ by at most .002 in hit rate on one day of news clicks; the other three are not tuned."""


def mix(
    sources: Sequence[tuple[str, Int32, Float32]],
    limit: int,
    priors: Mapping[str, float] = PRIORS,
) -> tuple[Int32, Float32, npt.NDArray[np.int64]]:
    """Merge (name, distinct rows, scores) lists into one: rows, scores, best first, ties by row, and a bit for each source.

    The score is the posterior mean of a multinomial, up to a factor: a source without a prior (co-visited, caller) brings counts
    that are added as they are; the list of one with a prior is a distribution worth that many counts. Negative scores count
    as 0. Bit i of the mask says that `sources[i]` had the row. At most 63 sources.
    """
    if not sources:
        return np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(0, np.int64)
    rows, where = np.unique(np.concatenate([rows for _, rows, _ in sources]), return_inverse=True)
    totals, masks, start = np.zeros(len(rows)), np.zeros(len(rows), np.int64), 0
    for bit, (name, source_rows, scores) in enumerate(sources):
        places = where[start : start + len(source_rows)]
        start += len(source_rows)
        evidence = np.maximum(scores.astype(np.float64), 0.0)
        if name in priors and (mass := evidence.sum()) > 0:
            evidence *= priors[name] / mass
        totals[places] += evidence
        masks[places] |= 1 << bit
    best = np.argsort(-totals, kind="stable")[:limit]
    return rows[best].astype(np.int32), totals[best].astype(np.float32), masks[best]
