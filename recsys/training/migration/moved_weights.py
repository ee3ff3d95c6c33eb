"""Networks, their moments, and what the towers keep, under another configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from recsys.config import Config
from recsys.features.convert import Conversion, picked, renamed_numbers
from recsys.features.schema import Schema
from recsys.model import networks
from recsys.model.axes import Named, RankerAxes, TowerAxes, laid_into

Weights = Mapping[str, torch.Tensor]


def moved_weights(dense: Weights, old: Config, new: Config) -> dict[str, torch.Tensor]:
    """What a checkpoint holds beside rows, under its flat names: see `checkpoint.dense_state`."""
    before, after = Schema.of(old), Schema.of(new)
    renamed = renamed_numbers(before, after)
    was = RankerAxes(old, before, [renamed.get(name, name) for name in before.numbers])
    becomes = RankerAxes(new, after, after.numbers)
    ranker = _Network(networks.ranker(old, before), was.of, networks.ranker(new, after), becomes.of)
    moments = old.model.dense_optimizer == new.model.dense_optimizer
    state = ranker.moved("ranker", dense, moments)
    if new.training.two_tower:
        towers = networks.two_tower(old, before), networks.two_tower(new, after)
        two = _Network(towers[0], TowerAxes(old, before).of, towers[1], TowerAxes(new, after).of)
        state |= two.moved("towers", dense, moments)
        state |= _retrieval(dense, Conversion(before, after))
    if new.explores:
        state |= {name: value for name, value in dense.items() if name.startswith("bandit.")}
    return state


class _Network(NamedTuple):
    """One network, and the same of another configuration, untrained; each with the axes of its weights."""

    old: nn.Module
    was: Callable[[str], Named]
    new: nn.Module
    becomes: Callable[[str], Named]

    def moved(self, part: str, dense: Weights, moments: bool) -> dict[str, torch.Tensor]:
        """Weights and, if they mean the same, moments; of a network that was not trained before: as it begins."""
        model, steps = f"{part}.model.", f"{part}.moments."
        weights = {name.removeprefix(model): value for name, value in dense.items() if name.startswith(model)}
        state = {model + name: value for name, value in self._laid(self.new.state_dict(), weights).items()}
        known = moments and steps + "time" in dense
        for kind in ("mean", "square"):
            flat = _split(self.old, dense[steps + kind]) if known else {}
            fresh = {name: torch.zeros_like(value) for name, value in self.new.named_parameters()}
            laid = self._laid(fresh, flat, fill=0.0).values()
            state[steps + kind] = torch.cat([value.detach().reshape(-1) for value in laid])
        state[steps + "time"] = dense[steps + "time"] if known else torch.zeros((), dtype=torch.float64)
        return state

    def _laid(self, fresh: Weights, weights: Weights, fill: float | None = None) -> dict[str, torch.Tensor]:
        known = {self.was(name).name: (value, self.was(name)) for name, value in weights.items()}
        laid = {}
        for name, value in fresh.items():
            named = self.becomes(name)
            found = known.get(named.name)
            laid[name] = (
                value.detach().clone() if found is None else laid_into(value.detach(), named, *found, fill=fill)
            )
        return laid


def _split(network: nn.Module, flat: torch.Tensor) -> dict[str, torch.Tensor]:
    """A flat vector as the optimiser keeps it, by parameter."""
    parameters = dict(network.named_parameters())
    parts = flat.split([value.numel() for value in parameters.values()])
    return {name: part.view_as(value) for (name, value), part in zip(parameters.items(), parts, strict=True)}


def _retrieval(dense: Weights, conversion: Conversion) -> dict[str, torch.Tensor]:
    """What the towers keep: columns of users' last requests, and of positives that wait."""
    state: dict[str, Any] = {n: v.numpy() for n, v in dense.items() if n.startswith("retrieval.")}
    if not state:
        return {}
    users, waiting = "retrieval.users.", "retrieval.positives."
    width = len(conversion.old.shared_slots)
    for name in ("shared_keys", "shared_mask"):
        columns = state[users + name].reshape(-1, width)
        state[users + name] = picked(columns, conversion.shared).reshape(-1)
        state[waiting + name] = picked(state[waiting + name], conversion.shared)
    sizes = state[users + "sizes"].copy()
    sizes[:, 2] = sizes[:, 2] // width * len(conversion.new.shared_slots)
    state[users + "sizes"] = sizes
    for name in ("keys", "mask"):
        state[f"{waiting}history_{name}"] = picked(state[f"{waiting}history_{name}"], conversion.history)
        state[waiting + name] = picked(state[waiting + name], conversion.item)
    return {name: torch.from_numpy(array) for name, array in state.items()}
