"""The fused operations as autograd functions: value and gradient by hand, checked against float64 differences in tests.

The functions at the end choose: until `warm_up` was called, what needs no gradient runs op by op (`eager.py`), so that no
request waits for a compiler. Tensors are on the CPU, one dtype a call. Legend: as in `kernels.py` and `gather.py`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from recsys import metrics
from recsys.compiled import one_at_a_time
from recsys.model import eager, fused_kernels, gather


def array(tensor: torch.Tensor) -> Any:
    """A tensor's values for a kernel; shared where they lie one after the other."""
    return tensor.detach().contiguous().numpy()


def grouped(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Matrix products by group: x [1 or G, N, I] (one for all, or one each), weight [G, I, O] -> [G, N, O]."""
    if len(x) == len(weight):
        return torch.bmm(x, weight)
    # One wide product: thin ones, of a gate's few columns, leave most of a core's registers empty.
    out = x[0] @ weight.transpose(0, 1).flatten(1)
    return out.view(x.shape[1], len(weight), weight.shape[2]).transpose(0, 1).contiguous()


class FeatureGate(Function):
    """HoME's feature gate: x [1 or G, M, V] (one input for all groups, or one each), down [G, V, 2 r + 1], bias [G, 1, 1],
    up [G, 2, r, V] -> [G, M, V]."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, down: torch.Tensor, bias: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        groups, rank = down.shape[0], up.shape[2]
        x = x.contiguous()
        low = grouped(x, down)
        gates = x.new_empty(2, groups, x.shape[1], x.shape[2])
        for part in range(2):
            torch.bmm(low[..., part * rank : (part + 1) * rank], up[:, part], out=gates[part])
        choice = (low[..., -1:] + bias).squeeze(2)
        out = x.new_empty(gates.shape[1:])
        fused_kernels.feature_gate(array(x), array(gates), array(choice), array(out))
        ctx.save_for_backward(x, down, up, low, gates, choice)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        x, down, up, low, gates, choice = ctx.saved_tensors
        groups, rank = down.shape[0], up.shape[2]
        gx, ggates, gchoice = torch.zeros_like(x), torch.empty_like(gates), torch.empty_like(choice)
        fused_kernels.feature_gate_back(
            array(g), array(x), array(gates), array(choice), array(gx), array(ggates), array(gchoice)
        )
        glow, gup = torch.empty_like(low), torch.empty_like(up)
        for part in range(2):
            span = slice(part * rank, (part + 1) * rank)
            glow[..., span] = torch.bmm(ggates[part], up[:, part].transpose(1, 2))
            gup[:, part] = torch.bmm(low[..., span].transpose(1, 2), ggates[part])
        glow[..., -1] = gchoice
        gdown = torch.bmm(x.expand(groups, -1, -1).transpose(1, 2), glow)
        if len(x) == groups:
            gx.baddbmm_(glow, down.transpose(1, 2))
        else:
            gx[0].addmm_(glow.transpose(0, 1).flatten(1), down.transpose(1, 2).flatten(0, 1))
        return gx, gdown, gchoice.sum(1).view(groups, 1, 1), gup


class NormSilu(Function):
    """silu(gain (x - mean) rstd + bias): x [G, M, F], gain and bias [G, 1, F], running [2, G, F] mean and rstd.

    `batch` [2, G, F]: the batch's mean and rstd, through which the gradient flows as in batch normalisation; None: it does not.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        gain: torch.Tensor,
        bias: torch.Tensor,
        running: torch.Tensor,
        batch: torch.Tensor | None,
    ) -> torch.Tensor:
        scale = running[1] * gain.squeeze(1)
        affine = torch.stack([scale, bias.squeeze(1) - running[0] * scale])
        x = x.contiguous()
        out = torch.empty_like(x)
        fused_kernels.norm_silu(array(x), array(affine), array(out))
        ctx.save_for_backward(x, running, affine)
        ctx.batch = batch
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        x, running, affine = ctx.saved_tensors
        batch = running if ctx.batch is None else ctx.batch
        gx, sums = torch.empty_like(x), np.empty(affine.shape)
        fused_kernels.norm_silu_back(
            array(g), array(x), array(affine), array(batch), ctx.batch is not None, array(gx), sums
        )
        total, product = torch.from_numpy(sums).unbind()
        ggain = (product - running[0] * total) * running[1]
        return gx, ggain.unsqueeze(1).to(x), total.unsqueeze(1).to(x), None, None


class Dice(Function):
    """DIN's Dice: x [M, F], alpha [F], running and batch as in `NormSilu` without groups [2, F]."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, alpha: torch.Tensor, running: torch.Tensor, batch: torch.Tensor | None
    ) -> torch.Tensor:
        x = x.contiguous()
        affine, out = torch.stack([running[1], -running[0] * running[1]]), torch.empty_like(x)
        fused_kernels.dice(array(x), array(affine), array(alpha), array(out))
        ctx.save_for_backward(x, alpha, running, affine)
        ctx.batch = batch
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        x, alpha, running, affine = ctx.saved_tensors
        batch = running if ctx.batch is None else ctx.batch
        out = x.new_empty(len(x) + 1, x.shape[1])
        fused_kernels.dice_back(
            array(g), array(x), array(affine), array(alpha), array(batch), ctx.batch is not None, array(out)
        )
        return out[:-1], out[-1], None, None


