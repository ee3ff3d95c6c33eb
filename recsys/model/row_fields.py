"""From looked-up rows to fields and sums. `by`: compiled calls (`gather.py`), or NumPy's (`plain.py`) while those wait for the compiler.

Legend: M items in all, U unique (slot, key) pairs, d embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from recsys.model import gather
from recsys.model.plan import Index, Plan
from recsys.types import Float32

Fields = Sequence[tuple[str, int]]


def fields_of(rows: Float32, index: Index, fields: Index, dim: int, by: Any = gather) -> Float32:
    """Fields of looked-up rows, side by side: index [..., C] -> [..., F d]."""
    flat = index.reshape(-1, index.shape[-1])
    out = np.empty((len(flat), len(fields) - 1, dim), np.float32)
    by.take_fields(rows, flat, fields, out)
    return out.reshape(*index.shape[:-1], -1)


def fields_back(g: Float32, index: Index, fields: Index, dim: int, out: Float32) -> None:
    """Add the gradient of `fields_of`, given that of the fields [..., F d], to that of the rows [U, W]."""
    flat = index.reshape(-1, index.shape[-1])
    gather.take_fields_back(g.reshape(len(flat), len(fields) - 1, dim), flat, fields, out)


def summed(plan: Plan, deep: Float32, wide: Float32, dim: int, by: Any = gather) -> Float32:
    """Each item's sum of the wide weights of all its keys [M, T]."""
    every, tasks = np.arange(len(plan.item)), wide.shape[1]
    sums = np.zeros((len(every), tasks), np.float32)
    by.sum_columns(deep, dim, plan.item, every, sums)
    by.sum_columns(deep, dim, plan.shared, plan.request, sums)
    if plan.crosses.shape[1]:
        crosses = np.zeros_like(sums)
        by.sum_columns(wide, 0, plan.crosses, every, crosses)
        sums += crosses
    return sums


def starts(fields: Fields) -> Index:
    """Where each field's columns begin, and where the last ones end [F + 1]."""
    return np.cumsum([0, *(width for _, width in fields)])
