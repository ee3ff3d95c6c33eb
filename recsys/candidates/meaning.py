"""What a user's feedback changes in what is kept of this user."""

from __future__ import annotations

from recsys.config import Config
from recsys.types import Feedback, HistoryEvent, UserUpdate


class Meaning:
    """Types of feedback as the configuration means them. Stateless."""

    def __init__(self, config: Config) -> None:
        self._history = set(config.features.history_types)
        self._negative, self._hide = set(config.feedback.negative), set(config.feedback.hide)

    def enters_history(self, kind: str) -> bool:
        """Whether events of this type are kept in the history."""
        return kind in self._history

    def update(self, feedback: Feedback, event: HistoryEvent, now_ms: int) -> UserUpdate | None:
        """What feedback, `event` as one of the history, at log time `now_ms` changes; None: nothing."""
        kind, user_id, item_id = feedback.type, feedback.user_id, feedback.item_id
        hidden = (item_id,) if kind in self._hide else ()
        if kind in self._history:
            return UserUpdate(user_id=user_id, events=(event,), hidden=hidden)
        if kind in self._negative:
            return UserUpdate(user_id=user_id, acted=(event,), hidden=hidden)
        if hidden:
            return UserUpdate(user_id=user_id, hidden=hidden)
        if kind == "view":
            return UserUpdate(user_id=user_id, seen=(item_id,), seen_ms=now_ms)
        return None
