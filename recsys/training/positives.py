"""Positives of the towers that wait until there are enough for a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from recsys.features.schema import Schema
from recsys.types import Bool, Int64


@dataclass(frozen=True, slots=True)
class Positive:
    """A user as of the feedback, and the columns of its item [1 + P, I] above those of P items shown before and passed over.

    Columns, not rows or ids: what is learned does not depend on what becomes of the catalogue while the batch fills.
    """

    shared_keys: Int64
    shared_mask: Bool
    history_keys: Int64
    history_mask: Bool
    keys: Int64
    mask: Bool


def positives_state(positives: Sequence[Positive], schema: Schema) -> dict[str, npt.NDArray[Any]]:
    """Waiting positives, as arrays."""
    state: dict[str, npt.NDArray[Any]] = {
        "sizes": np.array([(len(p.history_keys), len(p.keys)) for p in positives], np.int64).reshape(-1, 2)
    }
    for name, kind, width in _columns(schema):
        rows = [np.atleast_2d(getattr(p, name)) for p in positives if getattr(p, name).size]
        state[name] = np.concatenate([np.zeros((0, width), kind), *rows])
    return state


def positives_of(state: Mapping[str, npt.NDArray[Any]], schema: Schema) -> list[Positive]:
    """What `positives_state` wrote."""
    of_history, of_items = state["sizes"].cumsum(0).T
    ends = {"shared": np.arange(1, len(state["sizes"]) + 1), "history": of_history, "": of_items}
    columns = {
        name: np.split(state[name].astype(kind), ends[name.rpartition("_")[0]][:-1])
        for name, kind, _ in _columns(schema)
    }
    found = []
    for number in range(len(state["sizes"])):
        one = {name: parts[number] for name, parts in columns.items()}
        one["shared_keys"], one["shared_mask"] = one["shared_keys"][0], one["shared_mask"][0]
        found.append(Positive(**one))
    return found


def _columns(schema: Schema) -> list[tuple[str, type[np.generic], int]]:
    """Name, type and width of each array of a positive."""
    slots = {"shared_": schema.shared_slots, "history_": schema.history_slots, "": schema.item_slots}
    return [
        (prefix + name, kind, len(found))
        for prefix, found in slots.items()
        for name, kind in (("keys", np.int64), ("mask", np.bool_))
    ]
