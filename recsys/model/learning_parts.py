"""The parts of `learning.py` that HoME and the attention share, and the attention."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from recsys.model import fused_kernels
from recsys.model import learn_kernels as learn
from recsys.model.din import MeanPool, TargetAttention
from recsys.model.layers import BATCH, MIN_BATCH, WARM, Dice, StreamingNorm
from recsys.model.plan import Plan
from recsys.types import Float32

Array = np.ndarray[Any, Any]


def empty(*shape: int) -> Float32:
    return np.empty(shape, np.float32)


def zeros(*shape: int) -> Float32:
    return np.zeros(shape, np.float32)


class Weight:
    """A parameter's values and gradient, as the optimiser has them."""

    def __init__(self, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None, "the optimiser owns the gradients: it comes first"
        self.value, self.grad = parameter.detach().numpy(), parameter.grad.numpy()


class Norm:
    """A `StreamingNorm` of G groups of F features."""

    def __init__(self, norm: StreamingNorm) -> None:
        shape = norm.mean.shape[:-2].numel(), norm.mean.shape[-1]
        self._mean, self._var = (s.numpy().reshape(-1) for s in (norm.mean, norm.var))
        self._rows, self._shape = norm.rows.numpy(), shape
        self._momentum, self._epsilon = norm.momentum, np.float32(norm.epsilon)
        self._gain = None if norm.gain is None else Weight(norm.gain)
        self._bias = None if norm.bias is None else Weight(norm.bias)
        ones, zeros = np.ones(self._mean.shape, np.float32), np.zeros(self._mean.shape, np.float32)
        self._learned = (
            ones if self._gain is None else self._gain.value.reshape(-1),
            zeros if self._bias is None else self._bias.value.reshape(-1),
        )

    def settle(self, x: Float32, learning: bool) -> tuple[Float32, bool]:
        """What it does to x [G, N, F]: out [3, 2, G, F] as the kernel `settle` says, and whether gradients go through the batch's mean
        and deviation. Running statistics move first, if it learns."""
        out, count = empty(6, self._mean.size), x.shape[1]
        moments, rate = np.zeros((2, *self._shape)), 0.0
        if learning and count:
            fused_kernels.moments(x, moments)
            self._rows += count
            rate = max(count / (int(self._rows) + BATCH), self._momentum * min(1.0, count / BATCH))
        running = self._mean, self._var, self._epsilon
        learn.settle(moments.reshape(2, -1), running, np.float32(rate), self._learned, out)
        return out.reshape(3, 2, *self._shape), rate > 0 and count >= MIN_BATCH

    def within(self, x: Float32, reach: Float32 | None) -> Float32:
        """x [N, F], no further from the mean than so many deviations [F], once these are known."""
        if reach is None or self._rows < WARM:
            return x
        furthest = reach * np.sqrt(self._var + self._epsilon)
        return np.clip(x, self._mean - furthest, self._mean + furthest)

    def learned(self, sums: Array, running: Float32) -> None:
        """Set the gradients of gain and bias, from those of shift and scale [2, G, F]."""
        assert self._gain is not None and self._bias is not None
        total, product = sums.reshape(2, -1)
        mean, rstd = running.reshape(2, -1)
        self._gain.grad.reshape(-1)[:] = (product - mean * total) * rstd
        self._bias.grad.reshape(-1)[:] = total


class AttentionLearning:
    """A `TargetAttention` or a `MeanPool`."""

    def __init__(self, module: nn.Module) -> None:
        self._none = isinstance(module, MeanPool)
        if self._none:
            return
        assert isinstance(module, TargetAttention)
        self._softmax = module.softmax
        self._candidate, self._entry, self._product = map(Weight, (module.candidate, module.entry, module.product))
        self._rank = Weight(module.rank_bias)
        self._gap = None if module.gap_bias is None else Weight(module.gap_bias)
        self._activations = [_activation(one) for one in module.activations]
        self._layers = [Weight(w) for w in module.weights]
        self._biases = [Weight(b) for b in module.biases]

    def scores(self, candidates: Float32, history: Float32, mask: Array, lay: Plan, learning: bool) -> Float32:
        """Pool for each candidate, as `TargetAttention.forward`: candidates [M, D], history [R, T, D], mask [R, T] -> [M, D]."""
        self._mask, self._at, request = mask, np.flatnonzero(mask), lay.request
        counts = mask.sum(1)
        starts = np.concatenate([np.zeros(1, np.int64), counts.cumsum()])
        entries = history.reshape(-1, history.shape[2])[self._at]
        self._pairs = entries, starts, request, candidates
        out = empty(*candidates.shape)
        if self._none:
            learn.mean_pool(history, mask, mean := empty(len(history), history.shape[2]))
            return mean[request]
        longest = int(counts.max(initial=0))
        if longest > len(self._rank.value):
            raise ValueError(
                f"history has {longest} entries, the attention knows {len(self._rank.value)}: cut it to the newest"
            )
        self._gaps = lay.history_gaps.ravel()[self._at]
        self._folded = tuple(np.ascontiguousarray(w.value.T) for w in (self._entry, self._product))
        gap = empty(0, 0) if self._gap is None else self._gap.value
        biases = candidates @ self._candidate.value.T, self._rank.value, gap, self._gaps
        x = empty(int(counts[request].sum()), len(self._candidate.value))
        learn.attend_first(self._pairs, self._folded, biases, x)
        self._inputs = []
        for activation, weight, bias in zip(self._activations, self._layers, self._biases, strict=True):
            x = activation.value(x, learning)
            self._inputs.append(x)
            x = x @ weight.value.T
            x += bias.value
        self._weights = empty(len(x))
        learn.attend_pool(x[:, 0], self._pairs, self._softmax, self._weights, out)
        return out

    def gradients(self, g: Float32, ghistory: Float32) -> Float32:
        """For g [M, D], the gradient of the candidates; that of the history [R, T, D] is added to."""
        entries, _, request, candidates = self._pairs
        gcandidates = zeros(*candidates.shape)
        if self._none:
            gmean = zeros(len(self._mask), g.shape[1])
            learn.add_rows(g, request, gmean)
            learn.mean_pool_back(gmean, self._mask, ghistory)
            return gcandidates
        gentries, scores = zeros(*entries.shape), empty(len(self._weights))
        learn.attend_pool_back(g, self._pairs, self._softmax, self._weights, (scores, gentries))
        gx = scores[:, None]
        for n in reversed(range(len(self._layers))):
            self._biases[n].grad[:] = gx.sum(0)
            np.matmul(gx.T, self._inputs[n], out=self._layers[n].grad)
            gx = self._activations[n].gradient(np.ascontiguousarray(gx @ self._layers[n].value))
        back = (gentries, gcandidates, *(zeros(*w.shape) for w in self._folded), empty(len(g), gx.shape[1]))
        gap = empty(0, 0) if self._gap is None else self._gap.grad
        self._rank.grad[:], gap[:] = 0, 0
        learn.attend_first_back(gx, self._pairs, self._folded, self._gaps, (*back, self._rank.grad, gap))
        self._entry.grad[:], self._product.grad[:], gown = back[2].T, back[3].T, back[4]
        np.matmul(gown.T, candidates, out=self._candidate.grad)
        gcandidates += gown @ self._candidate.value
        learn.add_rows(gentries, self._at, ghistory.reshape(-1, ghistory.shape[2]))
        return gcandidates


class _Dice:
    def __init__(self, module: Dice) -> None:
        self._norm, self._alpha = Norm(module.norm), Weight(module.alpha)

    def value(self, x: Float32, learning: bool) -> Float32:
        said, self._through = self._norm.settle(x[None], learning)
        self._affine, _, self._batch = said[:, :, 0]
        self._x, out = x, np.empty_like(x)
        fused_kernels.dice(x, self._affine, self._alpha.value, out)
        return out

    def gradient(self, g: Float32) -> Float32:
        out = empty(len(g) + 1, g.shape[1])
        fused_kernels.dice_back(g, self._x, self._affine, self._alpha.value, self._batch, self._through, out)
        self._alpha.grad[:] = out[-1]
        return out[:-1]


class _PReLU:
    def __init__(self, module: nn.Module) -> None:
        self._slope = Weight(module.get_parameter("weight"))

    def value(self, x: Float32, learning: bool) -> Float32:
        self._x = x
        return np.where(x > 0, x, self._slope.value * x)

    def gradient(self, g: Float32) -> Float32:
        self._slope.grad[:] = np.where(self._x > 0, 0, g * self._x).sum(0)
        return np.where(self._x > 0, g, self._slope.value * g)


def _activation(module: nn.Module) -> _Dice | _PReLU:
    return _Dice(module) if isinstance(module, Dice) else _PReLU(module)
