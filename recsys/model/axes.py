"""What each index of each weight stands for, by name, so that the weights of one configuration can be laid into another.

A part that both have is copied. What an old output gets from a new input is 0, and it shuts its gate on a new expert: so it stays
what it was. A new output starts as in an untrained network. A row's new values are 0 where its slot was known, so their weights
may start untrained, too, and must: 0 times 0 never learns.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeGuard

import torch

from recsys.config import Config
from recsys.errors import SchemaMismatch
from recsys.features.convert import places, slot_names
from recsys.features.schema import Schema

SHUT = -18.0
"""Logit of a gate on an expert that is new to an output: the expert's share is 1e-8, which training can open. Half of it moves
predictions by more than 1e-6, with double Adam's epsilon keeps the gate shut."""

Role = Literal["in", "out"]


class Axis(NamedTuple):
    """The names along one dimension of a weight. `in`: what it multiplies; `out`: what it makes."""

    role: Role
    names: tuple[Hashable, ...]


UNNAMED = Axis("out", ())
"""Of a size that cannot be changed."""


@dataclass(frozen=True, slots=True)
class Named:
    """A weight's name in every configuration, and its axes; those behind them are of a fixed size."""

    name: str
    axes: tuple[Axis, ...]
    fill: float = 0.0
    """What an old output gets from a new input."""


class _Fields(NamedTuple):
    """Names of the columns of a network's input."""

    shared: list[tuple[str, str, int]]
    past: list[tuple[str, str, int]]
    item: list[tuple[str, str, int]]


def _fields(config: Config, schema: Schema) -> _Fields:
    slots, dim = dict(zip(schema.slots, slot_names(schema), strict=True)), config.model.dim

    def columns(part: str, names: Sequence[str]) -> list[tuple[str, str, int]]:
        return [(part, slots[name], d) for name in names for d in range(dim)]

    item = [name for name, _ in schema.item_fields]
    past = item[: schema.num_history_fields]
    shared = ["user", *(f"context.{name}" for name in schema.context)]
    return _Fields(columns("shared", shared), columns("past", past), columns("item", item))


class RankerAxes:
    """Of a ranker's weights, by their name in its `state_dict`."""

    def __init__(self, config: Config, schema: Schema, numbers: Sequence[str]) -> None:
        """`numbers`: the names that `schema.numbers` go by."""
        model, fields = config.model, _fields(config, schema)
        self._sequences = schema.sequences
        self._numbers, self._tasks = tuple(numbers), schema.tasks
        self._entry = tuple(fields.past)
        pooled = [("pooled", kinds, slot, d) for kinds in schema.sequences for _, slot, d in fields.past]
        inputs = [*fields.shared, *fields.past, *pooled, *fields.item, *(("number", name) for name in numbers)]
        self._inputs: tuple[Hashable, ...] = tuple(inputs)
        self._history_len = tuple(range(schema.history_len))
        categories = [("category", name) for name in dict.fromkeys(task.group for task in config.tasks)]
        groups: list[Hashable] = ["shared", *categories]
        self._groups = {"meta": groups, "task": [*groups, *(("task", name) for name in schema.tasks)]}
        self._outputs = {"meta": tuple(groups), "task": schema.tasks}
        self._own = [("own", k) for k in range(0 if "self_gate" in model.home_without else model.experts)]
        self._each, self._compressed = model.experts, bool(model.input_width)

    def of(self, name: str) -> Named:
        """The axes of a weight, or of a statistic."""
        if found := re.fullmatch(r"attention\.(\d+)\.(.*)", name):
            kinds = self._sequences[int(found[1])]
            return Named(f"attention.{list(kinds)}.{found[2]}", self._attention(found[2]))
        if found := re.fullmatch(r"home\.(meta|task)\.(.*)", name):
            return Named(name, *self._level(found[1], found[2]))
        out = {"towers": self._tasks, "calibrator": self._tasks, "bias": self._tasks}
        top = name.removeprefix("home.").partition(".")[0]
        if top in out:
            return Named(name, (Axis("out", out[top]),))
        if name == "number_weights":
            return Named(name, (Axis("in", self._numbers), Axis("out", self._tasks)))
        if name == "compress":
            return Named(name, (Axis("in", self._inputs),))
        if name in ("number_norm.mean", "number_norm.var"):
            return Named(name, (UNNAMED, Axis("out", self._numbers)))
        if name == "memory.sums":  # its keys are of all tasks: with others they mean something else
            return Named(f"{name} of {list(self._tasks)}", ())
        return Named(name, ())

    def _attention(self, name: str) -> tuple[Axis, ...]:
        if name in ("candidate", "entry", "product"):
            return (UNNAMED, Axis("in", self._entry))
        return (Axis("out", self._history_len),) if name == "rank_bias" else ()

    def _level(self, level: str, name: str) -> tuple[tuple[Axis, ...], float]:
        groups = self._groups[level]
        experts = [(group, k) for group in groups for k in range(self._each)]
        wide = Axis("in", self._inputs if level == "meta" and not self._compressed else ())
        if name == "gate.weight":
            return (Axis("out", self._outputs[level]), wide, Axis("in", (*experts, *self._own))), 0.0
        if name == "gate.bias":
            return (Axis("out", self._outputs[level]), UNNAMED, Axis("in", (*experts, *self._own))), SHUT
        if name in ("feature_gate.down", "experts.first.weight"):
            return (Axis("out", tuple(groups)), wide), 0.0
        if name == "feature_gate.up":
            return (Axis("out", tuple(groups)), UNNAMED, UNNAMED, wide._replace(role="out")), 0.0
        if name.startswith("experts.rest.") or name in {f"experts.norm.{s}" for s in ("mean", "var", "gain", "bias")}:
            return (Axis("out", tuple(experts)),), 0.0
        return ((Axis("out", tuple(groups)),), 0.0) if name != "experts.norm.rows" else ((), 0.0)


