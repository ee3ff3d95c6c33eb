"""The bandit, learning: impressions and rewards of logged requests become sums on edges, user vectors become clusters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from recsys.bandit.clusters import Clusters, Drop, Split
from recsys.bandit.served import Served, decode
from recsys.capacity import bound_bytes
from recsys.config import Config
from recsys.errors import BadInput
from recsys.events.open_requests import OpenRequests
from recsys.events.seen_ids import Kind, SeenIds
from recsys.keys import key_of
from recsys.table.base import Table
from recsys.training.bandit_impressions import (
    REWARDED,
    SHOWN,
    Due,
    Open,
    bytes_of,
    opened_state,
    restore_opened,
    sums_of,
)
from recsys.training.edge_sums import EdgeSums
from recsys.training.held import Early
from recsys.types import Feedback, Impression

Arrays = dict[str, npt.NDArray[Any]]
_VIEW = "view"


class BanditLearner:
    """Pure: everything is decided by the records and the log times passed in. Not thread-safe."""

    def __init__(self, config: Config, tables: Mapping[str, Table], seen: SeenIds | None = None) -> None:
        """`seen`: what the process saw, in which this one remembers the requests that it learned from."""
        bandit = config.bandit
        self.edges = EdgeSums(tables["edge"], bandit.half_life_s)
        self._dim = config.model.tower_dim
        self.clusters = Clusters(self._dim, bandit.clusters)
        self._rewards, self._window_ms = set(bandit.reward_types), int(bandit.reward_window_s * 1000)
        memory_bytes = config.capacity.memory_bytes
        self._seen = seen or SeenIds(memory_bytes)
        self.opened = OpenRequests[Open](bound_bytes(memory_bytes, "open") // 4)
        self._due: list[Due] = []
        """Since the last step."""
        self._outcomes: list[str] = []
        self.moved = False
        """Clusters were split or dropped, or sums rescaled, and nobody was told yet."""

    def served(self, impression: Impression) -> Served | None:
        """What an impression says of the bandit; BadInput for what it cannot mean."""
        if not impression.bandit:
            return None
        served = decode(impression.bandit, len(impression.items))
        if len(served.vector) != self._dim:
            raise BadInput(
                f"bandit has a user vector of {len(served.vector)}, model.tower_dim is {self._dim}: restart ranking and trainer with "
                "one configuration",
                field="bandit",
            )
        return served

    def impression(self, message: Impression, served: Served, now_ms: int, early: Sequence[Early] = ()) -> None:
        """Learn the user's vector; count edges shown, and open them for rewards, those of `early` feedback among them. A duplicate
        does nothing; where there is no room edges do not count as shown either: they could not be rewarded."""
        if not self._seen.first(Kind.EXPLORED, message.request_id, now_ms):
            return
        self.clusters.add(served.vector, served.generation, served.clusters)
        with_edge = np.flatnonzero(served.edges)
        opened = Open(
            time_ms=now_ms,
            clusters=served.clusters,
            weights=served.weights,
            keys=np.array([key_of(message.items[index].item_id) for index in with_edge.tolist()], np.int64),
            edges=served.edges[with_edge],
            became=np.zeros(len(with_edge), np.uint8),
            num_bytes=bytes_of(message.request_id, len(served.clusters), len(with_edge)),
        )
        if not self.opened.has_room(opened.num_bytes):
            for _, feedback in early:
                self._settle(feedback.type, "no_room")
            return
        self.opened.add(message.request_id, opened)
        if message.activation != "deferred":
            opened.became[:] = SHOWN
            self._due.append((opened, np.arange(len(with_edge)), SHOWN))
        for at_ms, feedback in early:
            self.feedback(feedback, max(at_ms, now_ms))

    def feedback(self, message: Feedback, now_ms: int) -> None:
        """Reward an item, or count it as shown (`view`, where that was deferred). Who calls holds what comes ahead of its impression."""
        if message.request_id is None or not (message.type in self._rewards or message.type == _VIEW):
            return
        opened, key = self.opened.get(message.request_id), key_of(message.item_id)
        if opened is not None:
            self._happened(opened, key, message.type, now_ms)
        elif self._seen.knows(Kind.EXPLORED, message.request_id):
            self._settle(message.type, "too_late")
        else:
            self._settle(message.type, "no_impression")

    def _happened(self, opened: Open, key: int, kind: str, now_ms: int) -> None:
        at = np.flatnonzero(opened.keys == key)
        if now_ms - opened.time_ms > self._window_ms:
            self._settle(kind, "too_late")
        elif not len(at):
            self._settle(kind, "no_edge")
        elif kind in self._rewards:
            self._settle(kind, "duplicate" if opened.became[at[0]] & REWARDED else "rewarded")
            self._due += opened.becomes(at, REWARDED)
        else:
            self._due += opened.becomes(at, SHOWN)

    def never(self, feedback: Feedback) -> None:
        """It waited for its impression in vain."""
        self._settle(feedback.type, "no_impression")

    def _settle(self, kind: str, outcome: str) -> None:
        if kind in self._rewards:
            self._outcomes.append(outcome)

    def take_outcomes(self) -> list[str]:
        """What became of each reward since the last call."""
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def set_back(self, now_ms: int) -> None:
        """Log time was ahead: what was opened ahead of `now_ms`, and the edges' sums, are as of then."""
        self.opened.set_back(now_ms)
        self.moved |= self.edges.set_back(now_ms)

    def drop_due(self) -> None:
        """Forget what would be added to edges in the next step."""
        self._due = []

    def step(self, now_ms: int, learn: bool) -> None:
        """Add up what is due, forget impressions that cannot be rewarded any more, split and drop clusters."""
        due, self._due = self._due, []
        self.moved |= self.edges.step(now_ms)
        if due and learn:
            place_of = dict(zip(self.clusters.ids.tolist(), self.clusters.places.tolist(), strict=True))
            self.edges.add(*sums_of(due, place_of, self.edges.worth), now_ms)
        self.opened.drop_before(now_ms - self._window_ms)
        for change in self.clusters.step():
            self._follow(change)

    def _follow(self, change: Split | Drop) -> None:
        self.moved = True
        if isinstance(change, Drop):
            self.edges.drop(change.place)
        else:
            self.edges.split(change.parent, change.child)

    def published(self) -> Arrays:
        """What serving needs beside the edges: clusters' ids, places and centroids, of which generation; the decay's origin."""
        return {
            "ids": self.clusters.ids.copy(),
            "places": self.clusters.places.copy(),
            "centroids": self.clusters.centroids(),
            "weights": self.clusters.weights(),
            "generation": np.frombuffer(self.clusters.generation.encode(), np.uint8).copy(),
            **self.edges.clock(),
        }

    def state(self) -> Arrays:
        """Everything but the edges, as arrays."""
        return {
            **{f"clusters.{name}": array for name, array in self.clusters.state().items()},
            **{f"requests.{name}": array for name, array in self._seen.state(Kind.EXPLORED).items()},
            **self.edges.clock(),
            **{f"open.{name}": array for name, array in opened_state(self.opened).items()},
        }

    def restore(self, state: Arrays) -> None:
        """Load what `state` returned. Early feedback that older releases kept here, too, the joiner has."""
        self.clusters.restore(_part(state, "clusters."))
        self._seen.restore(Kind.EXPLORED, _part(state, "requests."))
        self.moved |= self.edges.restore(state["decay"].tolist(), state.get("half_life_s"))
        restore_opened(self.opened, _part(state, "open."))


def _part(state: Arrays, prefix: str) -> Arrays:
    return {name.removeprefix(prefix): array for name, array in state.items() if name.startswith(prefix)}
