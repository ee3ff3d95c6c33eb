"""HoME: hierarchy of multi-gate experts (Wang et al. 2025): normalised experts, hierarchy mask, feature gate, self gate.

Legend: M examples, T tasks, C categories of tasks, G groups of experts, K experts of a group, E = G K experts in all,
O outputs of a level, V width of a level's input, W width of its gates' input, Z width of an expert's output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from recsys.model.layers import GroupedLinear, StreamingNorm, uniform


@dataclass(frozen=True, slots=True, kw_only=True)
class HomeSpec:
    """Sizes of the head; `groups` names each task's category."""

    width: int
    groups: tuple[str, ...]
    experts: int = 2
    expert_hidden: tuple[int, ...] = (64, 32)
    tower_hidden: tuple[int, ...] = (16,)
    feature_gate_rank: int = 16


class FeatureGate(nn.Module):
    """Each group's own view of its input: x * sum_l g_l 2 sigmoid(x B_l A_l), [G, M, V] -> the same.

    Two low-rank maps, which the paper found best; the softmax over two is (1 - s, s), s a sigmoid. A starts at zero
    and 2 sigmoid(y) is computed as 1 + tanh(y / 2): at the start the factor is exactly 1.
    """

    def __init__(self, groups: int, width: int, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.down = nn.ParameterList([uniform((groups, width, rank), width, generator) for _ in range(2)])
        self.up = nn.ParameterList([torch.zeros(groups, rank, width) for _ in range(2)])
        self.choice = GroupedLinear(groups, width, 1, generator)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = (
            torch.tanh(torch.bmm(torch.bmm(x, down), up * 0.5)) for down, up in zip(self.down, self.up, strict=True)
        )
        return torch.addcmul(x, x, torch.lerp(first, second, torch.sigmoid(self.choice(x))))


class Experts(nn.Module):
    """K experts of each group, Swish(Norm(MLP(x))): [G, M, V] -> [G K, M, Z]."""

    def __init__(
        self, groups: int, experts: int, width: int, hidden: Sequence[int], generator: torch.Generator
    ) -> None:
        super().__init__()
        self._experts = experts
        self.first = GroupedLinear(groups, width, experts * hidden[0], generator)
        pairs = zip(hidden[:-1], hidden[1:], strict=True)
        self.rest = nn.ModuleList([GroupedLinear(groups * experts, i, o, generator) for i, o in pairs])
        self.norm = StreamingNorm(groups * experts, hidden[-1], affine=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        groups, examples, _ = x.shape
        x = self.first(x).view(groups, examples, self._experts, -1).transpose(1, 2).flatten(0, 1)
        for layer in self.rest:
            x = layer(nn.functional.silu(x))
        return nn.functional.silu(self.norm(x))


class Level(nn.Module):
    """Feature gates, experts, and the gates that mix them: group inputs [G, M, V], gate inputs [O, M, W] -> [O, M, Z].

    `reach[o]` are the groups that output o mixes; the last of them is its own, which its self gate adds once more.
    """

    barred: torch.Tensor

    def __init__(
        self, spec: HomeSpec, width: int, reach: Sequence[Sequence[int]], gate_width: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        groups, experts = 1 + max(max(r) for r in reach), spec.experts
        self._reach = [[group * experts + k for group in r for k in range(experts)] for r in reach]
        self._num_experts, self._own = groups * experts, experts
        self.feature_gate = FeatureGate(groups, width, spec.feature_gate_rank, generator)
        self.experts = Experts(groups, experts, width, spec.expert_hidden, generator)
        self.gate = GroupedLinear(len(reach), gate_width, self._num_experts + experts, generator)
        barred = torch.full((len(reach), self._num_experts, 1), -torch.inf)
        for output, reached in enumerate(self._reach):
            barred[output, reached] = 0.0
        self.register_buffer("barred", barred, persistent=False)

    def forward(self, inputs: torch.Tensor, gate_inputs: torch.Tensor) -> torch.Tensor:
        experts = self.experts(self.feature_gate(inputs)).unbind(0)
        mix, residual = self.gate_weights(gate_inputs)
        outputs = []
        for reached, weights, own in zip(self._reach, mix.unsqueeze(3), residual.unsqueeze(3), strict=True):
            total = weights[reached[0]] * experts[reached[0]]
            for expert in reached[1 : -self._own]:
                total = torch.addcmul(total, weights[expert], experts[expert])
            for expert, extra in zip(reached[-self._own :], own, strict=True):
                total = torch.addcmul(total, weights[expert] + extra, experts[expert])
            outputs.append(total)
        return torch.stack(outputs)

    def gate_weights(self, gate_inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[O, M, W] -> each expert's weight in each output [O, E, M] (0 out of reach), self gate's weights [O, K, M]."""
        logits = self.gate(gate_inputs).transpose(1, 2).contiguous()  # softmax over the middle is the faster one
        mix, own = logits.split([self._num_experts, self._own], 1)
        return torch.softmax(mix + self.barred, 1), torch.sigmoid(own) if self._own == 1 else torch.softmax(own, 1)


class Home(nn.Module):
    """Two levels and a tower a task: [M, width] -> logits [M, T]. The towers' last layer starts at zero."""

    def __init__(self, spec: HomeSpec, generator: torch.Generator) -> None:
        super().__init__()
        names = list(dict.fromkeys(spec.groups))
        self._category = [1 + names.index(group) for group in spec.groups]
        self._num_groups, width = 1 + len(names), spec.expert_hidden[-1]
        categories = list(range(1, self._num_groups))
        self._inputs = [0, *categories, *self._category]
        reach = [[*categories, 0], *([0, category] for category in categories)]
        self.meta = Level(spec, spec.width, reach, spec.width, generator)
        reach = [[0, category, self._num_groups + task] for task, category in enumerate(self._category)]
        self.task = Level(spec, width, reach, 2 * width, generator)
        widths = [width, *spec.tower_hidden, 1]
        pairs = zip(widths[:-1], widths[1:], strict=True)
        self.towers = nn.ModuleList([GroupedLinear(len(spec.groups), i, o, generator) for i, o in pairs])
        nn.init.zeros_(self.towers[-1].weight)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.expand(self._num_groups, *x.shape)
        z = self.meta(x, x)
        mine = z[self._category]
        h = self.task(z[self._inputs], torch.cat([mine, z[:1].expand_as(mine)], 2))
        for layer, tower in enumerate(self.towers):
            h = tower(nn.functional.silu(h) if layer else h)
        return h.squeeze(2).T
