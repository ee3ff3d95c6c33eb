"""The source `following`: what follows what in a session, in which context, by transitions and a factor model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recsys.candidates.base import NOTHING, Arrays, Asked, Counted, Listing, Parts, Reason, Source
from recsys.config import Config
from recsys.features.catalogue import Catalogue
from recsys.features.schema import Schema
from recsys.keys import mix
from recsys.retrieval.factors import Factors
from recsys.retrieval.transitions import RANK_HALF_LIVES, Transitions
from recsys.types import Bool, Float32, Int32, Int64

Shared = tuple[Int64, Bool]
"""Shared columns of a request or feedback: keys and mask [S]."""
_PLACE = 1_000_000_007
"""Told apart from hashed keys: the place in the session is a small number."""


class Following:
    """Fed with a click log's events; asked with a session's items, newest first, and the request's context."""

    def __init__(self, config: Config, schema: Schema, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._columns = [1 + schema.context.index(name) for name in schema.transition_context]
        self._transitions = Transitions(len(self._columns) + 2, config.features.transition_length)
        self._factors = Factors(config.seed)

    def _context(self, before: Sequence[int], shared: Shared) -> Int64:
        """Hashed keys of the context fields and of the item before the last, and the place in the session; 0: not known."""
        keys, mask = shared[0][self._columns], shared[1][self._columns]
        context = np.zeros(len(keys) + 2, np.int64)
        context[:-2] = np.where(mask, self._hashed(keys), 0)
        if len(before) > 1:
            context[-2] = self._hashed(self._catalogue.keys[before[1], :1])[0]
        context[-1] = _PLACE + len(before)
        return context

    @staticmethod
    def _hashed(keys: Int64) -> Int64:
        return mix(np.ascontiguousarray(keys)).view(np.int64)

    def _query(self, before: Sequence[int], context: Int64) -> list[int]:
        last = int(self._hashed(self._catalogue.keys[before[0], :1])[0])
        return [last, *context[:-1].tolist()]

    def add(self, row: int, before: Sequence[int], shared: Shared) -> None:
        """The item at `row` followed the session's earlier items (distinct, newest first)."""
        if not before:
            return
        context = self._context(before, shared)
        self._transitions.add(before[0], row, context)
        self._factors.learn(self._query(before, context), row)

    def numbers(self, before: Sequence[int], shared: Shared, rows: Int32) -> Float32:
        """The schema's transition numbers of the items at `rows` [K, N]."""
        context = self._context(before, shared)
        of_last = self._transitions.score(before[0] if before else -1, context, rows)
        of_second = self._transitions.score(before[1] if len(before) > 1 else -1, context, rows)
        logits = self._factors.score(self._query(before, context), rows) if before else np.zeros(len(rows), np.float32)
        return np.concatenate([of_last, of_second[:, : len(RANK_HALF_LIVES) + 1], logits[:, None]], 1)

    def candidates(
        self, before: Sequence[int], shared: Shared, k: int, allowed: Bool | None = None
    ) -> tuple[Int32, Float32]:
        """The k (allowed) items that followed the last one most, shared context first."""
        if not before:
            return np.zeros(0, np.int32), np.zeros(0, np.float32)
        return self._transitions.candidates(before[0], self._context(before, shared), k, allowed)

    def forget_rows(self, rows: Int32) -> None:
        """These rows will be other items': what followed them, and what they followed, is gone."""
        self._transitions.forget_rows(rows)
        self._factors.forget_rows(rows)

    def state(self) -> dict[str, dict[str, Any]]:
        """Everything, as arrays."""
        return {"transitions": self._transitions.state(), "factors": self._factors.state()}

    def restore(self, state: Mapping[str, dict[str, Any]], row_map: Int32) -> None:
        """Load `state`; `row_map[old row]` is today's row, -1 where the item is gone."""
        self._transitions.restore(state["transitions"], row_map)
        self._factors.restore(state["factors"], row_map)


class FollowingSource(Source):
    """Brings nothing where `features.transitions` is off."""

    name = "following"
    needs_user = True

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self.clear()

    def clear(self) -> None:
        self.following = Following(*self._parts) if self._parts.config.features.transitions else None

    def candidates(self, asked: Asked, quota: int) -> Listing:
        if self.following is None or asked.user is None:
            return NOTHING
        allowed = self._parts.catalogue.alive if asked.allowed is None else asked.allowed
        shared = asked.user.shared_keys, asked.user.shared_mask
        return self.following.candidates(asked.history_rows, shared, quota + len(asked.left_out), allowed)

    def reason(self, asked: Asked) -> Reason:
        return Reason(45, "often chosen next")

    def counted(self, event: Counted) -> None:
        if self.following is not None and event.shared is not None and event.weight:
            before = dict.fromkeys(row for row in event.before if row >= 0)
            self.following.add(event.row, list(before), event.shared)

    def forget_rows(self, rows: Int32) -> None:
        if self.following is not None:
            self.following.forget_rows(rows)

    def state(self) -> dict[str, Arrays]:
        return {} if self.following is None else self.following.state()

    def restore(self, state: Mapping[str, Arrays], row_map: Int32, **times: int) -> None:
        if self.following is not None:
            self.following.restore(state, row_map)
