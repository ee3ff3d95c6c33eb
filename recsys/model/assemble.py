"""From looked-up rows to the ranker's tensors.

Legend: R requests, M items in all, U unique (slot, key) pairs, d embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from recsys.features.schema import Schema
from recsys.model import eager, fused, gather
from recsys.model.plan import Index, Plan
from recsys.model.ranker import RankerInputs
from recsys.types import Float32

Fields = Sequence[tuple[str, int]]


def ranker_inputs(schema: Schema, plan: Plan, deep: torch.Tensor, wide: torch.Tensor, dim: int) -> RankerInputs:
    """The ranker's tensors from looked-up rows: deep [U, d + tasks …], wide [U', tasks]. Gradients flow back to both."""
    fields = schema.item_fields
    shared, history, item = fused.take_fields(
        deep,
        dim,
        [
            (plan.shared, np.arange(plan.shared.shape[1] + 1)),
            (plan.history, starts(fields[: schema.num_history_fields])),
            (plan.item, starts(fields)),
        ],
    )
    return RankerInputs(
        shared=shared,
        history=history,
        history_masks=torch.from_numpy(plan.history_masks),
        history_gaps=torch.from_numpy(plan.history_gaps.astype(np.int64)),
        item=item,
        numbers=torch.from_numpy(np.ascontiguousarray(plan.numbers)),
        wide=wide_sums(schema, plan, deep, wide, dim),
        request=torch.from_numpy(plan.request),
    )


def wide_sums(schema: Schema, plan: Plan, deep: torch.Tensor, wide: torch.Tensor, dim: int) -> torch.Tensor:
    """Each item's sum of the wide weights of all its keys [M, tasks]."""
    every, tasks = np.arange(len(plan.item)), len(schema.tasks)
    sums = eager.sum_columns(deep, dim, tasks, [(plan.item, every), (plan.shared, plan.request)])
    return sums + eager.sum_columns(wide, 0, tasks, [(plan.crosses, every)]) if plan.crosses.shape[1] else sums


def fields_of(rows: Float32, index: Index, fields: Index, dim: int) -> Float32:
    """Fields of looked-up rows, side by side: index [..., C] -> [..., F d]."""
    flat = index.reshape(-1, index.shape[-1])
    out = np.empty((len(flat), len(fields) - 1, dim), np.float32)
    gather.take_fields(rows, flat, fields, out)
    return out.reshape(*index.shape[:-1], -1)


def summed(plan: Plan, deep: Float32, wide: Float32, dim: int) -> Float32:
    """`wide_sums` [M, T] in compiled calls."""
    every, tasks = np.arange(len(plan.item)), wide.shape[1]
    sums = np.zeros((len(every), tasks), np.float32)
    gather.sum_columns(deep, dim, plan.item, every, sums)
    gather.sum_columns(deep, dim, plan.shared, plan.request, sums)
    if plan.crosses.shape[1]:
        crosses = np.zeros_like(sums)
        gather.sum_columns(wide, 0, plan.crosses, every, crosses)
        sums += crosses
    return sums


def starts(fields: Fields) -> Index:
    """Where each field's columns begin, and where the last ones end [F + 1]."""
    return np.cumsum([0, *(width for _, width in fields)])