class Mix(Function):
    """Gates over experts: logits [O, M, E + K], experts [E, M, Z], reach [O, ...] (numpy), own K -> outputs [O, M, Z] and
    shares [O, M, E + K]. No gradient flows from the shares."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, experts: torch.Tensor, reach: Any, own: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits, experts = logits.contiguous(), experts.contiguous()
        shares, out = torch.empty_like(logits), logits.new_empty(len(logits), *experts.shape[1:])
        fused_kernels.mix(array(logits), array(experts), reach, own, array(shares), array(out))
        ctx.save_for_backward(experts, shares)
        ctx.reach, ctx.own = reach, own
        ctx.mark_non_differentiable(shares)
        return out, shares

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor, _: torch.Tensor) -> Any:
        experts, shares = ctx.saved_tensors
        glogits, gexperts = torch.zeros_like(shares), torch.zeros_like(experts)
        fused_kernels.mix_back(
            array(g), array(experts), array(shares), ctx.reach, ctx.own, array(glogits), array(gexperts)
        )
        return glogits, gexperts, None, None


class PairSums(Function):
    """The first attention layer of each pair: candidate [M, D], history [N, D], product [H, D], per_candidate [M, H],
    per_entry [N, H], pairs [2, P] (numpy) -> (c * h) product' + per_candidate + per_entry [P, H]."""

    @staticmethod
    def forward(
        ctx: Any,
        candidate: torch.Tensor,
        history: torch.Tensor,
        product: torch.Tensor,
        per_candidate: torch.Tensor,
        per_entry: torch.Tensor,
        pairs: Any,
    ) -> torch.Tensor:
        candidate, history = candidate.contiguous(), history.contiguous()
        both = candidate.new_empty(pairs.shape[1], candidate.shape[1])
        kernels_in = array(candidate), array(history), pairs
        gather.pair_products(*kernels_in, array(both))
        out = both @ product.T
        gather.pair_sums(array(per_candidate), array(per_entry), pairs, array(out))
        ctx.save_for_backward(candidate, history, product, both)
        ctx.pairs = pairs
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        candidate, history, product, both = ctx.saved_tensors
        g = g.contiguous()
        gcandidate, ghistory = torch.zeros_like(candidate), torch.zeros_like(history)
        per_candidate = g.new_zeros(len(candidate), g.shape[1])
        per_entry = g.new_zeros(len(history), g.shape[1])
        gather.pair_products_back(
            array(g @ product),
            array(candidate),
            array(history),
            ctx.pairs,
            array(gcandidate),
            array(ghistory),
        )
        gather.pair_sums_back(array(g), ctx.pairs, array(per_candidate), array(per_entry))
        return gcandidate, ghistory, g.T @ both, per_candidate, per_entry, None


