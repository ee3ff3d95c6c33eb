"""HoME, for `learning.py`. Legend: as in `home.py`."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from recsys.model import fused_kernels
from recsys.model import learn_kernels as learn
from recsys.model.home import Home, Level
from recsys.model.layers import GroupedLinear
from recsys.model.learning_parts import Norm, Weight, empty, zeros
from recsys.types import Float32

Array = np.ndarray[Any, Any]


class _Layer:
    """A `GroupedLinear`. With one input for many groups of few columns: by one product."""

    def __init__(self, layer: nn.Module) -> None:
        assert isinstance(layer, GroupedLinear)
        self._weight, self._bias = Weight(layer.weight), Weight(layer.bias)

    def value(self, x: Float32) -> Float32:
        """[1 or G, N, I] -> [G, N, O]."""
        self._x = x
        weight = self._weight.value
        out = empty(len(weight), x.shape[1], weight.shape[2])
        if len(x) < len(weight):
            learn.wide_layer(x[0], weight, self._bias.value, out)
        else:
            learn.layer(x, weight, self._bias.value, out)
        return out

    def gradient(self, g: Float32) -> Float32:
        """For g [G, N, O], that of x."""
        x, gx = self._x, np.empty_like(self._x)
        if len(x) < len(g):
            learn.wide_layer_back(x[0], self._weight.value, g, gx[0], self._weight.grad, self._bias.grad)
        else:
            learn.layer_back(x, self._weight.value, g, gx, self._weight.grad, self._bias.grad)
        return gx


class _Swish:
    def value(self, x: Float32) -> Float32:
        self._x, out = x, np.empty_like(x)
        learn.silu(x.reshape(-1), out.reshape(-1))
        return out

    def gradient(self, g: Float32) -> Float32:
        """In place."""
        learn.silu_back(g.reshape(-1), self._x.reshape(-1))
        return g


class _Gates:
    """A `FeatureGate`."""

    def __init__(self, module: Any) -> None:
        self._weights = Weight(module.down), Weight(module.bias), Weight(module.up)

    def value(self, x: Float32) -> Float32:
        """[1 or G, N, V] -> [G, N, V]."""
        down, bias, up = (w.value for w in self._weights)
        (groups, width, _), rows = down.shape, x.shape[1]
        self._x, self._low = x, empty(2, groups, rows, up.shape[2])
        self._gates, self._choice = empty(2, groups, rows, width), empty(groups, rows)
        out = empty(groups, rows, width)
        learn.gate_maps(x, down, bias, up, self._low, self._gates, self._choice)
        fused_kernels.feature_gate(x, self._gates, self._choice, out)
        return out

    def gradient(self, g: Float32) -> Float32:
        gx, gchoice = zeros(*self._x.shape), np.empty_like(self._choice)
        ggates = np.empty_like(self._gates)
        fused_kernels.feature_gate_back(g, self._x, self._gates, self._choice, gx, ggates, gchoice)
        weights, back = tuple(w.value for w in self._weights), tuple(w.grad for w in self._weights)
        learn.gate_maps_back(self._x, weights, self._low, ggates, gchoice, gx, back)
        return gx


class _Level:
    """A `Level`."""

    def __init__(self, level: Level) -> None:
        experts = level.experts
        self._gates = None if level.feature_gate is None else _Gates(level.feature_gate)
        self._first, self._each = _Layer(experts.first), experts.each
        self._rest = [(_Swish(), _Layer(layer)) for layer in experts.rest]
        self._norm = None if experts.norm is None else Norm(experts.norm)
        self._last = _Swish()
        self._gate, self.reach, self._own = _Layer(level.gate), level.reach, level.own

    def value(self, inputs: Float32, gate_inputs: Float32, learning: bool) -> Float32:
        """As `Level.forward`."""
        groups = len(self._first._weight.value)
        self._shared = len(inputs) < groups
        gated = np.repeat(inputs, groups // len(inputs), 0) if self._gates is None else self._gates.value(inputs)
        together = self._first.value(gated)
        apart = together.reshape(groups, together.shape[1], self._each, -1).swapaxes(
            1, 2
        )  # experts share it, one behind the other
        x = np.ascontiguousarray(apart).reshape(groups * self._each, together.shape[1], -1)
        for swish, layer in self._rest:
            x = layer.value(swish.value(x))
        if self._norm is None:
            experts = self._last.value(x)
        else:
            self._x, experts = x, np.empty_like(x)
            self._said, self._through = self._norm.settle(x, learning)
            fused_kernels.norm_silu(x, self._said[0], experts)
        logits = self._gate.value(gate_inputs)
        self._experts, self._shares = experts, np.empty_like(logits)
        out = empty(len(logits), *experts.shape[1:])
        fused_kernels.mix(logits, experts, self.reach, self._own, self._shares, out)
        return out

    def gradient(self, g: Float32) -> tuple[Float32, Float32]:
        """For g [O, M, Z], those of inputs and gate inputs; of one input that is both, one of both."""
        glogits, gx = zeros(*self._shares.shape), zeros(*self._experts.shape)
        fused_kernels.mix_back(g, self._experts, self._shares, self.reach, self._own, glogits, gx)
        if self._norm is None:
            gx = self._last.gradient(gx)
        else:
            back, sums = np.empty_like(gx), np.empty(self._said.shape[1:])
            fused_kernels.norm_silu_back(gx, self._x, self._said[0], self._said[2], self._through, back, sums)
            self._norm.learned(sums, self._said[1])
            gx = back
        for swish, layer in reversed(self._rest):
            gx = swish.gradient(layer.gradient(gx))
        apart = gx.reshape(-1, self._each, *gx.shape[1:]).swapaxes(1, 2)
        ginputs = self._first.gradient(np.ascontiguousarray(apart).reshape(len(apart), gx.shape[1], -1))
        if self._gates is not None:
            ginputs = self._gates.gradient(ginputs)
        elif self._shared:
            ginputs = ginputs.sum(0, keepdims=True)
        return ginputs, self._gate.gradient(glogits)


class HomeLearning:
    """A `Home`."""

    def __init__(self, home: Home) -> None:
        self._inputs, self._category = home.inputs.numpy(), home.category.numpy()
        self._meta, self._task = _Level(home.meta), _Level(home.task)
        self._towers = [(_Swish(), _Layer(layer)) for layer in home.towers]

    def scores(self, x: Float32, learning: bool) -> tuple[Float32, Float32]:
        """x [M, V] -> what the towers see [T, M, Z], and their logits [M, T]."""
        z = self._meta.value(x[None], x[None], learning)
        self._outputs = z.shape
        gates = empty(len(self._category), z.shape[1], 2 * z.shape[2])
        gates[..., : z.shape[2]], gates[..., z.shape[2] :] = z[self._category], z[0]
        h = hidden = self._task.value(z[self._inputs], gates, learning)
        for number, (swish, layer) in enumerate(self._towers):
            h = layer.value(swish.value(h) if number else h)
        return hidden, np.ascontiguousarray(h[..., 0].T)

    def gradients(self, glogits: Float32) -> Float32:
        """For glogits [M, T], that of x [M, V]."""
        g = np.ascontiguousarray(glogits.T)[..., None]
        for number, (swish, layer) in reversed(list(enumerate(self._towers))):
            g = layer.gradient(g)
            g = swish.gradient(g) if number else g
        ginputs, ggates = self._task.gradient(g)
        gz, width = zeros(*self._outputs), self._outputs[2]
        for place, output in enumerate(self._inputs.tolist()):
            gz[output] += ginputs[place]
        for task, output in enumerate(self._category.tolist()):
            gz[output] += ggates[task, :, :width]
            gz[0] += ggates[task, :, width:]
        gx, by_gates = self._meta.gradient(gz)
        gx += by_gates
        return gx[0]
