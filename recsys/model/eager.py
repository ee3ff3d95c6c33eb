"""The networks' operations in torch: their definition, and what serves while kernels compile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


def feature_gate(x: torch.Tensor, down: torch.Tensor, bias: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """x * sum_l g_l 2 sigmoid(x B_l A_l)."""
    low, rank = x.expand(len(down), -1, -1) @ down, up.shape[2]
    first, second = (torch.sigmoid(low[..., part * rank : (part + 1) * rank] @ up[:, part]) for part in range(2))
    return 2 * x * torch.lerp(first, second, torch.sigmoid(low[..., -1:] + bias))


def norm_silu(x: torch.Tensor, gain: torch.Tensor, bias: torch.Tensor, running: torch.Tensor) -> torch.Tensor:
    """silu(gain (x - mean) rstd + bias)."""
    scale = running[1].unsqueeze(1) * gain
    return torch.nn.functional.silu(x * scale + (bias - running[0].unsqueeze(1) * scale))


def dice(x: torch.Tensor, alpha: torch.Tensor, running: torch.Tensor) -> torch.Tensor:
    """p x + (1 - p) alpha x."""
    return x * torch.lerp(alpha, torch.ones_like(alpha), torch.sigmoid((x - running[0]) * running[1]))


def mix(logits: torch.Tensor, experts: torch.Tensor, reach: Any, own: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax over each output's reach, times the experts; the self gate's weights on the output's own experts."""
    shares = torch.zeros_like(logits)
    for output, reached in enumerate(reach):
        reached = reached[reached >= 0].tolist()
        shares[output][:, reached] = torch.softmax(logits[output][:, reached], 1)
    total = shares[..., : len(experts)].clone()
    if own:
        residual = logits[..., len(experts) :]
        residual = torch.sigmoid(residual) if own == 1 else torch.softmax(residual, 2)
        shares[..., len(experts) :] = residual
        for output, reached in enumerate(reach):
            total[output][:, reached[-own:].tolist()] += residual[output]
    return torch.einsum("ome,emz->omz", total, experts), shares


def pair_sums(tensors: Sequence[torch.Tensor], pairs: Any) -> torch.Tensor:
    """(c * h) product' + per_candidate + per_entry of each pair."""
    candidate, history, product, per_candidate, per_entry = tensors
    row, entry = torch.from_numpy(pairs)
    return (candidate[row] * history[entry]) @ product.T + per_candidate[row] + per_entry[entry]


def pair_pool(weights: torch.Tensor, history: torch.Tensor, pairs: Any, candidates: int) -> torch.Tensor:
    """Sum of each candidate's entries by weight."""
    row, entry = torch.from_numpy(pairs)
    out = history.new_zeros(candidates, history.shape[1])
    return out.index_add(0, row, weights.unsqueeze(1) * history[entry])


def take_fields(rows: torch.Tensor, dim: int, index: Any, starts: Any) -> torch.Tensor:
    """Mean over each field's present columns."""
    extended = torch.cat([rows[:, :dim], rows.new_zeros(1, dim)])
    columns = torch.nn.functional.embedding(torch.from_numpy(index), extended)
    counts = torch.from_numpy(np.add.reduceat(index < len(rows), starts[:-1], axis=-1)).clamp(min=1)
    sums = [columns[..., a:b, :].sum(-2) for a, b in zip(starts, starts[1:], strict=False)]
    return torch.stack(sums, -2) / counts.unsqueeze(-1)


def sum_columns(rows: torch.Tensor, start: int, tasks: int, parts: Any) -> torch.Tensor:
    """Sum of wide weights over each part's columns, at each owner."""
    extended = torch.cat([rows[:, start : start + tasks], rows.new_zeros(1, tasks)])
    sums = [torch.nn.functional.embedding(torch.from_numpy(index[owner]), extended).sum(1) for index, owner in parts]
    return torch.stack(sums).sum(0)
