"""Learning from positives that come late: what to wait for, and how to weigh what was learned too early.

Policies of a task (`tasks.labels`): `window` waits until the label is final. `early_positive` emits a positive when it comes
and the negatives at the window's end: soonest, but inflates whatever is growing. `fnw` (Ktena et al. 2019) emits everything
as negative at once and a positive again when it comes; `es_dfm` (Yang et al. 2021) does so after `wait_s`, with two helper
tasks. Both weigh each label by p / q, the true over the observed distribution, so that the expected gradient vanishes at the
true probability.

Legend: M examples, T tasks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from recsys.config import TaskConfig
from recsys.config.tasks import LATE, NEVER

WAITS = ("fnw", "es_dfm")
"""Policies whose regular emission comes `wait_s` after the impression, before the label is final."""


def helpers(tasks: Sequence[TaskConfig]) -> list[tuple[int, int, int]]:
    """Of each task with `es_dfm`: its place, and those of its helpers: P(positive after the wait) and P(never | not yet)."""
    names = [task.name for task in tasks]
    return [
        (place, names.index(task.name + LATE), names.index(task.name + NEVER))
        for place, task in enumerate(tasks)
        if task.labels == "es_dfm"
    ]


class Importance:
    """Weights of labels, by each task's policy."""

    def __init__(self, tasks: Sequence[TaskConfig]) -> None:
        self._base = torch.tensor([task.loss_weight for task in tasks])
        self._fnw = [place for place, task in enumerate(tasks) if task.labels == "fnw"]
        self._helpers = helpers(tasks)

    def weights(self, probabilities: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Weights [M, T] for observed labels [M, T], given today's predictions [M, T]; no gradient flows through them.

        fnw: y (1 + f) and (1 - y) (1 - f) (1 + f). es_dfm: y (1 + f_late) and (1 - y) (1 + f_late) f_never.
        """
        weights = self._base.repeat(len(labels), 1)
        if not self._fnw and not self._helpers:
            return weights
        p = probabilities.detach()
        for task in self._fnw:
            f = p[:, task]
            weights[:, task] *= torch.where(labels[:, task] > 0, 1 + f, (1 - f) * (1 + f))
        for task, late, never in self._helpers:
            weights[:, task] *= (1 + p[:, late]) * torch.where(labels[:, task] > 0, 1.0, p[:, never])
        return weights
