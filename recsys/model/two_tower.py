"""Two towers for retrieval, in-batch softmax with sampling-bias correction (Yi et al. 2019); several interests a user (ComiRec-SA).

Legend: R users, N items, B (user, item) pairs of a batch, T history entries (newest first), K interests, d embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from recsys.model.layers import MLP, seeded, uniform
from recsys.model.specs import ATTENTION, TwoTowerSpec


@dataclass(frozen=True, slots=True)
class Passed:
    """Hard negatives: items that each user was shown and passed over, [B, N, tower_dim], and which exist [B, N]."""

    items: torch.Tensor
    mask: torch.Tensor


class TwoTower(nn.Module):
    """User and item vectors of length 1 whose inner product is the affinity."""

    steps: torch.Tensor

    def __init__(self, spec: TwoTowerSpec, *, seed: int) -> None:
        super().__init__()
        generator = seeded(seed)
        self.spec = spec
        self._seed = seed
        self.user_tower = MLP(
            [(spec.num_shared + spec.num_history) * spec.dim, *spec.hidden, spec.tower_dim], generator
        )
        self.item_tower = MLP([spec.num_item * spec.dim, *spec.hidden, spec.tower_dim], generator)
        if spec.interests > 1:
            width = spec.num_history * spec.dim
            self.attention = uniform((ATTENTION, width), width, generator)
            self.heads = uniform((spec.interests, ATTENTION), ATTENTION, generator)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def user_vectors(self, shared: torch.Tensor, history: torch.Tensor, history_mask: torch.Tensor) -> torch.Tensor:
        """shared [R, num_shared, d], history [R, T, num_history, d], history_mask [R, T] bool -> [R, tower_dim], or [R, K, tower_dim].

        An interest's weight of an entry is exp(head · tanh(W entry)) times the weight that recency alone gives it, in shares.
        """
        rank = torch.arange(history.shape[1], device=history.device)
        weight = self.spec.recency_decay**rank * history_mask
        entries = history.flatten(2)
        if self.spec.interests > 1:
            logits = (
                torch.tanh(entries @ self.attention.T) @ self.heads.T
            )  # [R, T, K], of a scale that needs no maximum
            weight = torch.exp(logits.transpose(1, 2)) * weight.unsqueeze(1)
            shared = shared.unsqueeze(1).expand(-1, self.spec.interests, -1, -1)
        else:
            weight = weight.unsqueeze(1)
        weight = weight / weight.sum(2, keepdim=True).clamp(min=1e-12)
        mean = torch.bmm(weight.to(history.dtype), entries)
        if self.spec.interests == 1:
            mean = mean.squeeze(1)
        inputs = torch.cat([shared.flatten(-2), mean], -1)
        vectors = self.user_tower(inputs.flatten(0, -2)).view(*inputs.shape[:-1], -1)
        return nn.functional.normalize(vectors, dim=-1)

    def item_vectors(self, item: torch.Tensor) -> torch.Tensor:
        """item [N, num_item, d] -> [N, tower_dim]; in training some items lose their id."""
        if self.training and self.spec.id_dropout:
            item = torch.cat([item[:, :1] * self.kept(len(item)).to(item), item[:, 1:]], 1)
        return nn.functional.normalize(self.item_tower(item.flatten(1)), dim=1)

    def kept(self, items: int) -> torch.Tensor:
        """Which ids stay [N, 1, 1]: drawn from (seed, number of the call), so that a replay from a checkpoint draws the same."""
        self.steps += 1
        generator = seeded((self._seed << 32) ^ int(self.steps))
        return torch.rand(items, 1, 1, generator=generator) >= self.spec.id_dropout

    def loss(
        self,
        user: torch.Tensor,
        item: torch.Tensor,
        item_keys: torch.Tensor,
        log_q: torch.Tensor,
        weights: torch.Tensor,
        passed: Passed | None = None,
    ) -> torch.Tensor:
        """Mean weighted cross-entropy of each user's item against the batch's other items, and those it passed over.

        user, item [B, tower_dim] (row i of both is a pair; of a user's K interests, [B, K, tower_dim], the one nearest to the
        item is trained), item_keys [B] int64, log_q [B] log probability that the
        item is in a batch, weights [B] -> scalar. Other rows with the same item are no negatives. What a user passed over is
        not drawn by popularity and is not corrected for it.
        """
        if user.dim() == 3:
            nearest = (user @ item.unsqueeze(2)).squeeze(2).argmax(1)
            user = user[torch.arange(len(user), device=user.device), nearest]
        logits = user @ item.T / self.spec.temperature - log_q
        same = item_keys.unsqueeze(1) == item_keys
        same.fill_diagonal_(False)
        target = torch.arange(len(user), device=user.device)
        logits = logits.masked_fill(same, -torch.inf)
        if passed is not None:
            own = (passed.items @ user.unsqueeze(2)).squeeze(2) / self.spec.temperature
            logits = torch.cat([logits, own.masked_fill(~passed.mask, -torch.inf)], 1)
        entropy = nn.functional.cross_entropy(logits, target, reduction="none")
        return (entropy * weights).sum() / max(len(user), 1)
