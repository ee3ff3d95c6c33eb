"""From looked-up rows to the ranker's tensors.

Legend: R requests, M items in all, U unique (slot, key) pairs, d embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from recsys.features.schema import Schema
from recsys.model.plan import Plan
from recsys.model.ranker import RankerInputs


def ranker_inputs(schema: Schema, plan: Plan, deep: torch.Tensor, wide: torch.Tensor, dim: int) -> RankerInputs:
    """The ranker's tensors from looked-up rows: deep [U, d + tasks], wide [U', tasks]. Gradients flow back to both."""
    deep = torch.cat([deep, deep.new_zeros(1, deep.shape[1])])
    wide = torch.cat([wide, wide.new_zeros(1, wide.shape[1])])
    embedding, first_order = deep[:, :dim], deep[:, dim:]
    shared, item, crosses = (torch.from_numpy(x) for x in (plan.shared, plan.item, plan.crosses))
    request = torch.from_numpy(plan.request)
    item_rows = _take(deep, item)
    wide_sum = item_rows[..., dim:].sum(1) + _take(first_order, shared).sum(1)[request]
    if crosses.shape[1]:
        wide_sum = wide_sum + torch.nn.functional.embedding_bag(crosses, wide, mode="sum")
    fields = schema.item_fields
    missing = len(deep) - 1
    return RankerInputs(
        shared=_take(embedding, shared),
        history=pool(
            _take(embedding, torch.from_numpy(plan.history)),
            plan.history != missing,
            fields[: schema.num_history_fields],
        ),
        history_masks=torch.from_numpy(plan.history_masks),
        history_gaps=torch.from_numpy(plan.history_gaps.astype(np.int64)),
        item=pool(item_rows[..., :dim], plan.item != missing, fields),
        numbers=torch.from_numpy(np.ascontiguousarray(plan.numbers)),
        wide=wide_sum,
        request=request,
    )


def _take(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.embedding(index, rows)


def pool(columns: torch.Tensor, present: npt.NDArray[np.bool_], fields: Sequence[tuple[str, int]]) -> torch.Tensor:
    """Mean over each field's present columns: [..., columns, d] to [..., fields, d]; zeros where none is present."""
    if all(width == 1 for _, width in fields):
        return columns
    pooled, start = [], 0
    for _, width in fields:
        part = columns[..., start : start + width, :]
        if width > 1:
            count = torch.from_numpy(np.maximum(present[..., start : start + width].sum(-1, keepdims=True), 1)).to(
                columns.dtype
            )
            part = part.sum(-2, keepdim=True) / count.unsqueeze(-1)
        pooled.append(part)
        start += width
    return torch.cat(pooled, dim=-2)
