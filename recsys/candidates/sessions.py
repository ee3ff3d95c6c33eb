"""The session that an event belongs to."""

from __future__ import annotations

from collections.abc import Sequence

from recsys.config import Config
from recsys.features.catalogue import Catalogue
from recsys.types import HistoryEvent


class Sessions:
    """Tells which events of a history came before one in its session: by session id, without one by pauses."""

    def __init__(self, config: Config, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self.types = set(config.retrieval.count_types)
        self._gap_ms = int(config.retrieval.session_gap_s * 1000)
        self._window = config.retrieval.covisit_window

    def rows(self, history: Sequence[HistoryEvent], event: HistoryEvent) -> list[int]:
        """Catalogue rows of the same session's earlier counted events, newest first, without the event's own item."""
        rows = (self._catalogue.row(item_id) for item_id in self.before(history, event))
        return [row for row in rows if row is not None]

    def before(self, history: Sequence[HistoryEvent], event: HistoryEvent) -> list[str]:
        """Items of the same session's earlier counted events, newest first, without the event's own item."""
        item_ids: list[str] = []
        last_ms, place = event.time_ms, event.place
        for past in reversed(history):
            if past.place >= place:
                continue
            if event.session_id is not None and past.session_id is not None:
                if past.session_id != event.session_id:
                    break
            elif last_ms - past.time_ms > self._gap_ms:
                break
            last_ms = past.time_ms
            if past.item_id != event.item_id and past.type in self.types:
                item_ids.append(past.item_id)
            if len(item_ids) == self._window:
                break
        return item_ids