class TowerAxes:
    """Of the two towers' weights."""

    def __init__(self, config: Config, schema: Schema) -> None:
        fields = _fields(config, schema)
        self._inputs = {
            "user_tower.weights.0": (*fields.shared, *fields.past),
            "item_tower.weights.0": tuple(fields.item),
            "attention": tuple(fields.past),
        }

    def of(self, name: str) -> Named:
        """The axes of a weight."""
        inputs = self._inputs.get(name)
        return Named(name, () if inputs is None else (UNNAMED, Axis("in", inputs)))


def laid_into(
    fresh: torch.Tensor, new: Named, weight: torch.Tensor, old: Named, *, fill: float | None = None
) -> torch.Tensor:
    """`weight` of the old configuration laid into an untrained one of the new. `fill`: in place of `new.fill`.

    SchemaMismatch where a size without names is another one.
    """
    if not fresh.dim():
        return weight.clone()
    result = fresh.clone()
    from_, known, grown = zip(*(_along(fresh, new, weight, old, axis) for axis in range(fresh.dim())), strict=True)
    outputs = torch.ones((), dtype=torch.bool)
    unfed = torch.zeros((), dtype=torch.bool)
    for axis, here in enumerate(known):
        shape = [-1 if n == axis else 1 for n in range(fresh.dim())]
        if axis < len(new.axes) and new.axes[axis].role == "in":
            unfed = unfed | (~here & ~grown[axis]).view(shape)
        else:
            outputs = outputs & here.view(shape)
    result[(outputs & unfed).expand(fresh.shape)] = new.fill if fill is None else fill
    mine = torch.meshgrid(*(here.nonzero().squeeze(1) for here in known), indexing="ij")
    theirs = torch.meshgrid(*(at[here] for at, here in zip(from_, known, strict=True)), indexing="ij")
    result[mine] = weight[theirs]
    return result


def _along(
    fresh: torch.Tensor, new: Named, weight: torch.Tensor, old: Named, axis: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Along one axis: where each new index was; whether it was; whether it is one more value of a slot that was known."""
    names = new.axes[axis].names if axis < len(new.axes) else ()
    if not names:
        size = fresh.shape[axis]
        if size != weight.shape[axis]:
            raise SchemaMismatch(
                f"weight {new.name!r} was {tuple(weight.shape)} and would be {tuple(fresh.shape)}: that cannot be changed"
            )
        return torch.arange(size), torch.ones(size, dtype=torch.bool), torch.zeros(size, dtype=torch.bool)
    before = old.axes[axis].names
    at = torch.from_numpy(places(before, names))
    slots = {name[:-1] for name in before if _is_value(name)}
    grown = [_is_value(name) and name[:-1] in slots for name in names]
    return at, at >= 0, torch.tensor(grown)


def _is_value(name: Hashable) -> TypeGuard[tuple[Hashable, ...]]:
    """Whether it names one of the values of a slot's rows."""
    return isinstance(name, tuple) and name[0] in ("shared", "past", "item", "pooled")
