"""Operations whose gradient is not that of their value, as autograd functions: by hand, checked against float64 differences in tests.
The ranker learns without them (`learning.py`); they are part of its definition.

The functions at the end choose: until `warm_up` was called, what needs no gradient runs op by op (`eager.py`), so that no
request waits for a compiler. Tensors are on the CPU, one dtype a call. Legend: as in `fused_kernels.py`.
"""

from __future__ import annotations

import logging
import time
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


def ready() -> bool:
    """Whether the kernels are compiled."""
    return fused_kernels.compiled.is_set()


def _fused() -> bool:
    return torch.is_grad_enabled() or ready()


def norm_silu(
    x: torch.Tensor, gain: torch.Tensor, bias: torch.Tensor, running: torch.Tensor, batch: torch.Tensor | None
) -> torch.Tensor:
    """As `NormSilu`."""
    return NormSilu.apply(x, gain, bias, running, batch) if _fused() else eager.norm_silu(x, gain, bias, running)


def dice(x: torch.Tensor, alpha: torch.Tensor, running: torch.Tensor, batch: torch.Tensor | None) -> torch.Tensor:
    """As `Dice`."""
    return Dice.apply(x, alpha, running, batch) if _fused() else eager.dice(x, alpha, running)


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

    running = torch.ones(2, 1, 1)
    outputs = [
        NormSilu.apply(ones(1, 1, 1), ones(1, 1, 1), ones(1, 1, 1), running, None),
        Dice.apply(ones(1, 1), ones(1), running[:, 0], None),
    ]
    torch.autograd.backward([output.sum() for output in outputs])
    fused_kernels.moments(np.ones((1, 1, 1), np.float32), np.ones((2, 1, 1)))
    gather.warm_up()
