"""Progressive metrics: how good predictions were that were made before their labels were known.

AUC, log loss, normalised entropy, calibration; GAUC by group; hit rate and reciprocal rank of next-item answers. All
sums are float64. A metric that is not defined (one class only, no examples) is NaN, and null in a report.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from recsys.types import Int64

Array: TypeAlias = npt.NDArray[Any]

_CHUNK_ROWS = 65_536
"""Rows of one chunk of collected examples, 1.4 MB a task: half or double changes nothing measurable."""
_CLOSEST = 1e-7
"""Predictions are kept this far from 0 and 1 in logarithms: float32 cannot tell closer ones from them."""
_ROW = np.dtype([("prediction", np.float64), ("label", np.bool_), ("user", np.int64), ("day", np.int32)])


def auc(predictions: Array, labels: Array) -> float:
    """The chance that a positive is ranked above a negative, ties counting half [N]. NaN when one class is missing."""
    return gauc(predictions, labels, np.zeros(len(labels), np.int64))


def gauc(predictions: Array, labels: Array, groups: Int64) -> float:
    """AUC within each group that has both labels, averaged with the groups' numbers of examples as weights [N].

    Zhou et al. 2018 (DIN), section 6.2. NaN when no group has both labels.
    """
    if not len(labels):
        return math.nan
    predictions = np.asarray(predictions, np.float64)
    if not np.isfinite(predictions).all():
        raise ValueError(f"predictions hold {np.count_nonzero(~np.isfinite(predictions))} NaN or infinite values")
    order = np.lexsort((predictions, groups))
    scores, positive, ordered = predictions[order], np.asarray(labels, np.bool_)[order], np.asarray(groups)[order]
    new_group = np.append(True, ordered[1:] != ordered[:-1])
    new_tie = new_group | np.append(True, scores[1:] != scores[:-1])
    starts, first = np.flatnonzero(new_tie), np.flatnonzero(new_group)
    ends = np.append(starts[1:], len(scores))
    group = np.cumsum(new_group) - 1
    # Equal predictions share the mean of the ranks they take up; ranks count from 1 within the group.
    ranks = ((starts + ends + 1) / 2)[np.cumsum(new_tie) - 1] - first[group]
    examples = np.diff(np.append(first, len(scores))).astype(np.float64)
    positives = np.bincount(group, positive)
    rank_sums = np.bincount(group, ranks * positive)
    pairs = positives * (examples - positives)
    both = pairs > 0
    if not both.any():
        return math.nan
    areas = (rank_sums[both] - positives[both] * (positives[both] + 1) / 2) / pairs[both]
    return float(np.average(areas, weights=examples[both]))


def group_ids(*keys: Array) -> Int64:
    """A number for each distinct combination of keys, from 0 in sorted order: groups for `gauc`."""
    order = np.lexsort(keys[::-1])
    new = np.zeros(len(order), np.bool_)
    for key in keys:
        new[1:] |= np.diff(np.asarray(key)[order]) != 0
    ids = np.empty(len(order), np.int64)
    ids[order] = np.cumsum(new)
    return ids


def log_loss(predictions: Array, labels: Array) -> float:
    """Mean negative log likelihood, natural logarithm [N]."""
    if not len(labels):
        return math.nan
    p = np.clip(np.asarray(predictions, np.float64), _CLOSEST, 1 - _CLOSEST)
    return float(-np.mean(np.where(np.asarray(labels, np.bool_), np.log(p), np.log1p(-p))))


def normalized_entropy(predictions: Array, labels: Array) -> float:
    """Log loss over that of always predicting the average rate of these examples: below 1 is better than the rate.

    He et al. 2014, section 3. NaN when one class is missing.
    """
    rate = float(np.mean(labels)) if len(labels) else math.nan
    if not 0 < rate < 1:
        return math.nan
    return log_loss(predictions, labels) / -(rate * math.log(rate) + (1 - rate) * math.log1p(-rate))


def calibration(predictions: Array, labels: Array) -> float:
    """Sum of predictions over number of positives: 1 is calibrated. NaN without positives."""
    positives = float(np.sum(labels))
    return float(np.sum(predictions, dtype=np.float64)) / positives if positives else math.nan


class Progressive:
    """Collects predictions and labels of each task and reports on all of them. About 21 bytes an example; one thread."""

    def __init__(self, tasks: Iterable[str]) -> None:
        self._chunks: dict[str, list[Array]] = {task: [] for task in tasks}
        self._used = dict.fromkeys(self._chunks, _CHUNK_ROWS)

    def add(self, task: str, predictions: Array, labels: Array, users: Int64, days: Array) -> None:
        """Add examples of one task [N]: prediction made before learning, label, user key, number of the day."""
        rows = np.empty(len(predictions), _ROW)
        rows["prediction"], rows["label"], rows["user"], rows["day"] = predictions, labels, users, days
        chunks = self._chunks[task]
        while len(rows):
            if self._used[task] == _CHUNK_ROWS:
                chunks.append(np.empty(_CHUNK_ROWS, _ROW))
                self._used[task] = 0
            used = self._used[task]
            part = rows[: _CHUNK_ROWS - used]
            chunks[-1][used : used + len(part)] = part
            self._used[task] += len(part)
            rows = rows[len(part) :]

    def report(self) -> dict[str, dict[str, float | int | None]]:
        """Task → examples, auc, normalized_entropy, gauc by (user, day), calibration."""
        return {task: self._report(task) for task in self._chunks}

    def _report(self, task: str) -> dict[str, float | int | None]:
        chunks = self._chunks[task]
        rows = np.concatenate([*chunks[:-1], chunks[-1][: self._used[task]]]) if chunks else np.empty(0, _ROW)
        p, y = rows["prediction"], rows["label"]
        return {
            "examples": len(rows),
            "auc": _known(auc(p, y)),
            "normalized_entropy": _known(normalized_entropy(p, y)),
            "gauc": _known(gauc(p, y, group_ids(rows["user"], rows["day"]))),
            "calibration": _known(calibration(p, y)),
        }


class NextItem:
    """Counts how often, and how high, the item clicked next was among the first `n` shown."""

    def __init__(self, n: int = 20) -> None:
        self._n = n
        self._predictions = 0
        self._hits = 0
        self._reciprocal = 0.0

    def add(self, shown: Sequence[str], clicked: str) -> None:
        """Add one answer, best first, and the item that was clicked next."""
        self._predictions += 1
        if clicked in (top := shown[: self._n]):
            self._hits += 1
            self._reciprocal += 1 / (top.index(clicked) + 1)

    def report(self) -> dict[str, float | int | None]:
        """predictions, hit_rate_at_20, mrr_at_20 (null without predictions)."""
        num = self._predictions
        return {
            "predictions": num,
            f"hit_rate_at_{self._n}": self._hits / num if num else None,
            f"mrr_at_{self._n}": self._reciprocal / num if num else None,
        }


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
