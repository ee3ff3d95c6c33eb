"""Why an item is shown, in one short sentence."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from recsys.candidates.base import Reason
from recsys.features.build import UserFeatures
from recsys.features.catalogue import Catalogue
from recsys.features.schema import Schema
from recsys.types import Int32

_SHARED = 80
"""Weight of a value that item and history share: a source may say something more of the user, see `Source.reason`."""
_RECENT = 5
"""Events of the history that an item is compared with."""


class Reasons:
    """Explains shown items from their sources and from what the user's recent history shares with them."""

    def __init__(self, schema: Schema, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._fields = [name for name, _ in schema.item_fields[1 : schema.num_history_fields]]

    def of(self, told: Iterable[Reason], shared: str) -> str:
        """The reason that says most of the user: their sources', or the value that the item shares with what they chose ("": none)."""
        best = max(told, default=Reason(0, "new"))
        return f"you recently chose {shared}" if shared and best.weight < _SHARED else best.text

    def shared(self, rows: Int32, user: UserFeatures | None) -> list[str]:
        """For each item at `rows` the newest value of the history that it has, too; "" where there is none, or nothing is known."""
        found = [""] * len(rows)
        if user is None or not len(user.history_keys):
            return found
        for name in self._fields:
            where = self._catalogue.columns(name)
            chosen = user.history_keys[:_RECENT, where][user.history_mask[:_RECENT, where]]
            keys, mask = self._catalogue.keys[rows, where], self._catalogue.mask[rows, where]
            has = ((keys[:, :, None] == chosen) & mask[:, :, None]).any(1)
            for place, which in zip(*map(np.ndarray.tolist, np.nonzero(has)), strict=True):
                if not found[place] and (label := self._catalogue.labels.get(name, int(chosen[which]))) is not None:
                    found[place] = f"{name} {label}"
        return found