class PairPool(Function):
    """Sum of each candidate's entries by weight: weights [P], history [N, D], pairs [2, P] (numpy), M -> [M, D]."""

    @staticmethod
    def forward(ctx: Any, weights: torch.Tensor, history: torch.Tensor, pairs: Any, candidates: int) -> torch.Tensor:
        weights, history = weights.contiguous(), history.contiguous()
        out = history.new_zeros(candidates, history.shape[1])
        gather.pair_pool(array(weights), array(history), pairs, array(out))
        ctx.save_for_backward(weights, history)
        ctx.pairs = pairs
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        weights, history = ctx.saved_tensors
        gweights, ghistory = torch.empty_like(weights), torch.zeros_like(history)
        gather.pair_pool_back(array(g), array(weights), array(history), ctx.pairs, array(gweights), array(ghistory))
        return gweights, ghistory, None, None


class TakeFields(Function):
    """Fields of looked-up rows: rows [U, W] (their first d values), and for each index [..., C] the means of its present
    columns by field, starts [F + 1] -> one [..., F, d] for each index."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, dim: int, parts: Any) -> Any:
        rows = rows.contiguous()
        ctx.shape, ctx.parts = rows.shape, parts
        out = []
        for index, starts in parts:
            fields = rows.new_empty(*index.shape[:-1], len(starts) - 1, dim)
            flat = fields.view(-1, *fields.shape[-2:])
            gather.take_fields(array(rows), index.reshape(-1, index.shape[-1]), starts, array(flat))
            out.append(fields)
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        grows = gradients[0].new_zeros(ctx.shape)
        for g, (index, starts) in zip(gradients, ctx.parts, strict=True):
            flat = array(g).reshape(-1, *g.shape[-2:])
            gather.take_fields_back(flat, index.reshape(-1, index.shape[-1]), starts, array(grows))
        return grows, None, None


class SumColumns(Function):
    """Wide sums: rows [U, W] from column `start` on, T of them, summed over the columns of each index [N, C] at its
    owner [M] -> [M, T]."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, start: int, tasks: int, parts: Any) -> torch.Tensor:
        rows = rows.contiguous()
        ctx.shape, ctx.start, ctx.parts = rows.shape, start, parts
        out = rows.new_zeros(len(parts[0][1]), tasks)
        for index, owner in parts:
            gather.sum_columns(array(rows), start, index, owner, array(out))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        grows = g.new_zeros(ctx.shape)
        for index, owner in ctx.parts:
            gather.sum_columns_back(array(g), ctx.start, index, owner, array(grows))
        return grows, None, None, None


def ready() -> bool:
    """Whether the kernels are compiled."""
    return fused_kernels.compiled.is_set()


def _fused() -> bool:
    return torch.is_grad_enabled() or ready()


