"""The source `covisited`: what is chosen in the sessions that this one's items were chosen in."""

from __future__ import annotations

from collections.abc import Mapping

from recsys.candidates.base import Arrays, Asked, Counted, Listing, Parts, Reason, Source
from recsys.capacity import entries
from recsys.retrieval.covisits import PAIR_BYTES, CoVisits, warm_up
from recsys.types import Int32


class CovisitedSource(Source):
    """Decayed counts of pairs."""

    name = "covisited"

    def __init__(self, parts: Parts) -> None:
        self._config, self._catalogue = parts.config, parts.catalogue
        warm_up()
        self.clear()

    def clear(self) -> None:
        retrieval, memory = self._config.retrieval, self._config.capacity.memory_bytes
        self.counts = CoVisits(
            retrieval.covisit_half_life_s,
            retrieval.covisit_backward,
            retrieval.covisit_neighbours,
            max_pairs=max(4 * retrieval.covisit_neighbours, entries(memory, "counters", 4 * PAIR_BYTES)),
        )
        self.counts.alive = lambda: self._catalogue.alive

    def candidates(self, asked: Asked, quota: int) -> Listing:
        allowed = self._catalogue.alive if asked.allowed is None else asked.allowed
        return self.counts.candidates(asked.history_rows, quota + len(asked.left_out), asked.now_ms, allowed)

    def reason(self, asked: Asked) -> Reason:
        if asked.history_rows:
            row = asked.history_rows[0]
            if last := self._catalogue.titles[row] or self._catalogue.ids[row]:
                return Reason(90, f"often chosen with “{last}”")
        return Reason(50, "often chosen with what you chose")

    def counted(self, event: Counted) -> None:
        self.counts.add(event.row, event.before, event.now_ms)

    def forget_rows(self, rows: Int32) -> None:
        self.counts.forget_rows(rows)

    def state(self) -> dict[str, Arrays]:
        return {"covisits": self.counts.state()}

    def restore(self, state: Mapping[str, Arrays], row_map: Int32, **times: int) -> None:
        self.counts.restore(state["covisits"], row_map, **times)
