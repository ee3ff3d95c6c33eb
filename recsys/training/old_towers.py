"""The towers' state as releases before this one wrote it: as JSON, items named by their row in the catalogue of that process.

A row of that catalogue is the number of an item's first upsert. It can be told from the log only if the log still holds every
record: `first_upserts`. Otherwise what rows were kept for (waiting positives, items last shown) is dropped, aloud.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recsys.errors import BadInput
from recsys.events import messages
from recsys.features.build import shared_columns
from recsys.features.catalogue import Catalogue
from recsys.features.schema import Schema
from recsys.keys import key_of
from recsys.training.positives import Positive
from recsys.training.tower_users import TowerUsers
from recsys.types import Record

logger = logging.getLogger("recsys")


def first_upserts(records: Sequence[Record]) -> list[str] | None:
    """The items of topic `item` in order of their first upsert; None when records are missing, so that it cannot be known."""
    if [record.offset for record in records] != list(range(len(records))):
        return None
    found: dict[str, None] = {}
    for record in records:
        try:
            item = messages.parse_item(record.value, key=record.key)
        except BadInput:
            continue
        if not item.deleted:
            found.setdefault(item.item_id)
    return list(found)


def restore_users(users: TowerUsers, state: Mapping[str, Any], ids: Sequence[str] | None, schema: Schema) -> None:
    """Users from the old state; `ids`: which item each row was, None where that is not known."""
    past = set(users.types)
    for name, events, shown, request_id, context in state["users"]:
        user = users.of(key_of(name))
        for item, kind in events:
            if kind in past:
                users.happened(user, key_of(item), kind)
        user.request = key_of(request_id)
        shared_keys, shared_mask = shared_columns(schema, name, context)
        user.shared_keys, user.shared_mask = array("q", shared_keys.tobytes()), shared_mask.tobytes()
        if ids is not None:
            user.shown = array("q", (key_of(ids[row]) for row in shown))
    if ids is None:
        logger.warning(
            "the checkpoint names items by row, and the log of items was compacted since: %d waiting positives of the towers and the items "
            "last shown to %d users are not learned from; all else is carried over",
            len(state["positives"]),
            len(state["users"]),
        )


def restored_positives(
    state: Mapping[str, Any], ids: Sequence[str] | None, schema: Schema, catalogue: Catalogue
) -> list[Positive]:
    """Waiting positives of the old state, with the columns that their items have now."""
    width, found = len(schema.history_slots), []
    for row, passed, shared_keys, shared_mask, history_keys, history_mask, *_ in state["positives"] if ids else ():
        rows = catalogue.rows([ids[old] for old in (row, *passed)]) if ids else np.zeros(0, np.int32)
        if rows[0] < 0:
            continue
        rows = rows[rows >= 0]
        found.append(
            Positive(
                shared_keys=np.array(shared_keys, np.int64),
                shared_mask=np.array(shared_mask, np.bool_),
                history_keys=np.array(history_keys, np.int64).reshape(-1, width),
                history_mask=np.array(history_mask, np.bool_).reshape(-1, width),
                keys=catalogue.keys[rows],
                mask=catalogue.mask[rows],
            )
        )
    return found