def feature_gate(x: torch.Tensor, down: torch.Tensor, bias: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """As `FeatureGate`."""
    return FeatureGate.apply(x, down, bias, up) if _fused() else eager.feature_gate(x, down, bias, up)


def norm_silu(
    x: torch.Tensor, gain: torch.Tensor, bias: torch.Tensor, running: torch.Tensor, batch: torch.Tensor | None
) -> torch.Tensor:
    """As `NormSilu`."""
    return NormSilu.apply(x, gain, bias, running, batch) if _fused() else eager.norm_silu(x, gain, bias, running)


def dice(x: torch.Tensor, alpha: torch.Tensor, running: torch.Tensor, batch: torch.Tensor | None) -> torch.Tensor:
    """As `Dice`."""
    return Dice.apply(x, alpha, running, batch) if _fused() else eager.dice(x, alpha, running)


def mix(logits: torch.Tensor, experts: torch.Tensor, reach: Any, own: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As `Mix`."""
    return Mix.apply(logits, experts, reach, own) if _fused() else eager.mix(logits, experts, reach, own)


def pair_sums(tensors: Sequence[torch.Tensor], pairs: Any) -> torch.Tensor:
    """As `PairSums`; `tensors` are candidate, history, product, per_candidate and per_entry."""
    return PairSums.apply(*tensors, pairs) if _fused() else eager.pair_sums(tensors, pairs)


def pair_pool(weights: torch.Tensor, history: torch.Tensor, pairs: Any, candidates: int) -> torch.Tensor:
    """As `PairPool`."""
    if _fused():
        return PairPool.apply(weights, history, pairs, candidates)
    return eager.pair_pool(weights, history, pairs, candidates)


def take_fields(rows: torch.Tensor, dim: int, parts: Sequence[tuple[Any, Any]]) -> Sequence[torch.Tensor]:
    """As `TakeFields`."""
    return TakeFields.apply(rows, dim, parts) if _fused() else [eager.take_fields(rows, dim, *part) for part in parts]


def sum_columns(rows: torch.Tensor, start: int, tasks: int, parts: Sequence[tuple[Any, Any]]) -> torch.Tensor:
    """As `SumColumns`."""
    return SumColumns.apply(rows, start, tasks, parts) if _fused() else eager.sum_columns(rows, start, tasks, parts)


def attention_scores(
    first: torch.Tensor, bias: torch.Tensor, dices: Sequence[tuple[torch.Tensor, torch.Tensor]], layers: Sequence[Any]
) -> torch.Tensor:
    """All layers behind DIN's first, candidates side by side: first [T, H, M] (overwritten) and bias [T, H] make its
    pre-activations; `dices` are each activation's running mean and rstd [2, F] and alpha [F], `layers` the weight and bias
    behind each of them -> scores [T, M]. For inference."""
    x = first
    for (running, alpha), (weight, after) in zip(dices, layers, strict=True):
        affine = torch.stack([running[1], -running[0] * running[1]])
        fused_kernels.dice_lines(array(x), array(bias), array(affine), array(alpha))
        if len(weight) == 1:
            scores = x.new_empty(len(x), x.shape[2])
            fused_kernels.weighted_lines(array(x), array(weight[0]), after.item(), array(scores))
            return scores
        x, bias = torch.bmm(weight.expand(len(x), -1, -1), x), after.unsqueeze(0)
    raise AssertionError("the last layer has one output")


def warm_up() -> float:
    """Compile every kernel for float32, or read it from the on-disk cache; the seconds it took, which are logged and exported."""
    started = time.perf_counter()
    with one_at_a_time("fused"):
        _run_each_kernel()
    seconds = time.perf_counter() - started
    if not ready():
        metrics.COMPILE_SECONDS.set(seconds)
        logging.getLogger("recsys").info("fused operations ready after %.1f s", seconds)
    fused_kernels.compiled.set()
    return seconds


def _run_each_kernel() -> None:
    def ones(*shape: int) -> torch.Tensor:
        return torch.ones(*shape, requires_grad=True)

    running, pairs = torch.ones(2, 1, 1), np.zeros((2, 1), np.int64)
    index, reach = np.zeros((1, 1), np.intp), np.zeros((1, 1), np.int64)
    both = PairSums.apply(ones(1, 1), ones(1, 1), ones(1, 1), ones(1, 1), ones(1, 1), pairs)
    mixed, _ = Mix.apply(ones(1, 1, 2), ones(1, 1, 1), reach, 1)
    (taken,) = TakeFields.apply(ones(1, 1), 1, [(index, np.arange(2))])
    outputs = [
        FeatureGate.apply(ones(1, 1, 1), ones(1, 1, 3), ones(1, 1, 1), ones(1, 2, 1, 1)),
        NormSilu.apply(ones(1, 1, 1), ones(1, 1, 1), ones(1, 1, 1), running, None),
        Dice.apply(both, ones(1), running[:, 0], None),
        PairPool.apply(ones(1), ones(1, 1), pairs, 1),
        mixed,
        taken,
        SumColumns.apply(ones(1, 1), 0, 1, [(index, np.zeros(1, np.intp))]),
    ]
    torch.autograd.backward([output.sum() for output in outputs])
    fused_kernels.dice_lines(*(np.ones(shape, np.float32) for shape in ((1, 1, 1), (1, 1), (2, 1), (1,))))
    fused_kernels.weighted_lines(
        np.ones((1, 1, 1), np.float32), np.ones(1, np.float32), 0.0, np.ones((1, 1), np.float32)
    )
    fused_kernels.moments(np.ones((1, 1, 1), np.float32), np.ones((2, 1, 1)))
    gather.unique(*(np.ones(1, t) for t in (np.int32, np.int64, np.bool_)), np.full(2, -1), *np.zeros((2, 1), np.intp))
