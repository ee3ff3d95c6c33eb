"""The optimiser of dense weights: all of them in one flat vector, so that a step is a few calls, not a few a weight.

Legend: r, a batch's share of a whole one. How polling cuts the stream into batches is chance; what is learned from it should not
be. So time is counted in whole batches: a batch of share r moves weights and moments by r as much.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from recsys.model.fused_kernels import kernel

Array = np.ndarray[Any, Any]

CLIP_NORM = 10.0
"""Largest norm of a whole batch's dense gradient, of a share r of one 1/√r times as much, since chance makes it larger by that; half
slows the first minutes, double lets one odd batch move everything. With one bound for all, learning as labels come, by ones and
twos, cuts every other example short: .004 of KuaiRand's click AUC."""

_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8


class DenseOptimizer:
    """Adam (Kingma & Ba 2015) or Adagrad over a module's parameters, which become views of one vector. Owns their gradients."""

    def __init__(self, module: nn.Module, kind: Literal["adam", "adagrad"], learning_rate: float) -> None:
        parameters = list(module.parameters())
        self._weights = torch.cat([p.detach().reshape(-1) for p in parameters])
        self.gradient = torch.zeros_like(self._weights)
        """The flat gradient; backward passes add to it."""
        start = 0
        for p in parameters:
            span = slice(start, start + p.numel())
            p.data = self._weights[span].view_as(p)
            p.grad = self.gradient[span].view_as(p)
            start += p.numel()
        self._adam, self._rate = kind == "adam", learning_rate
        self._time = 0.0
        self._mean, self._square = torch.zeros_like(self._weights), torch.zeros_like(self._weights)

    def zero(self) -> None:
        self.gradient.zero_()

    def norm(self) -> float:
        """Of the gradient; not finite where that is not."""
        return math.sqrt(square_sum(self.gradient.numpy()))

    def step(self, share: float = 1.0, norm: float | None = None) -> None:
        """One update with the gradient of a batch's mean loss, its norm (where it is known already) bounded; it must be finite.

        `share` r in (0, 1]: Adam's decay rates and step are taken to the power of, and times, r, and the square of a mean over
        fewer examples counts r times: it is larger by chance. With r = 1 it is as published. Adagrad needs none of it: r times
        the gradient, in both its step and its sum of squares, is the same step.
        """
        most, norm = CLIP_NORM / share**0.5, self.norm() if norm is None else norm
        factor = np.float32(most / norm if norm > most else 1.0)
        arrays = tuple(each.numpy() for each in (self._weights, self.gradient, self._square))
        if not self._adam:
            adagrad(*arrays, factor, np.float32(self._rate))
            return
        self._time += share
        adam(
            *arrays,
            self._mean.numpy(),
            factor,
            np.array(
                [
                    1 - _BETA1**share,
                    _BETA2**share,
                    (1 - _BETA2**share) * share,
                    1 / (1 - _BETA2**self._time),
                    self._rate * share / (1 - _BETA1**self._time),
                ],
                np.float32,
            ),
        )

    def state(self) -> dict[str, torch.Tensor]:
        """Moments and time, copied."""
        time = torch.tensor(self._time, dtype=torch.float64)
        return {"time": time, "mean": self._mean.clone(), "square": self._square.clone()}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Load what `state` returned."""
        self._time = float(state["time"])
        self._mean.copy_(state["mean"])
        self._square.copy_(state["square"])


def warm_up() -> None:
    """Compile every kernel, or read it from the on-disk cache."""
    one = np.ones(1, np.float32)
    square_sum(one)
    adagrad(one, one.copy(), one.copy(), one[0], one[0])
    adam(one, one.copy(), one.copy(), one.copy(), one[0], np.full(5, 0.5, np.float32))


@kernel
def square_sum(x: Array) -> float:
    """In float64."""
    total = 0.0
    for i in range(len(x)):
        total += np.float64(x[i]) * np.float64(x[i])
    return total


@kernel
def adagrad(weights: Array, gradient: Array, square: Array, factor: float, rate: float) -> None:
    """All flat. The gradient is multiplied by `factor` first."""
    for i in range(len(weights)):
        gradient[i] *= factor
        square[i] += gradient[i] * gradient[i]
        weights[i] -= rate * gradient[i] / (np.sqrt(square[i]) + np.float32(_EPSILON))


@kernel
def adam(weights: Array, gradient: Array, square: Array, mean: Array, factor: float, rates: Array) -> None:
    """All flat. `rates`: of the mean, what stays of the square, what comes to it, its correction, and the step's."""
    moves, keeps, adds, corrects, rate = rates
    for i in range(len(weights)):
        g = gradient[i] * factor
        gradient[i] = g
        mean[i] += moves * (g - mean[i])
        square[i] = keeps * square[i] + adds * g * g
        weights[i] -= rate * mean[i] / (np.sqrt(square[i] * corrects) + np.float32(_EPSILON))
