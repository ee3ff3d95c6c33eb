"""One optimiser step of a row of the oracle, in plain loops and float64."""

from __future__ import annotations

import math

from recsys.table.base import Segment
from recsys.types import Float32


def moved(segment: Segment, values: Float32, state: Float32, gradient: list[float]) -> list[float]:
    """New values of one segment of a row; `state` is changed in place. Formulas: see `optimizers.py`."""
    width, rate, old = segment.dim, segment.learning_rate, [float(w) for w in values]
    if segment.optimizer == "sgd":
        return [w - rate * g for w, g in zip(old, gradient, strict=True)]
    if segment.optimizer == "rowwise_adagrad":
        total = float(state[0]) + sum(g * g for g in gradient) / width
        state[0] = total
        rate /= math.sqrt(total) + segment.epsilon
        return [w - rate * g for w, g in zip(old, gradient, strict=True)]
    if segment.optimizer == "adagrad":
        totals = [float(s) + g * g for s, g in zip(state, gradient, strict=True)]
        state[:] = totals
        return [w - rate / (math.sqrt(s) + segment.epsilon) * g for w, s, g in zip(old, totals, gradient, strict=True)]
    if segment.optimizer == "adam":
        b1, b2, steps = segment.beta1, segment.beta2, float(state[-1]) + 1
        means = [b1 * float(m) + (1 - b1) * g for m, g in zip(state[:width], gradient, strict=True)]
        squares = [b2 * float(v) + (1 - b2) * g * g for v, g in zip(state[width:], gradient, strict=False)]
        state[:] = [*means, *squares, steps]
        first, second = 1 - math.pow(b1, steps), 1 - math.pow(b2, steps)
        return [
            w - rate * (m / first) / (math.sqrt(v / second) + segment.epsilon)
            for w, m, v in zip(old, means, squares, strict=True)
        ]
    moved = []
    for d, (w, g) in enumerate(zip(old, gradient, strict=True)):
        before = float(state[width + d])
        after = before + g * g
        z = float(state[d]) + g - (math.sqrt(after) - math.sqrt(before)) / rate * w
        state[d], state[width + d] = z, after
        pull = (segment.beta + math.sqrt(after)) / rate + segment.l2
        moved.append(0.0 if abs(z) <= segment.l1 else -(z - math.copysign(segment.l1, z)) / pull)
    return moved
