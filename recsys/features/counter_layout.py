"""What the configuration declares to be counted: the columns of the counters, and the numbers made from them.

Legend: C counters (the first, (), counts everything), H half-lives, W columns, R ratios, N numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from recsys.config import Config
from recsys.types import Bool, Int32

_ELSEWHERE_PRIOR = 0.1
"""Share of a type in the first of `elsewhere_types` before anything is counted; a thousand events later it is forgotten."""


@dataclass(frozen=True, kw_only=True)
class CounterLayout:
    """Which counters exist, and which of their values are numbers."""

    slots: tuple[tuple[str, ...], ...]
    half_lives_s: tuple[float, ...]
    columns: tuple[str, ...]
    """shown, positives of each task, events, later ones; elsewhere: each type, each but the first where it follows the first"""
    ratios: tuple[tuple[int, int, float], ...]
    """(column of the part, column of the whole, share assumed before anything is counted)"""
    smoothing: float
    numbers: tuple[tuple[str, int, int, int, int], ...]
    """(name, counter, half-life, ratio or -1, column to count)"""

    @classmethod
    def of(cls, config: Config) -> CounterLayout:
        """As the configuration declares."""
        features, tasks = config.features, config.tasks
        events = 1 + len(tasks)
        elsewhere, types = events + 2, features.elsewhere_types
        ratios = [(1 + index, 0, task.prior) for index, task in enumerate(tasks)]
        ratios.append((events + 1, events, 0.5))
        others = range(elsewhere + 1, elsewhere + len(types))
        ratios += [(column + len(others), elsewhere, _ELSEWHERE_PRIOR) for column in others]
        columns = (
            "shown",
            *(f"positive {task.name}" for task in tasks),
            *("events", "later"),
            *(f"elsewhere {kind}" for kind in types),
            *(f"followed {kind}" for kind in types[1:]),
        )
        wholes = {"shown": 0, "events": events, "elsewhere": elsewhere}
        half_lives = tuple(sorted({h for counter in features.counters for h in counter.half_lives_s}))
        slots = ((), *dict.fromkeys(counter.of for counter in features.counters))
        numbers = []
        for counter in features.counters:
            index = slots.index(counter.of)
            for half_life in counter.half_lives_s:
                at, h = f"{'*'.join(counter.of)}.{half_life:g}", half_lives.index(half_life)
                for value in counter.values:
                    whole = wholes[value]
                    for column in (whole, *(others if value == "elsewhere" else ())):
                        numbers.append((f"count.{at}.{columns[column]}", index, h, -1, column))
                    for ratio, (part, of, _) in enumerate(ratios):
                        if of == whole:
                            numbers.append((f"rate.{at}.{columns[part]}", index, h, ratio, whole))
        return cls(
            slots=slots,
            half_lives_s=half_lives,
            columns=columns,
            ratios=tuple(ratios),
            smoothing=features.counter_smoothing,
            numbers=tuple(numbers),
        )

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, *_ in self.numbers)

    @cached_property
    def spec(self) -> Int32:
        """Counter, half-life, ratio or -1, and column to count of each number [N, 4]."""
        return np.array([number[1:] for number in self.numbers], np.int32).reshape(-1, 4)

    @cached_property
    def parents(self) -> Int32:
        """The counter whose rate each leans on [C]: the longest listed beginning of its slots; of the first: itself."""
        return np.array([self.slots.index(_beginning(self.slots, names)) for names in self.slots], np.int32)

    @cached_property
    def order(self) -> Int32:
        """Counters, each after its parent [C]."""
        return np.array(sorted(range(len(self.slots)), key=lambda c: len(self.slots[c])), np.int32)

    @cached_property
    def parts(self) -> Int32:
        """Columns of part and whole of each ratio [R, 2]."""
        return np.array([ratio[:2] for ratio in self.ratios], np.int32)

    @cached_property
    def priors(self) -> npt.NDArray[np.float64]:
        """Share of each ratio before anything is counted [R]."""
        return np.array([ratio[2] for ratio in self.ratios])

    @cached_property
    def of_users(self) -> Bool:
        """Counters that are one user's own [C]."""
        return np.array(["user" in names for names in self.slots])


def _beginning(slots: tuple[tuple[str, ...], ...], names: tuple[str, ...]) -> tuple[str, ...]:
    return max((c for c in slots if len(c) < len(names) and c == names[: len(c)]), key=len, default=())
