"""From predictions to the value that ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from recsys.config import Config
from recsys.config.formula import formula
from recsys.types import Float32

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "number": np.float64,
    "log": np.log,
    "exp": np.exp,
    "sqrt": np.sqrt,
    "min": np.minimum,
    "max": np.maximum,
}


class Value:
    """Combines the tasks' predictions: by `ranking.value`, or as the sum weighted by `tasks.weight`."""

    def __init__(self, config: Config) -> None:
        self._weights = np.array([task.weight for task in config.tasks])
        self._names = [task.name for task in config.tasks]
        self._quantities = config.quantities
        self._formula = formula(config.ranking.value, config.value_names) if config.ranking.value else None

    def __call__(self, predictions: Float32) -> npt.NDArray[np.float64]:
        """Predictions [K, T] to values [K]; what is not finite (a logarithm or a division by 0) counts as 0."""
        exact = predictions.astype(np.float64)
        if self._formula is None:
            return exact @ self._weights
        values = dict(zip(self._names, exact.T, strict=True))
        for name, parts in self._quantities.items():
            values[name] = sum(step * values[part] for part, step in parts.items())
        with np.errstate(all="ignore"):
            result = np.broadcast_to(self._formula(values, _FUNCTIONS), len(exact)).astype(np.float64)
        return np.where(np.isfinite(result), result, 0.0)
