"""Building blocks of the networks. Every weight is drawn from a passed generator: equal seeds give equal bits.

Legend: G groups (a weight matrix each), N rows, F features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from recsys.model import fused, fused_kernels
from recsys.model.specs import DICE_EPSILON, NORM_EPSILON

MOMENTUM = 0.01
"""Share of a batch in running statistics once they are warm: half follows a drift half as fast, double is noisier."""
BATCH = 256
"""Rows of the batch that `MOMENTUM` and the start are meant for; a smaller one counts by its share of it, so that statistics do not
depend on how a stream is cut. Half forgets twice as fast, double is slower to leave the start."""
WARM = 10 * BATCH
"""Rows after which running deviations may bound what enters them: less than a tenth of the start is left. Half clips numbers that lie far
from 0 while their mean is still on its way; double leaves an odd value twice as long to move them."""
MIN_BATCH = 32
"""Smaller batches do not carry gradients through their own mean and variance: of one row nothing would be left."""


def seeded(seed: int) -> torch.Generator:
    """A CPU generator, independent of the global one."""
    return torch.Generator().manual_seed(seed)


def uniform(shape: Sequence[int], fan_in: int, generator: torch.Generator) -> nn.Parameter:
    """A weight of variance 1 / fan_in, float32 on the CPU."""
    bound = math.sqrt(3.0 / fan_in)
    return nn.Parameter(torch.empty(*shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator))


class GroupedLinear(nn.Module):
    """One affine map per group: [1 or G, N, inputs] -> [G, N, outputs]."""

    def __init__(self, groups: int, inputs: int, outputs: int, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = uniform((groups, inputs, outputs), inputs, generator)
        self.bias = nn.Parameter(torch.zeros(groups, 1, outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return fused.grouped(x, self.weight).add_(self.bias)  # baddbmm would first copy the bias into every row


class MLP(nn.Module):
    """Affine maps with Swish between them: [N, widths[0]] -> [N, widths[-1]]. Biases start random, so that a zero input has a direction."""

    def __init__(self, widths: Sequence[int], generator: torch.Generator) -> None:
        super().__init__()
        pairs = list(zip(widths[:-1], widths[1:], strict=True))
        self.weights = nn.ParameterList([uniform((o, i), i, generator) for i, o in pairs])
        self.biases = nn.ParameterList([uniform((o,), 3 * i, generator) for i, o in pairs])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = nn.functional.linear(nn.functional.silu(x) if layer else x, weight, bias)
        return x


class StreamingNorm(nn.Module):
    """Batch renormalisation (Ioffe 2017) over dimension -2: [..., N, F] -> the same.

    The value always comes from running statistics (in training: this batch included), so that training and serving
    see the same function however small or skewed a batch is; the gradient goes through the batch's own mean and
    variance, as in batch normalisation. Running statistics start at mean 0, variance 1 and forget that start as BATCH rows
    of many; the variance between batches counts, too. `shape` is that of x without N. `reach` [F]: so many running deviations
    from the mean are the furthest that a value may lie when it is learned from, once WARM rows were; inf: as far as it does.
    """

    mean: torch.Tensor
    var: torch.Tensor
    rows: torch.Tensor

    def __init__(
        self,
        *shape: int,
        affine: bool = False,
        momentum: float = MOMENTUM,
        epsilon: float = NORM_EPSILON,
        reach: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.reach = reach
        self.momentum, self.epsilon = momentum, epsilon
        stats = (*shape[:-1], 1, shape[-1])
        self.register_buffer("mean", torch.zeros(stats))
        self.register_buffer("var", torch.ones(stats))
        self.register_buffer("rows", torch.zeros((), dtype=torch.int64))
        self.gain = nn.Parameter(torch.ones(stats)) if affine else None
        self.bias = nn.Parameter(torch.zeros(stats)) if affine else None

    def prepare(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """For the fused forms: running mean and 1 / std [2, G, F], and in training those of the batch x [G, N, F] if the
        gradient flows through them."""
        batch = None
        if self.training and x.shape[1]:
            moments = np.empty((2, x.shape[0], x.shape[2]))
            fused_kernels.moments(x.detach().contiguous().numpy(), moments)
            mean, var = torch.from_numpy(moments).to(x.dtype).unsqueeze(2)
            self._update(mean.view_as(self.mean), var.view_as(self.var), x.shape[1])
            if x.shape[1] >= MIN_BATCH:
                batch = torch.stack([mean.squeeze(1), torch.rsqrt(var.squeeze(1) + self.epsilon)])
        return self.running().view(2, x.shape[0], x.shape[2]), batch

    def running(self) -> torch.Tensor:
        """Running mean and 1 / std [2, ..., F], without the dimension of examples."""
        return torch.stack([self.mean, torch.rsqrt(self.var + self.epsilon)]).squeeze(-2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and x.shape[-2]:
            x = self._learn(x)
        scale = torch.rsqrt(self.var + self.epsilon)
        shift = -self.mean * scale
        if self.gain is not None and self.bias is not None:
            scale, shift = scale * self.gain, torch.addcmul(self.bias, shift, self.gain)
        return torch.addcmul(shift, x, scale)

    def _learn(self, x: torch.Tensor) -> torch.Tensor:
        """Update the running statistics; return x itself in value, with the gradient of a batch-normalised x."""
        if self.reach is not None and self.rows >= WARM:
            furthest = self.reach * torch.sqrt(self.var + self.epsilon)
            x = torch.clamp(x, self.mean - furthest, self.mean + furthest)
        var, mean = torch.var_mean(x, -2, correction=0, keepdim=True)
        self._update(mean.detach(), var.detach(), x.shape[-2])
        if x.shape[-2] < MIN_BATCH:
            return x
        std = torch.sqrt(var + self.epsilon)
        return torch.addcmul(mean.detach(), (x - mean) / std, std.detach())

    @torch.no_grad()
    def _update(self, mean: torch.Tensor, var: torch.Tensor, count: int) -> None:
        self.rows += count
        rate = (count / (self.rows + BATCH)).clamp(min=self.momentum * min(1.0, count / BATCH)).to(mean.dtype)
        delta = mean - self.mean
        new_var = torch.lerp(self.var, var + (1 - rate) * delta.square(), rate)
        sound = torch.isfinite(new_var)  # one overflow must not poison the statistics for ever
        self.mean.copy_(torch.where(sound, self.mean + rate * delta, self.mean))
        self.var.copy_(torch.where(sound, new_var, self.var))


class Dice(nn.Module):
    """DIN's data-dependent activation (Zhou et al. 2018, eq. 3): [N, F] -> the same.

    f(s) = p s + (1 - p) alpha s with p = sigmoid((s - E[s]) / sqrt(Var[s] + 1e-8)); alpha is learnt, from 0.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = StreamingNorm(width, epsilon=DICE_EPSILON)
        self.alpha = nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        running, batch = self.norm.prepare(x.unsqueeze(0))
        return fused.dice(x, self.alpha, running[:, 0], None if batch is None else batch[:, 0])
