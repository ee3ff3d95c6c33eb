"""The ranker as plain PyTorch code has it: what `load_tests.models` compares training with.

nn.Embedding with sparse gradients, a module an expert, DIN over the padded [c, h, c-h, c*h], BatchNorm1d. The same sizes,
the same losses; no fused forms. Legend: B examples, T history entries, D width of an entry.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from recsys.config import Config
from recsys.features.build import Features
from recsys.features.schema import Schema


class Dice(nn.Module):
    """Zhou et al. 2018, eq. 3."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width, eps=1e-8, momentum=0.01, affine=False)
        self.alpha = nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = torch.sigmoid(self.norm(x.flatten(0, -2)).view(x.shape))
        return gate * x + (1 - gate) * self.alpha * x


class Attention(nn.Module):
    """DIN's activation unit over every padded pair: [B, D], [B, T, D], [B, T] -> [B, D]."""

    def __init__(self, width: int, history_len: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.rank = nn.Parameter(torch.zeros(history_len, hidden[0]))
        widths = [4 * width, *hidden]
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in zip(widths, widths[1:], strict=False))
        self.activations = nn.ModuleList(Dice(h) for h in hidden)
        self.score = nn.Linear(hidden[-1], 1)

    def forward(self, candidate: torch.Tensor, history: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        c = candidate.unsqueeze(1).expand_as(history)
        x = torch.cat([c, history, c - history, c * history], 2)
        for number, (layer, activation) in enumerate(zip(self.layers, self.activations, strict=True)):
            x = layer(x)
            x = activation(x if number else x + self.rank[: x.shape[1]])
        weight = self.score(x).squeeze(2) * mask * mask.sum(1, keepdim=True).clamp(min=1).rsqrt()
        return torch.bmm(weight.unsqueeze(1), history).squeeze(1)


class FeatureGate(nn.Module):
    """A sum of two low-rank gates, weighted by a softmax."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Linear(width, rank, bias=False) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(rank, width, bias=False) for _ in range(2))
        self.choice = nn.Linear(width, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shares = torch.softmax(self.choice(x), 1)
        gates = [2 * torch.sigmoid(up(down(x))) for down, up in zip(self.down, self.up, strict=True)]
        return x * (shares[:, :1] * gates[0] + shares[:, 1:] * gates[1])


class Level(nn.Module):
    """A group's experts behind its feature gate; outputs mix the groups in their reach, the last of them once more."""

    def __init__(self, model: Config, width: int, gate_width: int, reach: list[list[int]]) -> None:
        super().__init__()
        sizes, groups = model.model, 1 + max(max(r) for r in reach)
        hidden, experts = sizes.expert_hidden, sizes.experts
        self.reach = reach
        self.gates = nn.ModuleList(FeatureGate(width, sizes.feature_gate_rank) for _ in range(groups))
        self.experts = nn.ModuleList(
            nn.ModuleList(
                nn.Sequential(
                    nn.Linear(width, hidden[0]),
                    nn.SiLU(),
                    nn.Linear(hidden[0], hidden[1]),
                    nn.BatchNorm1d(hidden[1], momentum=0.01),
                    nn.SiLU(),
                )
                for _ in range(experts)
            )
            for _ in range(groups)
        )
        self.mix = nn.ModuleList(nn.Linear(gate_width, len(r) * experts) for r in reach)
        self.own = nn.ModuleList(nn.Linear(gate_width, experts) for _ in reach)

    def forward(self, inputs: list[torch.Tensor], gate_inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        outputs = []
        for gate, experts, x in zip(self.gates, self.experts, inputs, strict=True):
            gated = gate(x)
            outputs.append([expert(gated) for expert in experts])
        mixed = []
        for reach, mix, own, v in zip(self.reach, self.mix, self.own, gate_inputs, strict=True):
            reached = torch.stack([expert for group in reach for expert in outputs[group]], 1)
            mine = torch.stack(outputs[reach[-1]], 1)
            shares, residual = torch.softmax(mix(v), 1).unsqueeze(2), torch.softmax(own(v), 1).unsqueeze(2)
            mixed.append((shares * reached).sum(1) + (residual * mine).sum(1))
        return mixed


class Home(nn.Module):
    """Two levels and a tower a task: [B, V] -> [B, tasks]."""

    def __init__(self, config: Config, width: int) -> None:
        super().__init__()
        names = list(dict.fromkeys(task.group for task in config.tasks))
        self.category = [1 + names.index(task.group) for task in config.tasks]
        self.groups = 1 + len(names)
        out = config.model.expert_hidden[-1]
        categories = list(range(1, self.groups))
        self.meta = Level(config, width, width, [[*categories, 0], *([0, c] for c in categories)])
        reach = [[0, c, self.groups + task] for task, c in enumerate(self.category)]
        self.task = Level(config, out, 2 * out, reach)
        tower = config.model.tower_hidden[0]
        self.towers = nn.ModuleList(
            nn.Sequential(nn.Linear(out, tower), nn.SiLU(), nn.Linear(tower, 1)) for _ in config.tasks
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.meta([x] * self.groups, [x] * self.groups)
        mine = [z[c] for c in self.category]
        h = self.task([*z, *mine], [torch.cat([m, z[0]], 1) for m in mine])
        return torch.cat([tower(part) for tower, part in zip(self.towers, h, strict=True)], 1)


class PlainRanker(nn.Module):
    """Embeddings, wide weights, DIN and HoME. `rows` ids of all deep slots, `pairs` of all crosses."""

    def __init__(self, config: Config, schema: Schema, rows: int, pairs: int) -> None:
        super().__init__()
        dim, tasks = config.model.dim, len(config.tasks)
        self.dim, self.fields = dim, schema.item_fields
        self.num_history = schema.num_history_fields
        self.embedding = nn.Embedding(rows, dim, sparse=True)
        nn.init.uniform_(self.embedding.weight, -config.model.init_scale, config.model.init_scale)
        self.wide = nn.EmbeddingBag(rows, tasks, mode="sum", sparse=True)
        self.crosses = nn.EmbeddingBag(pairs, tasks, mode="sum", sparse=True)
        entry = self.num_history * dim
        self.attention = Attention(entry, schema.history_len, config.model.attention)
        self.numbers = nn.BatchNorm1d(len(schema.numbers), momentum=0.01, affine=False)
        self.linear = nn.Linear(len(schema.numbers), tasks)
        width = (len(schema.shared_slots) + len(schema.item_fields)) * dim + 2 * entry + len(schema.numbers)
        self.home = Home(config, width)

    def pool(self, columns: torch.Tensor) -> torch.Tensor:
        """Mean over the columns of each field: [..., columns, d] -> [..., fields d]."""
        parts = columns.split([width for _, width in self.fields[: self._fields(columns.shape[-2])]], dim=-2)
        return torch.cat([part.mean(-2) for part in parts], -1)

    def _fields(self, columns: int) -> int:
        return len(self.fields) if columns == sum(w for _, w in self.fields) else self.num_history

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        shared = self.embedding(batch["shared"]).flatten(1)
        history, item = self.pool(self.embedding(batch["history"])), self.pool(self.embedding(batch["item"]))
        mask = batch["mask"]
        pooled = self.attention(item[:, : history.shape[2]], history, mask)
        mean = (history * mask.unsqueeze(2)).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        numbers = batch["numbers"]
        x = torch.cat([shared, mean, pooled, item, self.numbers(numbers).clamp(-5, 5)], 1)
        wide = self.wide(torch.cat([batch["shared"], batch["item"]], 1)) + self.crosses(batch["crosses"])
        return self.home(x) + wide + self.linear(numbers)


class PlainLearner:
    """One gradient step over requests of one item, whose keys are row numbers already."""

    def __init__(self, config: Config, schema: Schema, rows: int, pairs: int) -> None:
        torch.manual_seed(config.seed)
        self.model = PlainRanker(config, schema, rows, pairs)
        sparse = [self.model.embedding, self.model.wide, self.model.crosses]
        tables = {id(p) for module in sparse for p in module.parameters()}
        dense = [p for p in self.model.parameters() if id(p) not in tables]
        self.dense = torch.optim.Adam(dense, lr=config.model.dense_learning_rate)
        self.rows = torch.optim.Adagrad(
            [p for module in sparse for p in module.parameters()],
            lr=config.model.row_learning_rate,
            initial_accumulator_value=0.1,
        )
        self.parameters = dense

    def learn(self, batch: dict[str, torch.Tensor], labels: torch.Tensor) -> float:
        """One step; the mean loss of the batch."""
        self.dense.zero_grad()
        self.rows.zero_grad()
        logits = self.model(batch)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none").sum(1).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 10.0)
        self.dense.step()
        self.rows.step()
        return loss.item()


def collate(schema: Schema, features: Sequence[Features], slot_rows: int, slot_pairs: int) -> dict[str, torch.Tensor]:
    """Padded tensors of requests with one item each; a slot's ids lie one after the other in one table."""
    longest = max(len(f.user.history_keys) for f in features)
    history = np.zeros((len(features), longest, len(schema.history_slots)), np.int64)
    mask = np.zeros((len(features), longest), np.float32)
    for row, f in enumerate(features):
        history[row, : len(f.user.history_keys)] = f.user.history_keys + schema.history_slots * slot_rows
        mask[row, : len(f.user.history_keys)] = 1.0
    crosses = schema.cross_slots - len(schema.deep_slots)
    arrays = {
        "shared": np.stack([f.user.shared_keys for f in features]) + schema.shared_slots * slot_rows,
        "history": history,
        "mask": mask,
        "item": np.concatenate([f.item_keys for f in features]) + schema.item_slots * slot_rows,
        "crosses": np.concatenate([f.cross_keys for f in features]) + crosses * slot_pairs,
        "numbers": np.concatenate([f.numbers for f in features]),
    }
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
