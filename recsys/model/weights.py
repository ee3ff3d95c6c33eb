"""A network's weights by name, as arrays: what scoring takes, whether a trainer sent them or learns them in this very process.

Names, shapes and types are those of the torch modules' `state_dict`: `tests/unit/test_model_weights.py` holds the two together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy

from recsys.errors import SchemaMismatch
from recsys.model.specs import ATTENTION, MEMORY, RankerSpec, TwoTowerSpec, hierarchy, priors
from recsys.types import Float32

Array = npt.NDArray[Any]
Weights = Mapping[str, Array]
PROJECTIONS = "memory.projections"
"""Beside the weights: drawn from the seed by whoever needs them, and sent to nobody."""


def read(payload: bytes) -> dict[str, Array]:
    """What a trainer sent. Raises SafetensorError, and SchemaMismatch for numbers that no weight is made of."""
    try:
        return safetensors.numpy.load(payload)
    except KeyError as error:
        raise SchemaMismatch(f"weights of type {error}") from None


def part(weights: Weights, prefix: str) -> dict[str, Array]:
    """Those whose names begin so, without that beginning."""
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def fitted(given: Weights, expected: Weights) -> dict[str, Array]:
    """`given` copied, as kernels take it. SchemaMismatch unless names, shapes and types are those of `expected`."""
    drawn = {name: value for name, value in expected.items() if name == PROJECTIONS}
    given = {name: value for name, value in given.items() if name != PROJECTIONS}
    wrong = sorted((expected.keys() - drawn) ^ given.keys()) or sorted(
        name
        for name, value in given.items()
        if value.shape != expected[name].shape or value.dtype != expected[name].dtype
    )
    if wrong:
        raise SchemaMismatch(f"weight {wrong[0]!r} does not fit the configured network")
    return {name: np.array(value, order="C") for name, value in given.items()} | drawn


def of_ranker(spec: RankerSpec, *, seed: int) -> dict[str, Array]:
    """Those of an untrained ranker, as far as anybody sees them: its network adds nothing yet, so that its weights are 0 here."""
    tasks = len(spec.tasks)
    shapes = dict(_ranker_shapes(spec))
    found: dict[str, Array] = {
        name: np.zeros(shape, np.int64 if name.endswith(".rows") else np.float32) for name, shape in shapes.items()
    }
    for name, value in found.items():
        if name.endswith((".var", ".gain")):
            value[...] = 1
    found["bias"] = np.array(priors(spec), np.float32)
    found["number_weights"] = np.repeat(np.array(spec.number_prior, np.float32)[:, None], tasks, 1)
    if spec.calibrate:
        found["calibrator.coefficients"] = np.tile([1.0, 0.0], (tasks, 1))
        found["calibrator.curvature"] = np.zeros((tasks, 2, 2))
    if spec.error_memory:
        arrays, bits = MEMORY
        found["memory.sums"] = np.zeros((arrays, 2**bits, tasks, 3), np.float32)
        found[PROJECTIONS] = _projections(tasks * spec.expert_hidden[-1], seed)
    return found


def _ranker_shapes(spec: RankerSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    entry, numbers = spec.num_history * spec.dim, spec.num_numbers
    for sequence in range(spec.sequences if spec.attention else 0):
        for name, shape in _attention_shapes(spec, entry):
            yield f"attention.{sequence}.{name}", shape
    yield from ((f"number_norm.{name}", shape) for name, shape in _norm_shapes(1, numbers))
    width = (spec.num_shared + spec.num_item) * spec.dim + (1 + spec.sequences) * entry + numbers
    if spec.input_width:
        yield "compress", (width, spec.input_width)
    width = spec.input_width or width
    parts, tasks = hierarchy(spec.groups), len(spec.tasks)
    groups, narrow = len(parts.names), spec.expert_hidden[-1]
    for name, shape in _level_shapes(spec, groups, groups, (width, width)):
        yield f"home.meta.{name}", shape
    for name, shape in _level_shapes(spec, groups + tasks, tasks, (narrow, 2 * narrow)):
        yield f"home.task.{name}", shape
    widths = [narrow, *spec.tower_hidden, 1]
    for layer, (inputs, outputs) in enumerate(zip(widths, widths[1:], strict=False)):
        yield from _layer_shapes(f"home.towers.{layer}", tasks, inputs, outputs)


def _attention_shapes(spec: RankerSpec, entry: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    first = spec.attention[0]
    yield from ((name, (first, entry)) for name in ("candidate", "entry", "product"))
    yield "rank_bias", (spec.history_len, first)
    if spec.gaps:
        yield "gap_bias", (spec.gaps, first)
    widths = [*spec.attention, 1]
    for layer, (inputs, outputs) in enumerate(zip(widths, widths[1:], strict=False)):
        if spec.activation == "dice":
            yield from ((f"activations.{layer}.norm.{name}", shape) for name, shape in _norm_shapes(1, inputs))
            yield f"activations.{layer}.alpha", (inputs,)
        else:
            yield f"activations.{layer}.weight", (inputs,)
        yield f"weights.{layer}", (outputs, inputs)
        yield f"biases.{layer}", (outputs,)


def _level_shapes(
    spec: RankerSpec, groups: int, outputs: int, widths: tuple[int, int]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """`widths`: of a level's input, and of its gates'."""
    width, gate_width = widths
    experts, rank, hidden = spec.experts, spec.feature_gate_rank, spec.expert_hidden
    if "feature_gate" not in spec.home_without:
        yield "feature_gate.down", (groups, width, 2 * rank + 1)
        yield "feature_gate.bias", (groups, 1, 1)
        yield "feature_gate.up", (groups, 2, rank, width)
    yield from _layer_shapes("experts.first", groups, width, experts * hidden[0])
    for layer, (i, o) in enumerate(zip(hidden, hidden[1:], strict=False)):
        yield from _layer_shapes(f"experts.rest.{layer}", groups * experts, i, o)
    if "norm" not in spec.home_without:
        shapes = dict(_norm_shapes(groups * experts, 1, hidden[-1]))
        yield from ((f"experts.norm.{name}", shapes[name]) for name in shapes)
        yield from ((f"experts.norm.{name}", shapes["mean"]) for name in ("gain", "bias"))
    own = 0 if "self_gate" in spec.home_without else experts
    yield from _layer_shapes("gate", outputs, gate_width, groups * experts + own)


def _layer_shapes(name: str, groups: int, inputs: int, outputs: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (groups, inputs, outputs)
    yield f"{name}.bias", (groups, 1, outputs)


def _norm_shapes(*shape: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from (("mean", shape), ("var", shape), ("rows", ()))


def of_towers(spec: TwoTowerSpec, *, seed: int) -> dict[str, Array]:
    """Those of untrained towers, drawn as `TwoTower` draws them."""
    drawn, found = _Drawn(seed), dict[str, Array]()
    entry = spec.num_history * spec.dim
    for tower, inputs in (("user_tower", spec.num_shared * spec.dim + entry), ("item_tower", spec.num_item * spec.dim)):
        widths = [inputs, *spec.hidden, spec.tower_dim]
        pairs = list(zip(widths, widths[1:], strict=False))
        for layer, (i, o) in enumerate(pairs):
            found[f"{tower}.weights.{layer}"] = drawn.uniform((o, i), i)
        for layer, (i, o) in enumerate(pairs):
            found[f"{tower}.biases.{layer}"] = drawn.uniform((o,), 3 * i)
    if spec.interests > 1:
        found["attention"] = drawn.uniform((ATTENTION, entry), entry)
        found["heads"] = drawn.uniform((spec.interests, ATTENTION), ATTENTION)
    return found | {"steps": np.zeros((), np.int64)}


class _Drawn:
    """The numbers that a torch generator of this seed draws on a CPU: both are Mersenne Twisters, begun alike."""

    def __init__(self, seed: int) -> None:
        self._state = np.random.RandomState(seed % 2**32)

    def shares(self, count: int) -> Float32:
        """In [0, 1), of 24 bits each."""
        bits = np.frombuffer(self._state.bytes(4 * count), np.uint32)
        return (bits & np.uint32(2**24 - 1)).astype(np.float32) / np.float32(2**24)

    def uniform(self, shape: tuple[int, ...], fan_in: int) -> Float32:
        """As `layers.uniform`, which rounds once."""
        bound = np.float64(np.float32(math.sqrt(3.0 / fan_in)))
        wide = self.shares(math.prod(shape)).reshape(shape) * (2 * bound) - bound
        return wide.astype(np.float32)


@lru_cache(2)
def _projections(width: int, seed: int) -> Float32:
    """Of `ErrorMemory`: normal numbers [width, arrays bits], made of sixteen uniform ones at a time as torch makes them (Box and Muller)."""
    arrays, bits = MEMORY
    first, second = np.swapaxes(_Drawn(seed).shares(width * arrays * bits).reshape(-1, 2, 8), 0, 1)
    radius, angle = np.sqrt(-2 * np.log1p(-first)), np.float32(2 * math.pi) * second
    found = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)
    return found.astype(np.float32).reshape(width, arrays * bits)
