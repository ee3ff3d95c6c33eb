"""What the ranker predicts: tasks, chains of them, and quantities made of several."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A frozen part of the configuration."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class TaskConfig(Section):
    """One thing the ranker predicts."""

    name: str
    """Key of `predictions`."""
    types: tuple[str, ...]
    """Feedback types that make the label 1."""
    min_value: float | None = None
    """Feedback counts only from this `value` on."""
    buckets: tuple[float, ...] = ()
    """Predict how large `value` is, such as seconds watched: one label for each of these rising bounds, each chained on the one
    before; their tasks are called `name>bound`, and `name` in `ranking.value` is the expected value."""
    after: str = ""
    """A task named before this one without which this one does not happen: the prediction is that task's times this one's share of it."""
    group: str = "inter"
    """HoME category: tasks of one group share level-2 experts."""
    window_s: float = Field(60.0, ge=0)
    """The label is final this long after the impression; 0: at once."""
    labels: Literal["window", "early_positive", "fnw", "es_dfm"] = "window"
    """Learn when the window closes; or positives when they come; or all as negative at once and positives again, weighted (fnw),
    or so after `wait_s`, with two helper tasks (es_dfm)."""
    wait_s: float = Field(0.0, ge=0)
    """fnw, es_dfm: labels are first learned this long after the impression."""
    weight: float = 1.0
    """Weight of the task in the score that ranks."""
    loss: Literal["binary", "softmax"] = "binary"
    """`softmax`: which item of a request it happens to, not how likely it is: for requests that end with one choice."""
    loss_weight: float = Field(1.0, ge=0)
    """Weight of the task in the loss."""
    prior: float = Field(0.05, gt=0, lt=1)
    """Rate assumed before anything is learned."""


LATE, NEVER = "~late", "~never"
"""Ends of the names of an es_dfm task's helpers."""
_NEXT_PRIOR = 0.6
"""Assumed share of those over one bound that are over the next, too, before anything is learned."""


def expanded(raw: Sequence[Any]) -> list[Any]:
    """The tasks as parsed, each with `buckets` replaced by its chain of binary ones, and the helpers of es_dfm behind.
    ValueError names what is wrong."""
    for task in raw:
        _check_numbers(task)
    tasks = [one for task in raw for one in (_chain(task) if isinstance(task, Mapping) else [task])]
    names = [task["name"] for task in tasks if isinstance(task, Mapping) and "name" in task]
    for task in list(tasks):
        if isinstance(task, Mapping) and task.get("labels") == "es_dfm" and f"{task.get('name')}{LATE}" not in names:
            rest = {key: task[key] for key in ("group", "window_s", "loss_weight") if key in task}
            for end, prior in ((LATE, task.get("prior", 0.05) / 2), (NEVER, 0.98)):
                tasks.append({"name": f"{task.get('name')}{end}", "types": (), "weight": 0.0, "prior": prior, **rest})
    return tasks


def _check_numbers(task: Any) -> None:
    """What a task is expanded by, before its own types are checked."""
    if not isinstance(task, Mapping) or not (task.get("buckets") or task.get("labels") == "es_dfm"):
        return
    name, bounds = task.get("name", ""), task.get("buckets") or []
    if not isinstance(name, str):
        raise ValueError(f"tasks: a name must be text, got {name!r}")
    if not isinstance(bounds, Sequence) or not all(isinstance(bound, int | float) for bound in bounds):
        raise ValueError(f"tasks: buckets of {name!r} must be a list of numbers, got {bounds!r}")
    for key in ("prior", "weight"):
        if not isinstance(value := task.get(key, 1.0), int | float):
            raise ValueError(f"tasks: {key} of {name!r} must be a number, got {value!r}")


def _chain(task: Mapping[str, Any]) -> list[Any]:
    """A task with `buckets` as a chain of binary ones; another as it is."""
    bounds, name = task.get("buckets"), task.get("name", "")
    if not bounds:
        return [task]
    if list(bounds) != sorted(set(bounds)) or min(bounds) <= 0:
        raise ValueError(f"tasks: buckets of {name!r} must rise from above 0, got {list(bounds)}")
    if task.get("min_value") is not None:
        raise ValueError(f"tasks: {name!r} has buckets and min_value: drop min_value, the first bucket takes its place")
    names, steps = [f"{name}>{bound:g}" for bound in bounds], _steps(bounds)
    rest = {key: value for key, value in task.items() if key != "buckets"}
    return [
        rest
        | {
            "name": names[place],
            "min_value": bound,
            "after": names[place - 1] if place else task.get("after", ""),
            "weight": task.get("weight", 1.0) * steps[place],
            "prior": task.get("prior", 0.05) * _NEXT_PRIOR**place,
        }
        for place, bound in enumerate(bounds)
    ]


def _steps(bounds: Sequence[float]) -> list[float]:
    """What passing each bound adds to the expected value: a bucket stands for its middle, the last one for its bound."""
    middles = [0.0, *((a + b) / 2 for a, b in itertools.pairwise(bounds)), bounds[-1]]
    return [b - a for a, b in itertools.pairwise(middles)]


def quantities(tasks: Sequence[TaskConfig]) -> dict[str, dict[str, float]]:
    """Expected values by name: each the sum of its tasks' probabilities times these steps."""
    bounds: dict[str, dict[str, float]] = {}
    for task in tasks:
        name, over, _ = task.name.partition(">")
        if over and task.min_value is not None:
            bounds.setdefault(name, {})[task.name] = task.min_value
    return {name: dict(zip(parts, _steps(list(parts.values())), strict=True)) for name, parts in bounds.items()}


def check(tasks: Sequence[TaskConfig]) -> None:
    """ValueError when names repeat or a chain does not lead to an earlier, more frequent task."""
    names = [task.name for task in tasks]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"tasks must have distinct names and be at least one, got {names}")
    for task in tasks:
        if task.labels in ("fnw", "es_dfm") and task.wait_s >= max(task.window_s, 1e-3):
            raise ValueError(f"tasks: wait_s of {task.name!r} must be below its window_s, {task.window_s:g}")
    for place, task in enumerate(tasks):
        if not task.after:
            continue
        if task.after not in names[:place]:
            raise ValueError(
                f"tasks: {task.name!r} is after {task.after!r}, which must be a task named before it: {names[:place]}"
            )
        if task.prior >= tasks[names.index(task.after)].prior:
            raise ValueError(
                f"tasks: the prior of {task.name!r} must be below that of {task.after!r}, which it is after"
            )
