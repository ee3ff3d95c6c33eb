"""Generated unit vectors to search: around centres, or with no structure at all."""

from __future__ import annotations

import numpy as np

from recsys.types import Float32


def clustered(
    count: int, dim: int = 32, *, centres: int = 2000, spread: float = 0.5, unit_centres: bool = False, seed: int = 0
) -> Float32:
    """Vectors [count, dim]: a normal centre each (`unit_centres`: of length 1), plus `spread` times normal noise in each coordinate.

    Around unit centres the noise is longer than what it is added to: hardly anything of the clusters is left.
    """
    generator = np.random.default_rng(seed)
    middle = generator.standard_normal((centres, dim), np.float32)
    if unit_centres:
        middle = _unit(middle)
    vectors = generator.standard_normal((count, dim), np.float32)
    vectors *= np.float32(spread)
    vectors += middle[generator.integers(centres, size=count)]
    return _unit(vectors)


def uniform(count: int, dim: int = 32, *, seed: int = 0) -> Float32:
    """Vectors [count, dim] of any direction: the hardest to search, there is nothing to learn about where they lie."""
    return _unit(np.random.default_rng(seed).standard_normal((count, dim), np.float32))


def near(vectors: Float32, count: int, *, noise: float = 0.1, seed: int = 0) -> Float32:
    """Queries [count, dim]: vectors drawn at random plus `noise` times normal noise in each coordinate."""
    generator = np.random.default_rng(seed)
    drawn = vectors[generator.integers(len(vectors), size=count)]
    return _unit(drawn + np.float32(noise) * generator.standard_normal(drawn.shape, np.float32))


def _unit(vectors: Float32) -> Float32:
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors
