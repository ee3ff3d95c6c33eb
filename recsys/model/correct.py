"""Fast correctors behind the network: a streaming calibrator, and an error memory (ReLoop2, Zhu et al. 2023). No gradients.

Legend: M examples, T tasks, F width of a key, K arrays of 2^L buckets each.
"""

from __future__ import annotations

import torch
from torch import nn

from recsys.model.layers import seeded
from recsys.model.specs import MEMORY, MEMORY_SHRINK

HALF_LIFE = 20_000.0
"""Examples that halve the weight of what came before: half follows a drift twice as fast, and is noisier by 1.4."""


class Calibrator(nn.Module):
    """Bias and slope of each task: log-odds [M, T] -> slope * log-odds + bias, by recursive logistic regression.

    Each `update` forgets so that HALF_LIFE examples halve what came before, and is one Newton step: an estimate follows
    drift, and starts as the identity, believed as much as `prior` examples.
    """

    coefficients: torch.Tensor
    curvature: torch.Tensor

    def __init__(self, tasks: int, *, prior: float = 500.0) -> None:
        super().__init__()
        self.register_buffer("coefficients", torch.tensor([[1.0, 0.0]], dtype=torch.float64).repeat(tasks, 1))
        start = 0.25 * prior * torch.eye(2, dtype=torch.float64)
        self.register_buffer("curvature", start.repeat(tasks, 1, 1))

    def forward(self, log_odds: torch.Tensor) -> torch.Tensor:
        slope, bias = self.coefficients.to(log_odds.dtype).T
        return log_odds * slope + bias

    @torch.no_grad()
    def update(self, log_odds: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> None:
        """Take labels and their weights (0: not to be learned), and the log-odds as they were before: all [M, T]."""
        x = torch.stack([log_odds.double(), torch.ones_like(log_odds, dtype=torch.float64)], 2)
        w, y = weights.double(), labels.double()
        p = torch.sigmoid((x * self.coefficients).sum(2))
        keep = 0.5 ** ((w > 0).sum(0) / HALF_LIFE)
        curvature = keep[:, None, None] * self.curvature + torch.einsum("mti,mtj,mt->tij", x, x, w * p * (1 - p))
        gradient = torch.einsum("mti,mt->ti", x, w * (p - y))
        step = torch.linalg.solve(curvature, gradient.unsqueeze(2)).squeeze(2)
        # One odd batch must not turn the order around: the slope stays positive and within a factor of 4.
        moved = self.coefficients - step
        moved[:, 0].clamp_(0.25, 4.0)
        sound = torch.isfinite(moved).all(1) & torch.isfinite(curvature).flatten(1).all(1)
        self.coefficients.copy_(torch.where(sound[:, None], moved, self.coefficients))
        self.curvature.copy_(torch.where(sound[:, None, None], curvature, self.curvature))


class ErrorMemory(nn.Module):
    """What the network was off by, lately, on examples whose key falls into the same buckets: [M, F], [M, T] -> [M, T].

    K arrays of buckets, each addressed by L signs of random projections of the key; a bucket holds decayed sums of examples,
    labels and predictions. With `own` the correction is towards the mean label of the bucket, without it by the mean error made
    there, which keeps the network's order within a bucket. A bucket of n examples, by weight, counts n / (n + `shrink`).
    """

    sums: torch.Tensor
    projections: torch.Tensor
    powers: torch.Tensor

    def __init__(
        self,
        width: int,
        tasks: int,
        *,
        seed: int,
        strength: float,
        shape: tuple[int, int] = MEMORY,
        own: bool = False,
        shrink: float = MEMORY_SHRINK,
    ) -> None:
        super().__init__()
        self._strength, self._own, self._shrink, self._shape = strength, own, shrink, shape
        arrays, bits = shape
        projections = torch.randn(width, arrays * bits, generator=seeded(seed))
        self.register_buffer("projections", projections, persistent=False)
        self.register_buffer("powers", 2 ** torch.arange(bits), persistent=False)
        self.register_buffer("sums", torch.zeros(arrays, 2**bits, tasks, 3))

    def buckets(self, keys: torch.Tensor) -> torch.Tensor:
        """Bucket of each key in each array [M, K]."""
        signs = (keys @ self.projections.to(keys.dtype) > 0).view(len(keys), *self._shape)
        return (signs * self.powers).sum(2)

    def forward(self, keys: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
        found = self.sums[torch.arange(self._shape[0]), self.buckets(keys)]
        count, labels, predicted = found.unbind(3)
        p = probabilities.unsqueeze(1)
        error = labels - (count * p if self._own else predicted)
        correction = (error / (count + self._shrink).clamp(min=1e-6)).mean(1)
        return (probabilities + self._strength * correction).clamp(0, 1)

    @torch.no_grad()
    def update(
        self, keys: torch.Tensor, probabilities: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor
    ) -> None:
        """Remember examples: their keys [M, F], and predictions, labels and weights (0: not to be remembered), all [M, T].

        The weights are those of the loss: what came early as negative, and again as positive, leaves no error behind on the mean.
        """
        self.sums *= 0.5 ** (len(keys) / HALF_LIFE)
        new = torch.stack([torch.ones_like(probabilities), labels, probabilities], 2) * weights.unsqueeze(2)
        for sums, bucket in zip(self.sums, self.buckets(keys).T, strict=True):
            sums.index_add_(0, bucket, new.to(sums.dtype))
