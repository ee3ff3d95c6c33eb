"""Deep Interest Network's target attention (Zhou et al. 2018), with a first layer that never sees [c, h, c-h, c*h].

Legend: R requests, M candidates, T history entries (newest first), D width of an entry, H width of the first layer,
P (candidate, present history entry) pairs, B buckets of time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from recsys.model import eager
from recsys.model.layers import Dice, uniform
from recsys.model.specs import Activation

_CANDIDATES = 64
"""Candidates served at once: with 50 entries and 32 units 400 kB, which a core's cache holds; double spills, half only adds calls."""


def _activation(name: Activation, width: int) -> nn.Module:
    return Dice(width) if name == "dice" else nn.PReLU(width)


class MeanPool(nn.Module):
    """The mean of a user's history, whoever the candidate is: what target attention has to beat."""

    def forward(
        self,
        candidate: torch.Tensor,
        history: torch.Tensor,
        mask: torch.Tensor,
        request: torch.Tensor,
        gaps: torch.Tensor,
    ) -> torch.Tensor:
        """As `TargetAttention.forward`."""
        present = mask.to(history.dtype)
        total = torch.einsum("rt,rtd->rd", present, history)
        return (total / present.sum(1, keepdim=True).clamp(min=1))[request]


class TargetAttention(nn.Module):
    """Weigh a user's history by a small network that sees the candidate, and sum it.

    The first layer is W1 [c; h; c-h; c*h] + b = (Wc+Wd) c + (Wh-Wd) h + Wp (c*h) + b, and a learnt bias of the recency
    rank among the present entries and of the time since the entry. Without softmax the weights are free (they start around
    1) and the sum over n entries is divided by sqrt(n), so that it keeps how much of the history the candidate wakes but
    long histories do not blow up.
    """

    def __init__(
        self,
        width: int,
        history_len: int,
        hidden: Sequence[int] = (32, 16),
        *,
        generator: torch.Generator,
        activation: Activation = "dice",
        softmax: bool = False,
        gaps: int = 0,
    ) -> None:
        super().__init__()
        self.softmax = softmax
        first = hidden[0]
        self.candidate, self.entry, self.product = (uniform((first, width), 3 * width, generator) for _ in range(3))
        self.rank_bias = nn.Parameter(torch.zeros(history_len, first))
        self.gap_bias = nn.Parameter(torch.zeros(gaps, first)) if gaps else None
        self.activations = nn.ModuleList([_activation(activation, h) for h in hidden])
        widths = [*hidden, 1]
        self.weights = nn.ParameterList(
            [uniform((o, i), i, generator) for i, o in zip(widths, widths[1:], strict=False)]
        )
        self.biases = nn.ParameterList([torch.full((o,), float(o == 1)) for o in widths[1:]])

    def forward(
        self,
        candidate: torch.Tensor,
        history: torch.Tensor,
        mask: torch.Tensor,
        request: torch.Tensor,
        gaps: torch.Tensor,
    ) -> torch.Tensor:
        """Pool for each candidate: candidate [M, D], history [R, T, D], mask [R, T] bool, request [M] (row of history),
        gaps [R, T] int64 below B -> [M, D].

        Masked entries take no part, not even in batch statistics; an empty history gives zeros. ValueError when more
        than history_len entries are present.
        """
        longest = int(mask.sum(1).max()) if mask.numel() else 0
        if longest > len(self.rank_bias):
            raise ValueError(
                f"history has {longest} entries, the attention knows {len(self.rank_bias)}: cut it to the newest"
            )
        if len(history) == 1 and not self.training:
            return self._pool_one(candidate, history[0], mask[0], gaps[0])
        return self._pool_pairs(candidate, history, mask, request, gaps)

    def _entry_bias(self, entries: torch.Tensor, rank: torch.Tensor, gaps: torch.Tensor) -> torch.Tensor:
        """What an entry alone adds to the first layer: entries [..., D], rank and gaps [...] -> [..., H]."""
        bias = entries @ self.entry.T + self.rank_bias[rank]
        return bias if self.gap_bias is None else bias + self.gap_bias[gaps]

    def _pool_one(
        self, candidate: torch.Tensor, history: torch.Tensor, mask: torch.Tensor, gaps: torch.Tensor
    ) -> torch.Tensor:
        """All candidates of one request: the first layer is folded into one matrix of the history, [T H, D]."""
        rank = mask.nonzero().squeeze(1)
        entries = history[rank]
        matrix = (self.product * entries.unsqueeze(1) + self.candidate).flatten(0, 1)
        bias = self._entry_bias(entries, torch.arange(len(rank), device=rank.device), gaps[rank])
        weights = self._one_by_one(candidate, matrix, bias)
        if self.softmax:
            return torch.softmax(weights, 0).T @ entries
        return weights.T @ (entries * max(len(rank), 1) ** -0.5)

    def _one_by_one(self, candidate: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """Scores [T, M] of candidate [M, D] by matrix [T H, D] and bias [T, H]."""
        scores = [
            self._score(torch.mm(part, matrix.T).add_(bias.flatten()).view(-1, bias.shape[1])).view(
                len(part), len(bias)
            )
            for part in candidate.split(_CANDIDATES)
        ]
        return torch.cat(scores).T

    def _pool_pairs(
        self,
        candidate: torch.Tensor,
        history: torch.Tensor,
        mask: torch.Tensor,
        request: torch.Tensor,
        gaps: torch.Tensor,
    ) -> torch.Tensor:
        """Candidates of several requests: only the pairs that exist are computed."""
        present, longest = mask[request], history.shape[1]
        row, rank = present.nonzero(as_tuple=True)
        pairs = torch.stack([row, request[row] * longest + rank]).numpy()
        per_entry = self._entry_bias(history, (mask.cumsum(1) - 1).clamp(min=0), gaps).flatten(0, 1)
        entries = history.flatten(0, 1)
        per_candidate = candidate @ self.candidate.T
        scores = self._score(eager.pair_sums((candidate, entries, self.product, per_candidate, per_entry), pairs))
        if self.softmax:
            dense = scores.new_full(present.shape, -torch.inf).index_put((row, rank), scores)
            weights = torch.softmax(dense, 1)[row, rank]
        else:
            weights = scores * present.sum(1).to(scores.dtype).rsqrt()[row]
        return eager.pair_pool(weights, entries, pairs, len(candidate))

    def _score(self, first: torch.Tensor) -> torch.Tensor:
        """Pre-activations of the first layer [P, H] -> weights [P]."""
        x = first
        for activation, weight, bias in zip(self.activations, self.weights, self.biases, strict=True):
            x = nn.functional.linear(activation(x), weight, bias)
        return x.squeeze(1)
