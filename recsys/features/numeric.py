"""Numbers among features: read from what a field holds, put into buckets, squashed so that one odd value drowns nothing."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt

from recsys.types import Float32


def number_of(value: Any) -> float:
    """A number as it is; NaN for anything else, truth values included."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def time_ms_of(value: Any) -> float:
    """A time in milliseconds: ISO text (without a zone it is UTC) or milliseconds; NaN for anything else."""
    if not isinstance(value, str):
        return number_of(value)
    try:
        when = datetime.fromisoformat(value)
    except ValueError:
        return math.nan
    return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp() * 1000


def bucket_of(value: Any, edges: Sequence[float]) -> str | None:
    """The number of edges at or below a value, as text; None where it is no number."""
    number = number_of(value)
    return None if math.isnan(number) else str(bisect_right(edges, number))


def between(edges: Sequence[float], bucket: str) -> str:
    """A bucket in words."""
    bounds = [f"{edge:g}" for edge in edges]
    number = int(bucket)
    if not 0 < number < len(edges):
        return f"below {bounds[0]}" if not number else f"of {bounds[-1]} or more"
    return f"from {bounds[number - 1]} to {bounds[number]}"


def squashed(values: npt.NDArray[np.float64]) -> Float32:
    """sign(x) log(1 + |x|), and 1 where a value is missing, with 0 for it: [...] -> [..., 2]. The largest float64 becomes 710."""
    known = np.isfinite(values)
    x = np.where(known, values, 0.0)
    return np.stack([np.copysign(np.log1p(np.abs(x)), x), ~known], -1).astype(np.float32)
