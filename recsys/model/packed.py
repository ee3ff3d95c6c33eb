"""A ranker's weights laid out as the kernels of `score_kernels.py` take them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from recsys.model import score_kernels as kernels
from recsys.model.specs import DICE_EPSILON, NORM_EPSILON, Activation, RankerSpec, hierarchy, reached
from recsys.model.weights import Weights, part
from recsys.types import Float32, Int64

Array = npt.NDArray[Any]
NOTHING = np.zeros(0, np.float32)
ACTIVATIONS: tuple[str, ...] = get_args(Activation)
PARTS = ("norm", "hierarchy", "feature_gate", "self_gate")
"""What may be left out of HoME."""


def unknown(spec: RankerSpec) -> str:
    """What of a network the kernels have no code for; empty: nothing."""
    if spec.activation not in ACTIVATIONS:
        return f"activation {spec.activation!r}"
    return next((f"HoME without {name!r}" for name in spec.home_without if name not in PARTS), "")


def affine(norm: Weights, epsilon: float = NORM_EPSILON) -> Float32:
    """Scale and shift [2, F] (of groups [2, G, F]) of a norm's running statistics, and of what it learned."""
    mean = norm["mean"].squeeze(-2)
    scale = np.float32(1) / np.sqrt(norm["var"].squeeze(-2) + np.float32(epsilon))
    if "gain" not in norm:
        return np.stack([scale, -mean * scale])
    scale = scale * norm["gain"].squeeze(-2)
    return np.stack([scale, norm["bias"].squeeze(-2) - mean * scale])


def attention(spec: RankerSpec, weights: Weights) -> kernels.Attention:
    """Of one sequence; `weights` begin there."""
    if not spec.attention:
        none, sizes = np.zeros((0, 0), np.float32), np.zeros(0, np.int64)
        return kernels.Attention(
            none, none, none, none, none, sizes, np.zeros((3, 0), np.float32), NOTHING, NOTHING, False, False
        )
    layers = range(len(spec.attention))
    return kernels.Attention(
        candidate=weights["candidate"],
        entry=np.ascontiguousarray(weights["entry"].T),
        product=weights["product"],
        rank=weights["rank_bias"],
        gap=weights.get("gap_bias", np.zeros((0, spec.attention[0]), np.float32)),
        widths=np.array(spec.attention, np.int64),
        activations=np.concatenate([_activation(part(weights, f"activations.{layer}.")) for layer in layers], 1),
        weights=_flat(weights[f"weights.{layer}"] for layer in layers),
        biases=_flat(weights[f"biases.{layer}"] for layer in layers),
        prelu=spec.activation == "prelu",
        softmax=spec.softmax,
    )


def _activation(weights: Weights) -> Float32:
    """[3, units]."""
    if "alpha" in weights:
        return np.concatenate([affine(part(weights, "norm."), DICE_EPSILON), weights["alpha"][None]])
    slope = weights["weight"]
    return np.stack([np.ones_like(slope), np.zeros_like(slope), slope])


def home(spec: RankerSpec, weights: Weights) -> tuple[kernels.Level, kernels.Level, kernels.Towers]:
    """Both levels and the towers; `weights` begin there."""
    parts = hierarchy(spec.groups)
    widths = [spec.expert_hidden[-1], *spec.tower_hidden, 1]
    layers = range(len(widths) - 1)
    towers = kernels.Towers(
        category=np.array(parts.category, np.int64),
        widths=np.array(widths, np.int64),
        weights=_flat(weights[f"towers.{layer}.weight"] for layer in layers),
        biases=_flat(weights[f"towers.{layer}.bias"] for layer in layers),
    )
    meta = _level(spec, part(weights, "meta."), np.zeros(len(parts.names), np.int64), parts.meta)
    return meta, _level(spec, part(weights, "task."), np.array(parts.inputs, np.int64), parts.task), towers


def _level(spec: RankerSpec, weights: Weights, pick: Int64, reach: Sequence[Sequence[int]]) -> kernels.Level:
    hidden, each = spec.expert_hidden, spec.experts
    rest, norm = range(len(hidden) - 1), part(weights, "experts.norm.")
    gated = "feature_gate.down" in weights
    none = np.zeros((0, 0, 0), np.float32)
    bare = np.zeros((2, len(pick) * each, hidden[-1]), np.float32)
    bare[0] = 1
    return kernels.Level(
        pick=pick,
        down=weights["feature_gate.down"] if gated else none,
        choice=weights["feature_gate.bias"].ravel() if gated else NOTHING,
        up=weights["feature_gate.up"] if gated else none[None],
        first=weights["experts.first.weight"],
        first_bias=weights["experts.first.bias"][:, 0],
        widths=np.array(hidden, np.int64),
        weights=_flat(weights[f"experts.rest.{layer}.weight"] for layer in rest),
        biases=_flat(weights[f"experts.rest.{layer}.bias"] for layer in rest),
        affine=affine(norm) if norm else bare,
        gate=weights["gate.weight"],
        gate_bias=weights["gate.bias"][:, 0],
        reach=reached(reach, each, spec.home_without),
        own=0 if "self_gate" in spec.home_without else each,
    )


def _flat(arrays: Iterable[Array]) -> Float32:
    return np.concatenate([NOTHING, *(array.ravel() for array in arrays)])
