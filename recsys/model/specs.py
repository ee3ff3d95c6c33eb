"""What the networks are made of, from the configuration: one place, so that trainer and ranking agree. Whoever serves needs no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from recsys.config import Config
from recsys.features.build import GAP_BUCKETS
from recsys.features.schema import Schema

NUMBER_LIMIT = 5.0
"""Normalised numbers are clipped to ± this many standard deviations: one odd counter must not drown the rest."""

CERTAIN = 1e-6
"""A chained probability stays below 1 by this much: its complement is computed from its logarithm, as float32 allows."""

Activation = Literal["dice", "prelu"]

ATTENTION = 16
"""Width of the attention that tells interests apart; half tells fewer kinds of entries apart, double costs twice."""
NORM_EPSILON, DICE_EPSILON = 1e-5, 1e-8
"""Added to running variances: of what is normalised, and by Dice."""
MEMORY = 8, 8
"""Arrays of the error memory, and the signs that address a bucket of each."""
MEMORY_SHRINK = 100.0
"""So many examples count as much as what the network says: half follows chance, double comes late."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankerSpec:
    """Sizes and starting values of a ranker; `groups` names the category of each task."""

    num_shared: int
    num_item: int
    num_history: int
    """Fields of a history entry; they correspond to the first fields of the item."""
    history_len: int
    """Entries of one sequence"""
    dim: int
    num_numbers: int
    tasks: tuple[str, ...]
    groups: tuple[str, ...]
    number_prior: tuple[float, ...]
    """Starting wide weight of each number, the same for all tasks."""
    task_prior: tuple[float, ...]
    """Starting probability of each task."""
    odd_numbers: tuple[int, ...] = ()
    """Numbers from outside, which may be anything: one value of theirs moves running statistics no further than `NUMBER_LIMIT`."""
    after: tuple[int, ...] = ()
    """The earlier task that each is chained on, -1: none; empty: none at all."""
    attention: tuple[int, ...] = (32, 16)
    activation: Activation = "dice"
    softmax: bool = False
    sequences: int = 1
    """Sequences that the history is read as, each with an attention of its own."""
    gaps: int = 0
    """Buckets of the time since a history entry that the attention knows; 0: none."""
    input_width: int = 0
    """Width to which HoME's input is compressed by one linear map; 0: it is not."""
    experts: int = 2
    expert_hidden: tuple[int, ...] = (64, 32)
    tower_hidden: tuple[int, ...] = (16,)
    feature_gate_rank: int = 16
    home_without: tuple[str, ...] = ()
    calibrate: bool = False
    error_memory: float = 0.0
    """Strength of the error memory; 0: none."""

    def __post_init__(self) -> None:
        for name, size, expected in (
            ("groups", len(self.groups), len(self.tasks)),
            ("task_prior", len(self.task_prior), len(self.tasks)),
            ("number_prior", len(self.number_prior), self.num_numbers),
            ("after", len(self.after or self.tasks), len(self.tasks)),
        ):
            if size != expected:
                raise ValueError(f"{name} has {size} values, expected {expected}")
        if not 1 <= self.num_history <= self.num_item:
            raise ValueError(f"num_history = {self.num_history} must be between 1 and num_item = {self.num_item}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoTowerSpec:
    """Sizes of the towers; the first item field is its id, the first `num_history` describe a history entry, too."""

    num_shared: int
    num_item: int
    num_history: int
    dim: int
    tower_dim: int
    temperature: float = 0.1
    hidden: tuple[int, ...] = (64,)
    id_dropout: float = 0.2
    """Share of training items shown without their id, so that metadata alone places a new item."""
    recency_decay: float = 0.9
    """Weight of each history entry relative to the next newer one: half of the mean lies in the newest 7."""
    interests: int = 1
    """Vectors of a user; several attend to the history each in its own way."""


class Hierarchy(NamedTuple):
    """How HoME's two levels hang together: group 0 is shared by all tasks, then comes one a category, then one a task."""

    names: tuple[str, ...]
    """Of level 1's groups"""
    category: tuple[int, ...]
    """Each task's group of level 1"""
    inputs: tuple[int, ...]
    """Which output of level 1 each group of level 2 sees"""
    meta: list[list[int]]
    """Groups that each output of level 1 mixes; the last is its own."""
    task: list[list[int]]
    """The same of level 2"""


def hierarchy(groups: Sequence[str]) -> Hierarchy:
    """Of tasks of these categories."""
    names = list(dict.fromkeys(groups))
    category = tuple(1 + names.index(group) for group in groups)
    categories = range(1, 1 + len(names))
    return Hierarchy(
        names=("shared", *names),
        category=category,
        inputs=(0, *categories, *category),
        meta=[[*categories, 0], *([0, c] for c in categories)],
        task=[[0, c, 1 + len(names) + task] for task, c in enumerate(category)],
    )


def reached(reach: Sequence[Sequence[int]], experts: int, without: Sequence[str]) -> npt.NDArray[np.int64]:
    """Experts that each output mixes [O, ...], -1: none; those of its own group are the last."""
    if "hierarchy" in without:
        groups = range(1 + max(max(mixed) for mixed in reach))
        reach = [[*(g for g in groups if g != mixed[-1]), mixed[-1]] for mixed in reach]
    found = np.full((len(reach), experts * max(map(len, reach))), -1)
    for output, mixed in enumerate(reach):
        chosen = [group * experts + k for group in mixed for k in range(experts)]
        found[output, -len(chosen) :] = chosen
    return found


def priors(spec: RankerSpec) -> list[float]:
    """The starting logit of each task: of its share of the task that it is chained on."""
    parents = spec.after or (-1,) * len(spec.tasks)
    shares = [
        p if parent < 0 else p / spec.task_prior[parent] for p, parent in zip(spec.task_prior, parents, strict=True)
    ]
    return [math.log(p / (1 - p)) for p in shares]


def ranker(config: Config, schema: Schema) -> RankerSpec:
    """Of a configuration's ranker."""
    model = config.model
    starting = {"popularity": model.popularity_prior, "covisit": model.covisit_prior, "follows.mixed": 1.0}
    num_affinities = max(1, schema.num_history_fields - 1)

    def prior(name: str) -> float:
        if name.startswith("affinity."):
            return model.affinity_prior / num_affinities
        if name.startswith("rate.") and "*" not in name:  # a rate of user or item, spread over the half-lives
            return 0.5 / len(schema.counters.half_lives_s)
        return starting.get(name, 0.0)

    return RankerSpec(
        num_shared=len(schema.shared_slots),
        num_item=len(schema.item_fields),
        num_history=schema.num_history_fields,
        history_len=schema.history_len,
        dim=model.dim,
        num_numbers=len(schema.numbers),
        tasks=schema.tasks,
        groups=tuple(task.group for task in config.tasks),
        attention=model.attention,
        activation=model.attention_activation,
        softmax=model.attention_softmax,
        sequences=len(schema.sequences),
        gaps=GAP_BUCKETS if schema.time_gaps else 0,
        input_width=model.input_width,
        experts=model.experts,
        expert_hidden=model.expert_hidden,
        tower_hidden=model.tower_hidden,
        feature_gate_rank=model.feature_gate_rank,
        home_without=model.home_without,
        calibrate=model.calibrate,
        error_memory=model.error_memory,
        number_prior=tuple(prior(name) for name in schema.numbers),
        task_prior=tuple(task.prior for task in config.tasks),
        odd_numbers=tuple(range(schema.first_declared, schema.first_declared + 2 * len(schema.declared), 2)),
        after=tuple(schema.tasks.index(task.after) if task.after else -1 for task in config.tasks),
    )


def two_tower(config: Config, schema: Schema) -> TwoTowerSpec:
    """Of a configuration's retrieval towers."""
    return TwoTowerSpec(
        num_shared=len(schema.shared_slots),
        num_item=len(schema.item_fields),
        num_history=schema.num_history_fields,
        dim=config.model.dim,
        tower_dim=config.model.tower_dim,
        temperature=config.model.temperature,
        interests=config.model.interests,
    )
