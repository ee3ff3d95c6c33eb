"""HoME: hierarchy of multi-gate experts (Wang et al. 2025): normalised experts, hierarchy mask, feature gate, self gate.

Legend: M examples, T tasks, C categories of tasks, G groups of experts, K experts of a group, E = G K experts in all,
O outputs of a level, V width of a level's input, W width of its gates' input, Z width of an expert's output, r rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from recsys.model import eager, fused
from recsys.model.layers import GroupedLinear, StreamingNorm, uniform
from recsys.model.specs import hierarchy, reached

DEAD = 1e-3
"""A unit whose absolute output stays below this in a whole batch is dead: Swish's tail never reaches 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HomeSpec:
    """Sizes of the head; `groups` names each task's category."""

    width: int
    groups: tuple[str, ...]
    experts: int = 2
    expert_hidden: tuple[int, ...] = (64, 32)
    tower_hidden: tuple[int, ...] = (16,)
    feature_gate_rank: int = 16
    without: tuple[str, ...] = ()
    """Parts left out, for ablation: `norm`, `hierarchy`, `feature_gate`, `self_gate`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One level's health over a batch. Names of outputs and experts are in the order of the arrays."""

    level: str
    outputs: tuple[str, ...]
    experts: tuple[str, ...]
    gate_weights: torch.Tensor
    """[O, E] mean share of each expert in each output, self gate left out"""
    scales: torch.Tensor
    """[E] mean absolute output"""
    dead: torch.Tensor
    """[E] share of units that are silent in the whole batch"""


