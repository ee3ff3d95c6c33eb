"""From logits to losses and their gradients, in one call: Numba, no GIL, one thread. `ranker.py` and `delayed.py` say the same in torch.

Legend: M examples, those of a request side by side, T tasks.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from recsys.model.fused_kernels import kernel
from recsys.model.specs import CERTAIN

Array = np.ndarray[Any, Any]
_CERTAIN = CERTAIN


class Objective(NamedTuple):
    """What is learned of each task, as arrays [T]."""

    weight: Array
    """Of its loss; 0: nothing is learned"""
    after: Array
    """The earlier task that it is chained on, -1: none"""
    choice: Array
    """bool: its loss is that of choosing an item among those of its request"""
    fnw: Array
    """bool: `delayed.py`'s policy of that name"""
    late: Array
    """Its helpers of `es_dfm`, -1: it has none"""
    never: Array


@kernel
def log_odds(of: Objective, logits: Array, out: Array) -> None:
    """As `Ranker.log_odds`: logits, out [M, T]."""
    logs = np.empty(logits.shape[1])
    for m in range(len(logits)):
        for task in range(len(logs)):
            parent = of.after[task]
            logs[task] = _log_sigmoid(logits[m, task]) + (logs[parent] if parent >= 0 else 0.0)
            if parent >= 0:
                log = min(logs[task], -_CERTAIN)
                out[m, task] = log - math.log(-math.expm1(log))
            else:
                out[m, task] = logits[m, task]


@kernel
def losses(of: Objective, odds: Array, labels: Array, mask: Array, request: Array, found: Any) -> None:
    """Room `found` [M, T] each: every label's loss (0: not known), its weight, and the gradient, by log-odds, of the sum of both
    multiplied."""
    out, weights, back = found
    tasks = odds.shape[1]
    for m in range(len(odds)):
        for task in range(tasks):
            known, y, x = mask[m, task], labels[m, task] and mask[m, task], np.float64(odds[m, task])
            weights[m, task] = weight = of.weight[task] * _importance(of, odds[m], task, labels[m, task])
            out[m, task] = max(x, 0.0) - x * y + math.log1p(math.exp(-abs(x))) if known else 0.0
            back[m, task] = weight * (_sigmoid(x) - y) if known else 0.0
    first = 0
    while of.choice.any() and first < len(odds):
        last = first + 1
        while last < len(odds) and request[last] == request[first]:
            last += 1
        for task in range(tasks):
            if of.choice[task]:
                _choose(odds, labels, mask, (first, last, task), found)
        first = last


@kernel
def _choose(odds: Array, labels: Array, mask: Array, span: Any, found: Any) -> None:
    """`losses` of one task that is a choice, of one request."""
    out, weights, back = found
    first, last, task = span
    highest, total, chosen = np.float64(odds[first, task]), 0.0, 0.0
    for m in range(first, last):
        highest = max(highest, np.float64(odds[m, task]))
    for m in range(first, last):
        total += math.exp(odds[m, task] - highest)
    for m in range(first, last):
        one = 1.0 if labels[m, task] and mask[m, task] else 0.0
        out[m, task] = -one * (odds[m, task] - highest - math.log(total))
        chosen += one * weights[m, task]
    for m in range(first, last):
        one = 1.0 if labels[m, task] and mask[m, task] else 0.0
        back[m, task] = math.exp(odds[m, task] - highest) / total * chosen - one * weights[m, task]


@kernel
def log_odds_back(of: Objective, logits: Array, back: Array) -> None:
    """From gradients by log-odds to those by logits, in place: back [M, T]."""
    tasks = logits.shape[1]
    logs, by_log = np.empty(tasks), np.empty(tasks)
    for m in range(len(logits)):
        for task in range(tasks):
            parent = of.after[task]
            logs[task] = _log_sigmoid(logits[m, task]) + (logs[parent] if parent >= 0 else 0.0)
            by_log[task] = 0.0
        for task in range(tasks - 1, -1, -1):
            parent = of.after[task]
            if parent >= 0:
                if logs[task] <= -_CERTAIN:
                    by_log[task] -= back[m, task] / math.expm1(logs[task])
                by_log[parent] += by_log[task]
                back[m, task] = 0.0
            if by_log[task] != 0.0:
                back[m, task] += by_log[task] * _sigmoid(-np.float64(logits[m, task]))


@kernel
def _importance(of: Objective, odds: Array, task: int, label: bool) -> float:
    """`delayed.Importance`."""
    if of.fnw[task]:
        f = _sigmoid(np.float64(odds[task]))
        return 1.0 + f if label else (1.0 - f) * (1.0 + f)
    if of.late[task] >= 0:
        late = 1.0 + _sigmoid(np.float64(odds[of.late[task]]))
        return late if label else late * _sigmoid(np.float64(odds[of.never[task]]))
    return 1.0


@kernel
def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


@kernel
def _log_sigmoid(x: float) -> float:
    return min(x, 0.0) - math.log1p(math.exp(-abs(x)))
