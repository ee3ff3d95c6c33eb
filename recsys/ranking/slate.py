"""The slate, filled from the top, one position at a time, each choice with its probability given the items above it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """One position drawn at random from the best of what remains."""

    position: int
    """From 1; 0: every position takes the best."""
    pool: int
    temperature: float
    floor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One filled position: the candidate's index and the probability of choosing it; a drawn position keeps its pool."""

    candidate: int
    propensity: float
    pool: tuple[tuple[int, float], ...] | None = None


def fill(scores: Float64, n: int, request_id: str, draw: Draw) -> list[Choice]:
    """The best `n` of K candidates by score [K], ties by index, with one position drawn from the best remaining `pool`.

    The draw is seeded by the request id alone: filling again gives the same slate. Its probabilities are
    floor + (1 - size·floor)·softmax(score / temperature), so each is at least the floor and they sum to 1.
    """
    order = np.argsort(-scores, kind="stable")[: n + draw.pool].tolist()
    choices: list[Choice] = []
    while order and len(choices) < n:
        if len(choices) + 1 != draw.position or len(order) == 1:
            choices.append(Choice(candidate=order.pop(0), propensity=1.0))
            continue
        pool = order[: draw.pool]
        probabilities = draw_probabilities(scores[pool], draw)
        generator = np.random.default_rng(
            int.from_bytes(hashlib.blake2b(request_id.encode(), digest_size=8).digest(), "little")
        )
        drawn = int(generator.choice(len(pool), p=probabilities))
        choices.append(
            Choice(
                candidate=order.pop(drawn),
                propensity=float(probabilities[drawn]),
                pool=tuple(zip(pool, probabilities.tolist(), strict=True)),
            )
        )
    return choices


def draw_probabilities(scores: Float64, draw: Draw) -> Float64:
    """Probabilities of a pool's candidates, in order."""
    logits = (scores - scores.max()) / draw.temperature
    weights = np.exp(logits)
    mixed: Float64 = draw.floor + (1.0 - len(scores) * draw.floor) * weights / weights.sum()
    return mixed / mixed.sum()