class FeatureGate(nn.Module):
    """Each group's own view of its input: x * sum_l g_l 2 sigmoid(x B_l A_l), [1 or G, M, V] -> [G, M, V].

    Two low-rank maps, which the paper found best; the softmax over two is (1 - s, s), s a sigmoid. A starts at zero: at the
    start the factor is exactly 1.
    """

    def __init__(self, groups: int, width: int, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.down = uniform((groups, width, 2 * rank + 1), width, generator)
        """Both maps B, and the choice between the two."""
        self.bias = nn.Parameter(torch.zeros(groups, 1, 1))
        self.up = nn.Parameter(torch.zeros(groups, 2, rank, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return eager.feature_gate(x, self.down, self.bias, self.up)


class Experts(nn.Module):
    """K experts of each group, Swish(Norm(MLP(x))): [G, M, V] -> [G K, M, Z]."""

    def __init__(self, groups: int, spec: HomeSpec, width: int, generator: torch.Generator) -> None:
        super().__init__()
        hidden, self.each = spec.expert_hidden, spec.experts
        self.first = GroupedLinear(groups, width, spec.experts * hidden[0], generator)
        pairs = zip(hidden[:-1], hidden[1:], strict=True)
        self.rest = nn.ModuleList([GroupedLinear(groups * spec.experts, i, o, generator) for i, o in pairs])
        self.norm = None if "norm" in spec.without else StreamingNorm(groups * spec.experts, hidden[-1], affine=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        groups, examples, _ = x.shape
        x = self.first(x).view(groups, examples, self.each, -1).transpose(1, 2).flatten(0, 1)
        for layer in self.rest:
            x = layer(nn.functional.silu(x))
        if self.norm is None:
            return nn.functional.silu(x)
        assert self.norm.gain is not None and self.norm.bias is not None
        return fused.norm_silu(x, self.norm.gain, self.norm.bias, *self.norm.prepare(x))


class Level(nn.Module):
    """Feature gates, experts, and the gates that mix them: inputs [1 or G, M, V], gate inputs [1 or O, M, W] -> [O, M, Z].

    `reach[o]` are the groups that output o mixes; the last of them is its own, which its self gate adds once more.
    """

    def __init__(
        self, spec: HomeSpec, width: int, reach: Sequence[Sequence[int]], gate_width: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        self._groups, experts = 1 + max(max(r) for r in reach), spec.experts
        self.reach = reached(reach, experts, spec.without)
        self.own = 0 if "self_gate" in spec.without else experts
        self.feature_gate = (
            None
            if "feature_gate" in spec.without
            else FeatureGate(self._groups, width, spec.feature_gate_rank, generator)
        )
        self.experts = Experts(self._groups, spec, width, generator)
        self.gate = GroupedLinear(len(reach), gate_width, self._groups * experts + self.own, generator)

    def forward(self, inputs: torch.Tensor, gate_inputs: torch.Tensor) -> torch.Tensor:
        return self.parts(inputs, gate_inputs)[0]

    def parts(self, inputs: torch.Tensor, gate_inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Outputs [O, M, Z]; each expert's share in each output, then the self gate's weights [O, M, E + K]; experts [E, M, Z]."""
        gated = inputs.expand(self._groups, -1, -1) if self.feature_gate is None else self.feature_gate(inputs)
        experts = self.experts(gated)
        logits = self.gate(gate_inputs)
        outputs, shares = eager.mix(logits, experts, self.reach, self.own)
        return outputs, shares, experts


class Home(nn.Module):
    """Two levels and a tower a task: [M, width] -> logits [M, T]. The towers' last layer starts at zero."""

    inputs: torch.Tensor
    category: torch.Tensor

    def __init__(self, spec: HomeSpec, generator: torch.Generator) -> None:
        super().__init__()
        parts, width = hierarchy(spec.groups), spec.expert_hidden[-1]
        self._names = parts.names
        self.register_buffer("inputs", torch.tensor(parts.inputs), persistent=False)
        self.register_buffer("category", torch.tensor(parts.category), persistent=False)
        self.meta = Level(spec, spec.width, parts.meta, spec.width, generator)
        self.task = Level(spec, width, parts.task, 2 * width, generator)
        widths = [width, *spec.tower_hidden, 1]
        pairs = zip(widths[:-1], widths[1:], strict=True)
        self.towers = nn.ModuleList([GroupedLinear(len(spec.groups), i, o, generator) for i, o in pairs])
        nn.init.zeros_(self.towers[-1].weight)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.logits(self.hidden(x))

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        """What the towers see: [M, width] -> [T, M, Z]."""
        x = x.unsqueeze(0)
        hidden: torch.Tensor = self.task(*self._second(self.meta(x, x)))
        return hidden

    def logits(self, h: torch.Tensor) -> torch.Tensor:
        """The towers: [T, M, Z] -> [M, T]."""
        for layer, tower in enumerate(self.towers):
            h = tower(nn.functional.silu(h) if layer else h)
        return h.squeeze(2).T

    def _second(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs of level 2 and of its gates, from the outputs of level 1."""
        mine = z.index_select(0, self.category)
        return z.index_select(0, self.inputs), torch.cat([mine, z[:1].expand_as(mine)], 2)

    @torch.no_grad()
    def readings(self, x: torch.Tensor, tasks: Sequence[str]) -> list[Reading]:
        """How gates and experts fare on the examples x [M, width]; `tasks` names the outputs of level 2."""
        x = x.unsqueeze(0)
        first = self.meta.parts(x, x)
        second = self.task.parts(*self._second(first[0]))
        groups = (self._names, (*self._names, *tasks))
        outputs = (self._names, tuple(tasks))
        found = []
        for level, (_, shares, experts), group, output in zip(
            ("meta", "task"), (first, second), groups, outputs, strict=True
        ):
            each = len(experts) // len(group)
            found.append(
                Reading(
                    level=level,
                    outputs=output,
                    experts=tuple(f"{name}.{k}" for name in group for k in range(each)),
                    gate_weights=shares[..., : len(experts)].mean(1),
                    scales=experts.abs().mean((1, 2)),
                    dead=(experts.abs() < DEAD).all(1).float().mean(1),
                )
            )
        return found
