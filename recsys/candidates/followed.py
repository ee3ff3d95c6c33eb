"""The source `followed`: the best items of the attribute values that the user engaged with."""

from __future__ import annotations

import numpy as np

from recsys.candidates.base import Asked, Counted, Listing, Parts, Reason, Source
from recsys.features.build import UserFeatures
from recsys.retrieval.shared_attributes import Followed, warm_up
from recsys.types import Float32, Int32, Int64

_NEWEST = 10
"""Events of the history whose values are followed: half forgets what came before the running session, double blurs it."""


class FollowedSource(Source):
    """An index of the items by their attributes. It saves nothing: the catalogue and what trends tell it all."""

    name = "followed"
    prior = 3.0
    needs_user = True

    def __init__(self, parts: Parts) -> None:
        self._catalogue, self._decay = parts.catalogue, parts.config.features.affinity_decay
        fields = parts.schema.item_fields[1 : parts.schema.num_history_fields]
        self._columns = [parts.catalogue.columns(name) for name, _ in fields]
        self.index = Followed()
        warm_up()

    def candidates(self, asked: Asked, quota: int) -> Listing:
        if asked.user is None:
            return self.index.query((), quota)
        return self.index.query(self._weights(asked.user), quota, asked.allowed, asked.left_out)

    def _weights(self, user: UserFeatures) -> list[tuple[int, int, float]]:
        """(attribute, key, weight) of the newest history events, recent ones heavier."""
        weights: dict[tuple[int, int], float] = {}
        newest = zip(user.history_keys[:_NEWEST].tolist(), user.history_mask[:_NEWEST].tolist(), strict=True)
        for age, (keys, mask) in enumerate(newest):
            share = self._decay**age
            for attribute, where in enumerate(self._columns):
                for key, present in zip(keys[where], mask[where], strict=True):
                    if present:
                        weights[attribute, key] = weights.get((attribute, key), 0.0) + share
        return [(attribute, key, weight) for (attribute, key), weight in weights.items()]

    def reason(self, asked: Asked) -> Reason:
        return Reason(35, "like what you chose")

    def counted(self, event: Counted) -> None:
        if event.weight:
            self.index.note(event.row, event.weight)

    def changed(self, row: int) -> None:
        keys, mask = self._catalogue.keys[row], self._catalogue.mask[row]
        self.index.upsert(row, [keys[where][mask[where]].tolist() for where in self._columns])

    def deleted(self, row: int) -> None:
        self.index.delete(row)

    def catalogue_restored(self) -> None:
        self.index.load([self._filed(where, len(self._catalogue)) for where in self._columns])

    def _filed(self, where: slice, size: int) -> tuple[Int32, Int64]:
        """Rows alive and their keys in some columns, one pair each."""
        present = self._catalogue.mask[:size, where] & self._catalogue.alive[:size, None]
        rows, columns = np.nonzero(present)
        return rows.astype(np.int32), self._catalogue.keys[:size, where][rows, columns]

    def forget_rows(self, rows: Int32) -> None:
        self.index.forget_rows(rows)

    def popular(self, rows: Int32, scores: Float32) -> None:
        for row, score in zip(rows.tolist(), scores.tolist(), strict=True):
            self.index.note(row, score)
