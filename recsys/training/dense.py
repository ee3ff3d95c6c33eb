"""The optimiser of dense weights: all of them in one flat vector, so that a step is three calls, not three a weight."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

CLIP_NORM = 10.0
"""Largest norm of the dense gradient; half slows the first minutes, double lets one odd batch move everything."""


class DenseOptimizer:
    """Adam or Adagrad over a module's parameters, which become views of one vector. Owns their gradients."""

    def __init__(self, module: nn.Module, kind: Literal["adam", "adagrad"], learning_rate: float) -> None:
        parameters = list(module.parameters())
        self._weights = nn.Parameter(torch.cat([p.detach().reshape(-1) for p in parameters]))
        self._weights.grad = torch.zeros_like(self._weights)
        start = 0
        for p in parameters:
            span = slice(start, start + p.numel())
            p.data = self._weights.data[span].view_as(p)
            p.grad = self._weights.grad[span].view_as(p)
            start += p.numel()
        optimizers: dict[str, Any] = {"adam": torch.optim.Adam, "adagrad": torch.optim.Adagrad}
        self._optimizer = optimizers[kind]([self._weights], lr=learning_rate, fused=True)

    @property
    def gradient(self) -> torch.Tensor:
        """The flat gradient; backward passes add to it."""
        assert self._weights.grad is not None
        return self._weights.grad

    def zero(self) -> None:
        self.gradient.zero_()

    def step(self) -> None:
        """One update with the gradient, its norm bounded by CLIP_NORM; the gradient must be finite."""
        norm = float(self.gradient.norm())
        if norm > CLIP_NORM:
            self.gradient.mul_(CLIP_NORM / norm)
        self._optimizer.step()

    def state(self) -> dict[str, torch.Tensor]:
        """Moments and step count, copied."""
        moments = self._optimizer.state_dict()["state"].get(0, {})
        return {name: value.detach().clone() for name, value in moments.items()}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Load what `state` returned."""
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": {0: state} if state else {}, "param_groups": groups})
