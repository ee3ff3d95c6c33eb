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

from recsys.evaluation.bootstrap import Resamples, interval
from recsys.types import Bool, Int64

Array: TypeAlias = npt.NDArray[Any]

_CHUNK_ROWS = 65_536
"""Rows of one chunk of collected examples, 1.4 MB a task: half or double changes nothing measurable."""
_CLOSEST = 1e-7
"""Predictions are kept this far from 0 and 1 in logarithms: float32 cannot tell closer ones from them."""
_Groups: TypeAlias = tuple[Array, Array, Int64]
METRICS = ("auc", "normalized_entropy", "gauc", "calibration")
_ROW = np.dtype([("prediction", np.float64), ("label", np.bool_), ("user", np.int64), ("day", np.int32)])


def auc(predictions: Array, labels: Array) -> float:
    """The chance that a positive is ranked above a negative, ties counting half [N]. NaN when one class is missing."""
    return gauc(predictions, labels, np.zeros(len(labels), np.int64))


def gauc(predictions: Array, labels: Array, groups: Int64) -> float:
    """AUC within each group that has both labels, averaged with the groups' numbers of examples as weights [N].

    Zhou et al. 2018 (DIN), section 6.2. NaN when no group has both labels.
    """
    areas, examples, _ = group_aucs(predictions, labels, groups)
    return float(np.average(areas, weights=examples)) if len(areas) else math.nan


def group_aucs(predictions: Array, labels: Array, groups: Int64) -> tuple[Array, Array, Int64]:
    """AUC, number of examples and first row of each group that has both labels."""
    if not len(labels):
        return np.zeros(0), np.zeros(0), np.zeros(0, np.int64)
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
    areas = (rank_sums[both] - positives[both] * (positives[both] + 1) / 2) / pairs[both]
    return areas, examples[both], order[first[both]]


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

    def report(self) -> dict[str, Any]:
        """`tasks`: task → examples, auc, normalized_entropy, gauc by (user, day), calibration, each with its interval; `days`: the same by day."""
        rows = {task: self.rows(task) for task in self._chunks}
        days = sorted({int(day) for found in rows.values() for day in np.unique(found["day"])})
        return {
            "tasks": {task: _report(found) for task, found in rows.items()},
            "days": [
                {"day": day, "tasks": {task: _report(found[found["day"] == day]) for task, found in rows.items()}}
                for day in days
            ],
        }

    def rows(self, task: str) -> Array:
        """All examples of one task, in the order they were added: prediction, label, user, day."""
        chunks = self._chunks[task]
        return np.concatenate([*chunks[:-1], chunks[-1][: self._used[task]]]) if chunks else np.empty(0, _ROW)


def differences(first: Array, second: Array) -> dict[str, Any]:
    """Each metric of two predictions of the same examples, in the same order (rows as `Progressive.rows` has them).

    `difference`: second less first, with the interval of its paired bootstrap: both on the same resamples of users.
    """
    if not (np.array_equal(first["label"], second["label"]) and np.array_equal(first["user"], second["user"])):
        raise ValueError("the rows are not of the same examples: labels or users differ")
    report: dict[str, Any] = {"examples": len(first), "users": len(np.unique(first["user"]))}
    drawn = Resamples(first["user"]) if len(first) else None
    parts = [(rows, _groups(rows)) for rows in (first, second)]
    for name in METRICS:
        values = [_value(name, rows, groups) for rows, groups in parts]
        report[name] = {"a": _known(values[0]), "b": _known(values[1]), "difference": _known(values[1] - values[0])}
        if drawn is not None:
            one, other = (_resampled(name, drawn, rows, groups) for rows, groups in parts)
            with np.errstate(invalid="ignore"):  # infinite in both
                report[name]["difference_ci"] = interval(other - one)
    return report


def _groups(rows: Array) -> _Groups:
    return group_aucs(rows["prediction"], rows["label"], group_ids(rows["user"], rows["day"]))


def _value(name: str, rows: Array, groups: _Groups) -> float:
    p, y = rows["prediction"], rows["label"]
    if name == "gauc":
        areas, examples, _ = groups
        return float(np.average(areas, weights=examples)) if len(areas) else math.nan
    return {"auc": auc, "normalized_entropy": normalized_entropy, "calibration": calibration}[name](p, y)


def _report(rows: Array) -> dict[str, Any]:
    groups = _groups(rows)
    report: dict[str, Any] = {"examples": len(rows)}
    drawn = Resamples(rows["user"]) if len(rows) else None
    for name in METRICS:
        report[name] = _known(_value(name, rows, groups))
        if drawn is not None:
            report[f"{name}_ci"] = interval(_resampled(name, drawn, rows, groups))
    return report


def _resampled(name: str, drawn: Resamples, rows: Array, groups: _Groups) -> Array:
    """One metric in every resample."""
    p, y = rows["prediction"], rows["label"]
    with np.errstate(divide="ignore", invalid="ignore"):
        if name == "auc":
            return drawn.auc(p, y)
        if name == "gauc":
            areas, examples, first = groups
            weights = drawn.weights[:, drawn.of[first]] * examples
            means: Array = (weights @ areas) / weights.sum(1)
            return means
        positives = drawn.sums(y.astype(np.float64))
        if name == "calibration":
            ratio: Array = drawn.sums(p) / positives
            return ratio
        total, clipped = drawn.sums(np.ones(len(p))), np.clip(p, _CLOSEST, 1 - _CLOSEST)
        rate = positives / total
        loss = drawn.sums(-np.where(y, np.log(clipped), np.log1p(-clipped))) / total
        entropy: Array = loss / -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate))
        return entropy


CANDIDATES = 300
"""Candidates, the best as mixed, among which recall is counted."""


class NextItem:
    """Counts how often, and how high, the item clicked next was among the first `n` shown, and among the candidates at all."""

    def __init__(self, n: int = 20) -> None:
        self._n = n
        self._users: list[int] = []
        self._places: list[int] = []
        """Place of the clicked item in each answer, from 1; 0: it was not shown."""
        self._found: list[bool] = []
        self._candidates = 0

    def add(self, shown: Sequence[str], clicked: str, user: int, candidates: Bool) -> None:
        """Add one answer, best first, the item that was clicked next, and the user's key; of each candidate, the best as mixed
        first, whether it is that item."""
        top = shown[: self._n]
        self._places.append(top.index(clicked) + 1 if clicked in top else 0)
        self._users.append(user)
        first = candidates[:CANDIDATES]
        self._found.append(bool(first.any()))
        self._candidates += len(first)

    def report(self) -> dict[str, Any]:
        """predictions, hit_rate_at_20, mrr_at_20, candidate_recall_at_300, each with its interval (null without predictions), and
        how many candidates these were on average."""
        num, places = len(self._places), np.array(self._places)
        report: dict[str, Any] = {"predictions": num}
        reciprocal = np.divide(1.0, places, out=np.zeros(num), where=places > 0)
        drawn = Resamples(np.array(self._users, np.int64)) if num else None
        for name, values in (
            (f"hit_rate_at_{self._n}", places > 0),
            (f"mrr_at_{self._n}", reciprocal),
            (f"candidate_recall_at_{CANDIDATES}", np.array(self._found, np.bool_)),
        ):
            report[name] = float(np.mean(values)) if num else None
            if drawn is not None:
                report[f"{name}_ci"] = interval(drawn.sums(values.astype(np.float64)) / drawn.sums(np.ones(num)))
        report["candidates"] = self._candidates / num if num else None
        return report


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
