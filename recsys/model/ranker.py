"""The ranker: a wide part that knows something at once, and DIN + HoME beside it.

Legend: R requests, M items in all, S sequences, T history entries (newest first), d embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass

import safetensors
import safetensors.torch
import torch
from torch import nn

from recsys.errors import SchemaMismatch
from recsys.model.correct import Calibrator, ErrorMemory
from recsys.model.din import MeanPool, TargetAttention
from recsys.model.home import Home, HomeSpec, Reading
from recsys.model.layers import StreamingNorm, seeded, uniform
from recsys.model.specs import CERTAIN, NUMBER_LIMIT, RankerSpec, priors

_EXAMPLES = 256
"""Examples that pass the head at once when serving: half adds calls, double makes the allocator fetch fresh pages each time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankerInputs:
    """Tensors of M items of R requests; all numbers finite."""

    shared: torch.Tensor
    """[R, num_shared, d]"""
    history: torch.Tensor
    """[R, T, num_history, d], newest first"""
    history_masks: torch.Tensor
    """[S, R, T] bool: the entries of each sequence"""
    history_gaps: torch.Tensor
    """[R, T] int64: bucket of the time since the entry"""
    item: torch.Tensor
    """[M, num_item, d]"""
    numbers: torch.Tensor
    """[M, num_numbers]"""
    wide: torch.Tensor
    """[M, tasks]: sum of the wide weights of all keys of the example"""
    request: torch.Tensor
    """[M] int64: row of the request"""


