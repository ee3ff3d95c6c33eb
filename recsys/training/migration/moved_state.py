"""The trainer's small state under another configuration: labels by the names of their tasks, open impressions in the new features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from recsys.config import Config
from recsys.features.convert import Conversion, places
from recsys.features.schema import Schema
from recsys.training.guard import Guard
from recsys.training.joiner import Joiner
from recsys.training.migration.made_of import MOST_EARLIER, describe, schemas
from recsys.training.opened import restored
from recsys.types import Bool


def moved_state(small: Mapping[str, Any], old: Config, new: Config, folder: Path) -> dict[str, Any]:
    """What `Trainer.small_state` returned. Features of open impressions are written anew into the files in `folder`, behind what
    is there: the state that they came from stays as it is."""
    joiner = Joiner(new.tasks, folder, new.capacity.memory_bytes)
    joiner.restore({**small["joiner"], "open": _opened(small["joiner"]["open"], old, new)})
    joiner.convert(Conversion(Schema.of(old), Schema.of(new)).encoded)
    guard = Guard(new)
    if "guard" in small:
        guard.restore(small["guard"])
    state = {
        **small,
        "guard": guard.state(),
        "joiner": joiner.state(),
        "waiting": {"labels": joiner.emitter.waiting(), "held": len(joiner.held)},
        "ledger": {**small["ledger"], "labels": {t.name: small["ledger"]["labels"].get(t.name, {}) for t in new.tasks}},
        "towers": _towers(small, new),
    }
    if earlier := _earlier(small.get("earlier", []), old, new):
        state["earlier"] = earlier
    if old.tasks[0].name != new.tasks[0].name:  # what it judges by was another task's
        state["breaker"] = {**small["breaker"], "labels": [], "seconds": []}
    joiner.spill.close()
    return state


def _towers(small: Mapping[str, Any], new: Config) -> Any:
    return (small["towers"] or {"steps": 0}) if new.training.two_tower else None


def _earlier(known: Sequence[Mapping[str, Any]], old: Config, new: Config) -> list[Mapping[str, Any]]:
    """Slot lists that impressions may still be written with, the newest last, each once."""
    found = {hashed: said for said in (*known, describe(old)) for hashed in schemas([said], new)}
    found.pop(Schema.of(new).hash, None)
    return list(found.values())[-MOST_EARLIER:]


def _opened(states: Sequence[Sequence[Any]], old: Config, new: Config) -> list[list[Any]]:
    """Open impressions, with a column of labels for each task of now. Of a task that is new they have none: what users did before it
    was not looked at."""
    at = places([task.name for task in old.tasks], [task.name for task in new.tasks])
    found = []
    for state in states:
        request_id, opened = restored(state, len(old.tasks))
        labels, observed, known = (_columns(each, at) for each in (opened.labels, opened.observed, opened.followed))
        predictions = np.full((len(opened.items), len(at)), np.nan, np.float32)
        predictions[:, at >= 0] = opened.predictions[:, at[at >= 0]]
        moved = replace(opened, labels=labels, observed=observed, followed=known, predictions=predictions)
        found.append(moved.state(request_id))
    return found


def _columns(labels: Bool, at: Any) -> Bool:
    found = np.zeros((*labels.shape[:-1], len(at)), np.bool_)
    found[..., at >= 0] = labels[..., at[at >= 0]]
    return found
