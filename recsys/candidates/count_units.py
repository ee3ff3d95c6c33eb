"""What the keys and columns of saved counts mean, and the same counts where the configuration has others, by name.

A counter, half-life or column that is new starts at 0. Legend: H half-lives, W columns, S shared columns.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from recsys.errors import SchemaMismatch
from recsys.features.convert import picked, places
from recsys.features.feature_kernels import mix
from recsys.features.schema import Schema

State = dict[str, dict[str, Any]]
_NEVER = (-(2**63), 0, 0)
"""The clock of a half-life that nothing was counted with."""
logger = logging.getLogger("recsys")


def units(schema: Schema) -> str:
    """What the counted keys and columns mean. Half-lives stand beside their sums: those are converted."""
    layout = schema.counters
    transitions = schema.transition_context if any(name.startswith("follows.") for name in schema.numbers) else None
    counters = layout.slots, layout.columns, len(layout.half_lives_s)
    return orjson.dumps([schema.context, schema.buckets, counters, transitions]).decode()


def converted(state: State, said: str, schema: Schema) -> State:
    """Saved counts whose units were `said`, in those of `schema`. SchemaMismatch where what followed what was told by other context."""
    own = orjson.loads(units(schema))
    if said == orjson.dumps(own).decode():
        layout = schema.counters
        if sorted(state["counters"]["half_lives_s"].tolist()) == sorted(layout.half_lives_s):
            return state
    context, buckets, (slots, columns, _), transitions = orjson.loads(said)
    edges, edges_now = dict(buckets), dict(own[1])
    changed = {name for name in edges.keys() | edges_now.keys() if edges.get(name) != edges_now.get(name)}
    if own[3] is not None and own[3] != transitions:
        raise SchemaMismatch("what follows what was told apart by another context")
    logger.warning("counts of another configuration are carried over by name: what is new starts at 0")
    shared = places(_shared(context, edges), _shared(schema.context, edges_now))
    known = set(schema.counters.columns)
    contexts = dict(state["contexts"])
    contexts["keys"], contexts["masks"] = picked(contexts["keys"], shared), picked(contexts["masks"], shared)
    result = {**state, "counters": _counters(state["counters"], slots, columns, changed, schema), "contexts": contexts}
    if "unseen" in contexts:
        found = orjson.loads(contexts["unseen"].tobytes())
        for counts in found.values():
            _counts(counts, shared, known)
        contexts["unseen"] = np.frombuffer(orjson.dumps(found), np.uint8)
    if "held" in state:
        waiting = orjson.loads(state["held"]["json"].tobytes())
        _counts(waiting, shared, known)
        result["held"] = {"json": np.frombuffer(orjson.dumps(waiting), np.uint8)}
    return result


def _shared(context: Sequence[str], edges: Mapping[str, Sequence[float]]) -> list[str]:
    return ["user", *(f"{name} in {list(edges[name])}" if name in edges else name for name in context)]


def _counts(by_item: dict[str, list[list[Any]]], shared: Any, known: set[str]) -> None:
    """Counts that wait, in place: see `held.Count`."""
    for counts in by_item.values():
        for count in counts:
            count[2] = [value for value in count[2] if value in known]
            if count[3] is not None:
                keys, mask = count[3]
                count[3] = [
                    picked(np.array(keys, np.int64), shared).tolist(),
                    picked(np.array(mask, np.bool_), shared).tolist(),
                ]


def _counters(
    saved: Mapping[str, Any], slots: Any, columns: Sequence[str], changed: set[str], schema: Schema
) -> dict[str, Any]:
    """`changed`: slots whose keys mean something else now."""
    layout = schema.counters
    number = places(layout.slots, [tuple(names) for names in slots])
    keys, counters = saved["keys"].copy(), saved["counters"]
    kept = number[counters] >= 0
    for old, new in enumerate(number.tolist()):
        rows = counters == old
        if not changed.isdisjoint(slots[old]):
            kept &= ~rows
        elif new in (old, -1):
            continue
        elif len(slots[old]) == 1:  # its key is folded from its number and one other key
            keys[rows] = (keys[rows].view(np.uint64) + _folded(new) - _folded(old)).view(np.int64)
        else:
            logger.warning("counter %s lies behind another one now, and is counted anew", "*".join(slots[old]))
            kept &= ~rows
    half_lives = _sources(saved["half_lives_s"].tolist(), layout.half_lives_s)
    sums, at = saved["sums"][kept], places(columns, layout.columns)
    laid = np.zeros((len(sums), len(half_lives), len(at)), np.float32)
    for h, source in enumerate(half_lives):
        if source >= 0:
            laid[:, h][:, at >= 0] = sums[:, source][:, at[at >= 0]]
    return {
        "clocks": np.array([saved["clocks"][s] if s >= 0 else _NEVER for s in half_lives], np.int64).reshape(-1, 3),
        "half_lives_s": np.array(
            [saved["half_lives_s"][s] if s >= 0 else layout.half_lives_s[h] for h, s in enumerate(half_lives)]
        ),
        "keys": keys[kept],
        "owners": saved["owners"][kept],
        "counters": number[counters[kept]].astype(np.int32),
        "sums": laid,
    }


def _folded(counter: int) -> npt.NDArray[np.uint64]:
    return np.array([mix(np.uint64(counter))], np.uint64)


def _sources(before: Sequence[float], after: Sequence[float]) -> list[int]:
    """Which saved half-life each one goes on from: the same, or one that it took the place of; -1: none."""
    gone = [h for h, each in enumerate(before) if each not in after]
    return [before.index(each) if each in before else (gone.pop(0) if gone else -1) for each in after]