class Ranker(nn.Module):
    """logit_t = bias_t + wide_t + numbers · w_t + home_t(embeddings, attention, numbers); home is zero until it has learnt."""

    def __init__(self, spec: RankerSpec, *, seed: int) -> None:
        super().__init__()
        generator = seeded(seed)
        self.spec = spec
        entry = spec.num_history * spec.dim
        self.attention = nn.ModuleList(
            TargetAttention(
                entry,
                spec.history_len,
                spec.attention,
                generator=generator,
                activation=spec.activation,
                softmax=spec.softmax,
                gaps=spec.gaps,
            )
            if spec.attention
            else MeanPool()
            for _ in range(spec.sequences)
        )
        reach = torch.full((spec.num_numbers,), torch.inf)
        reach[list(spec.odd_numbers)] = NUMBER_LIMIT
        self.number_norm = StreamingNorm(spec.num_numbers, reach=reach if spec.odd_numbers else None)
        width = (spec.num_shared + spec.num_item) * spec.dim + (1 + spec.sequences) * entry + spec.num_numbers
        self.compress = uniform((width, spec.input_width), width, generator) if spec.input_width else None
        self.home = Home(
            HomeSpec(
                width=spec.input_width or width,
                groups=spec.groups,
                experts=spec.experts,
                expert_hidden=spec.expert_hidden,
                tower_hidden=spec.tower_hidden,
                feature_gate_rank=spec.feature_gate_rank,
                without=spec.home_without,
            ),
            generator,
        )
        tasks = len(spec.tasks)
        self.calibrator = Calibrator(tasks) if spec.calibrate else None
        keys = tasks * spec.expert_hidden[-1]
        self.memory = ErrorMemory(keys, tasks, seed=seed, strength=spec.error_memory) if spec.error_memory else None
        self.bias = nn.Parameter(torch.tensor(priors(spec)))
        self.number_weights = nn.Parameter(torch.tensor(spec.number_prior).unsqueeze(1).repeat(1, len(spec.tasks)))

    def forward(self, inputs: RankerInputs) -> torch.Tensor:
        """Logits [M, tasks]."""
        return self.scores(inputs)[0]

    def scores(self, inputs: RankerInputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [M, tasks], and what HoME's towers saw [tasks, M, Z]."""
        logits, hidden = self.network(inputs)
        return self.wide_logits(inputs.numbers, inputs.wide) + logits, hidden

    def network(self, inputs: RankerInputs) -> tuple[torch.Tensor, torch.Tensor]:
        """What the network adds to the wide logits [M, tasks], and what HoME's towers saw [tasks, M, Z]."""
        deep = self._deep(inputs)
        step = len(deep) if self.training else _EXAMPLES  # batch statistics need all at once
        hidden = torch.cat([self.home.hidden(part) for part in deep.split(max(step, 1))], 1)
        return self.home.logits(hidden), hidden

    def predict(self, inputs: RankerInputs) -> torch.Tensor:
        """Probabilities [M, tasks] to serve: corrected, where a corrector is configured."""
        return self.corrected(*self.scores(inputs))

    def corrected(self, logits: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Probabilities [M, tasks] of `scores`."""
        log_odds = self.log_odds(logits)
        p = torch.sigmoid(log_odds if self.calibrator is None else self.calibrator(log_odds))
        return p if self.memory is None else self.memory(memory_keys(hidden), p)

    @torch.no_grad()
    def observe(self, logits: torch.Tensor, hidden: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> None:
        """Let the correctors see labels [M, tasks] and their weights (0: unknown), with the scores made before they were learned."""
        if self.calibrator is None and self.memory is None:
            return
        log_odds = self.log_odds(logits)
        if self.memory is not None:
            p = torch.sigmoid(log_odds if self.calibrator is None else self.calibrator(log_odds))
            self.memory.update(memory_keys(hidden), p, labels, weights)
        if self.calibrator is not None:
            self.calibrator.update(log_odds, labels, weights)

    def wide_logits(self, numbers: torch.Tensor, wide: torch.Tensor) -> torch.Tensor:
        """What is known without the network: numbers [M, num_numbers], wide sums [M, tasks] -> logits [M, tasks]."""
        return torch.addmm(self.bias, numbers, self.number_weights) + wide

    def log_odds(self, logits: torch.Tensor) -> torch.Tensor:
        """Of the tasks, from the network's logits [M, T]: a chained task's logit is that of its share of the task before
        (entire-space modelling, Ma et al. 2018)."""
        if not any(parent >= 0 for parent in self.spec.after):
            return logits
        logs: list[torch.Tensor] = []
        for task, parent in enumerate(self.spec.after):
            log = nn.functional.logsigmoid(logits[:, task])
            logs.append(log if parent < 0 else log + logs[parent])
        log_p = torch.stack(logs, 1).clamp(max=-CERTAIN)
        chained = torch.tensor(self.spec.after) >= 0
        return torch.where(chained, log_p - torch.log(-torch.expm1(log_p)), logits)

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Of the tasks, from the network's logits [M, T]."""
        return torch.sigmoid(self.log_odds(logits))

    def readings(self, inputs: RankerInputs) -> list[Reading]:
        """How HoME's gates and experts fare on these examples."""
        return self.home.readings(self._deep(inputs), self.spec.tasks)

    def _deep(self, inputs: RankerInputs) -> torch.Tensor:
        history = inputs.history.flatten(2)
        item = inputs.item.flatten(1)
        candidate = item[:, : history.shape[2]]
        pooled = [
            attention(candidate, history, mask, inputs.request, inputs.history_gaps)
            for attention, mask in zip(self.attention, inputs.history_masks, strict=True)
        ]
        mask = inputs.history_masks.any(0)
        share = mask / mask.sum(1, keepdim=True).clamp(min=1)
        mean = torch.bmm(share.unsqueeze(1).to(history.dtype), history).squeeze(1)
        user = torch.cat([inputs.shared.flatten(1), mean], 1)
        numbers = self.number_norm(inputs.numbers).clamp(-NUMBER_LIMIT, NUMBER_LIMIT)
        own = [*pooled, item, numbers]
        if self.compress is not None:  # the user's share is the same for all items of a request
            user, own = user @ self.compress[: user.shape[1]], [torch.cat(own, 1) @ self.compress[user.shape[1] :]]
        user = user.expand(len(item), -1) if len(user) == 1 else user.index_select(0, inputs.request)
        return torch.cat([user, *own], 1) if self.compress is None else user + own[0]


def memory_keys(hidden: torch.Tensor) -> torch.Tensor:
    """Keys of the error memory: [tasks, M, Z] -> [M, tasks Z], centred, so that signs of projections tell them apart."""
    keys = hidden.transpose(0, 1).flatten(1)
    return keys - keys.mean(1, keepdim=True)


def losses(logits: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Each task's sum of weighted binary cross-entropy where `mask` holds, divided by M: [M, T] x 4 -> [T]."""
    return (label_losses(logits, labels, mask) * weights).sum(0) / max(len(logits), 1)


def label_losses(logits: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of each label, 0 where `mask` does not hold: [M, T] x 3 -> [M, T]."""
    known = torch.where(mask, labels, 0.0)
    entropy = nn.functional.binary_cross_entropy_with_logits(logits, known, reduction="none")
    return torch.where(mask, entropy, 0.0)


def choices(logits: torch.Tensor, request: torch.Tensor) -> torch.Tensor:
    """Log of the chance that each item is the one of its request [M, T]: logits [M, T], rows of the requests [M] (softmax)."""
    owner = request.unsqueeze(1).expand_as(logits)
    shape = (int(request.max()) + 1, logits.shape[1]) if len(request) else (0, logits.shape[1])
    largest = logits.new_full(shape, -torch.inf).scatter_reduce(0, owner, logits.detach(), "amax")
    shifted = logits - largest.gather(0, owner)
    total = logits.new_zeros(shape).scatter_add(0, owner, shifted.exp())
    return shifted - total.log().gather(0, owner)


def to_bytes(module: nn.Module) -> bytes:
    """All weights and statistics of a network, as safetensors."""
    return safetensors.torch.save(
        {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}
    )


def from_bytes(module: nn.Module, payload: bytes) -> None:
    """Load what `to_bytes` wrote. SchemaMismatch, and nothing changed, when names, shapes or types differ."""
    try:
        state = safetensors.torch.load(payload)
    except safetensors.SafetensorError as error:
        raise SchemaMismatch(f"weights are not readable as safetensors ({error}): publish them again") from None
    expected = module.state_dict()
    wrong = sorted(expected.keys() ^ state.keys()) or sorted(
        name
        for name, value in state.items()
        if value.shape != expected[name].shape or value.dtype != expected[name].dtype
    )
    if wrong:
        raise SchemaMismatch(
            f"weights {wrong[0]!r} do not fit the configured network: restart all processes with one configuration"
        )
    module.load_state_dict(state)
