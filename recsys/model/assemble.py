"""From looked-up rows to the ranker's tensors.

Legend: R requests, M items in all, U unique (slot, key) pairs, d embedding width.
"""

from __future__ import annotations

import numpy as np
import torch

from recsys.features.schema import Schema
from recsys.model import eager
from recsys.model.plan import Plan
from recsys.model.ranker import RankerInputs
from recsys.model.row_fields import starts


def ranker_inputs(schema: Schema, plan: Plan, deep: torch.Tensor, wide: torch.Tensor, dim: int) -> RankerInputs:
    """The ranker's tensors from looked-up rows: deep [U, d + tasks …], wide [U', tasks]. Gradients flow back to both."""
    return deep_inputs(schema, plan, deep, wide_sums(schema, plan, deep, wide, dim), dim)


def deep_inputs(schema: Schema, plan: Plan, deep: torch.Tensor, sums: torch.Tensor, dim: int) -> RankerInputs:
    """The same with the sums of wide weights given [M, tasks]."""
    fields = schema.item_fields
    return RankerInputs(
        shared=eager.take_fields(deep, dim, plan.shared, np.arange(plan.shared.shape[1] + 1)),
        history=eager.take_fields(deep, dim, plan.history, starts(fields[: schema.num_history_fields])),
        history_masks=torch.from_numpy(plan.history_masks),
        history_gaps=torch.from_numpy(plan.history_gaps.astype(np.int64)),
        item=eager.take_fields(deep, dim, plan.item, starts(fields)),
        numbers=torch.from_numpy(np.ascontiguousarray(plan.numbers)),
        wide=sums,
        request=torch.from_numpy(plan.request),
    )


def wide_sums(schema: Schema, plan: Plan, deep: torch.Tensor, wide: torch.Tensor, dim: int) -> torch.Tensor:
    """Each item's sum of the wide weights of all its keys [M, tasks]."""
    every, tasks = np.arange(len(plan.item)), len(schema.tasks)
    sums = eager.sum_columns(deep, dim, tasks, [(plan.item, every), (plan.shared, plan.request)])
    return sums + eager.sum_columns(wide, 0, tasks, [(plan.crosses, every)]) if plan.crosses.shape[1] else sums
