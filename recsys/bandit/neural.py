"""A regression on the ranker's last hidden layer, learned online (after NeuCB: Contextual Bandits with Online Neural Regression, ICLR 2024).

Legend: M candidates, N events, H width of the layer, S draws of a perturbation.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from recsys.bandit.base import Events, Requests, needed
from recsys.types import Float32

DRAWS = 2
"""Perturbations a prediction is averaged over: half is noisier by √2, double costs twice."""


class LastLayer:
    """p = sigmoid(h · θ), perturbed by c Σ (θ - θ₀)ⱼ εⱼ / H^¼, ε = ±1, averaged over draws: what makes its loss strongly convex.

    θ steps down the log-loss and is projected to the ball of `radius` around its start θ₀ [H + 1] (the ranker's own last
    layer; zeros where there is none; the last is a bias). The gradient (p - r) h falls apart into a part of the impression and a part of the
    reward, so a late reward needs no memory of its impression but h.
    """

    def __init__(self, start: Float32, rate: float = 0.05, radius: float = 20.0, perturbation: float = 0.01) -> None:
        self._start: np.ndarray[Any, np.dtype[np.float64]] = np.array(start, np.float64)
        self._theta = self._start.copy()
        self._squares = np.ones(len(start))
        self._rate, self._radius, self._perturbation = rate, radius, perturbation

    def of(self, requests: Requests, rng: np.random.Generator) -> tuple[Float32, None]:
        hidden = needed(requests.hidden, "the last hidden layer", "neural")
        logits = hidden @ self._theta[:-1].astype(np.float32) + np.float32(self._theta[-1])
        moved = ((self._theta - self._start) * self._perturbation / len(self._theta) ** 0.25).astype(np.float32)
        signs = rng.integers(0, 2, (DRAWS, len(moved), len(logits)), np.int8).astype(np.float32) * 2 - 1
        shaken = _sigmoid(logits) + np.einsum("sjm,j->sm", signs, moved).mean(0)
        return shaken.astype(np.float32), None

    def learn(self, events: Events) -> None:
        hidden = np.asarray(needed(events.hidden, "the last hidden layer", "neural"), np.float64)
        features = np.concatenate([hidden, np.ones((len(hidden), 1))], 1)
        for h, shown, reward in zip(features, events.impressions.tolist(), events.rewards.tolist(), strict=True):
            gradient = (shown / (1.0 + np.exp(-np.clip(h @ self._theta, -30, 30))) - reward) * h
            self._squares += gradient**2
            self._theta -= self._rate * gradient / np.sqrt(self._squares)
            moved = self._theta - self._start
            if (distance := float(np.linalg.norm(moved))) > self._radius:
                self._theta[:] = self._start + moved * (self._radius / distance)


def _sigmoid(logits: Float32) -> Float32:
    return np.asarray(1 / (1 + np.exp(-np.clip(logits, -30, 30))), np.float32)
