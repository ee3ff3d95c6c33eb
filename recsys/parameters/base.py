"""The seam through which ranking gets parameters, and what a reply says of itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from recsys.model.plan import Block
from recsys.parameters.deltas import Version
from recsys.types import Float32


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterState:
    """What a reply contains: the newest delta's version, what it covers, and the newest dense weights (0: none yet)."""

    version: Version = Version()
    covers_ms: int = 0
    dense_version: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """Rows [N, D] of each block asked for, in order."""

    values: tuple[Float32, ...]
    state: ParameterState
    current: bool = True
    """Whether somebody keeps the rows up to date; else they are the last ones of a process that is away."""


class Parameters(Protocol):
    """Where ranking gets parameters from. Thread-safe. Raises ParametersUnavailable when they cannot be had in time."""

    def lookup(self, blocks: Sequence[Block]) -> Reply: ...

    def dense(self) -> tuple[int, bytes]:
        """The newest dense weights: (dense_version, safetensors buffer); (0, b"") before the first."""
        ...
