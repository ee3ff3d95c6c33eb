"""Per-user state: history and seen items, with the log position they contain, in one store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from recsys.errors import StateUnavailable
from recsys.types import HistoryEvent, UserState, UserUpdate


def check_after(found: Mapping[str, int], after: Mapping[str, int]) -> None:
    """StateUnavailable unless the positions that were found are these."""
    if any(found.get(key) != position for key, position in after.items()):
        raise StateUnavailable(
            f"the store lost its data: it stood at {dict(after)}, now at {dict(found)}; it is read again from the log"
        )


class StateStore(Protocol):
    """Per-user state. Thread-safe. One writer process; any number of readers.

    Raises StateUnavailable from every method when the store cannot be reached.
    """

    def apply(
        self, updates: Sequence[UserUpdate], positions: Mapping[str, int], after: Mapping[str, int] | None = None
    ) -> None:
        """Apply the updates in order and set the positions ("topic/partition" -> next offset), all in one transaction.

        `after`: positions that the store must have; when it has others, for it lost its data meanwhile, it raises StateUnavailable, and
        nothing is applied: positions of now would hide that what came before them is gone.

        Idempotent: history is a set of (time_ms, event_id) ordered by time, then arrival, so applying a record again, or in
        another order, gives the same state. Keeps the newest `history_len` events of each type and the last `seen_len` distinct seen items
        (seeing an item again makes it the newest), with when they were last shown, and how often: seen again within a minute is once.
        Of items whose events left the history, or never were in it, the last event of the newest `merge.ACTED` stays; of those
        hidden the last `merge.HIDDEN`.
        """
        ...

    def get(self, user_id: str) -> UserState:
        """The user's state; an empty one for an unknown user. It contains at least the positions that `positions` gave last."""
        ...

    def history(self, user_id: str) -> tuple[HistoryEvent, ...]:
        """That of `get`, without the rest being made."""
        ...

    def positions(self) -> dict[str, int]:
        """The log positions contained in the store: empty for a new store or one that lost its data."""
        ...

    def logs(self) -> dict[str, str]:
        """Which log each position belongs to ("topic/partition" -> `EventLog.identity`): what an earlier release wrote has none."""
        ...

    def move(self, positions: Mapping[str, int], logs: Mapping[str, str]) -> None:
        """Set positions and the logs that they belong to, in one transaction, without updates."""
        ...

    def close(self) -> None: ...
