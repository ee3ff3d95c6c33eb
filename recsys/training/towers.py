"""Learning the retrieval towers: each positive feedback is (the user's history before it and context, the item)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from recsys.config import Config
from recsys.events.recent import Recent
from recsys.features.build import Index, UserFeatures, user_features
from recsys.features.catalogue import Catalogue
from recsys.features.schema import Schema
from recsys.keys import key_of
from recsys.model import build, fused
from recsys.model.assemble import starts
from recsys.model.frequency import Frequency
from recsys.model.plan import Block, unique_rows
from recsys.model.two_tower import Passed
from recsys.table.tables import Tables
from recsys.training.dense import DenseOptimizer
from recsys.types import Bool, Feedback, HistoryEvent, Impression, Int64

BATCH = 64
"""Positives of one step: in-batch negatives of half as many teach little, double waits longer for the first."""
MAX_USERS = 200_000
"""Users whose recent items are kept (least recently active leave): about 100 MB."""


SHOWN = 20
"""Items last shown to a user that are kept as hard negatives."""


@dataclass(slots=True)
class _Positive:
    """A user as of the feedback, the catalogue row of its item, and rows shown before that were passed over."""

    user: UserFeatures
    row: int
    passed: list[int]


@dataclass(slots=True)
class _User:
    """What is kept of a user: (item, feedback type), oldest first; catalogue rows last shown; the last request and its context."""

    events: list[tuple[str, str]] = field(default_factory=list)
    shown: list[int] = field(default_factory=list)
    request_id: str = ""
    context: dict[str, Any] = field(default_factory=dict)


class TowerLearner:
    """Two-tower training state. Not thread-safe."""

    def __init__(self, config: Config, schema: Schema, tables: Tables, catalogue: Catalogue) -> None:
        self._schema, self._catalogue = schema, catalogue
        self._table = tables["tower"]
        self._types, self._past = set(config.retrieval.count_types), set(config.features.history_types)
        self._known = self._types | self._past
        self._seen = Recent()
        self._length, self._hard = config.features.history_len, config.model.hard_negatives
        self.model = build.two_tower(config, schema)
        self.optimizer = DenseOptimizer(self.model, config.model.dense_optimizer, config.model.dense_learning_rate)
        self.frequency = Frequency()
        self._users: OrderedDict[str, _User] = OrderedDict()
        self._positives: list[_Positive] = []
        self.steps = 0

    def _user(self, user_id: str) -> _User:
        user = self._users.setdefault(user_id, _User())
        self._users.move_to_end(user_id)
        if len(self._users) > MAX_USERS:
            self._users.popitem(last=False)
        return user

    def impression(self, message: Impression) -> None:
        """Keep what was shown, as long as it is not acted upon, and the request's context."""
        user = self._user(message.user_id)
        user.request_id = message.request_id
        user.context = {n: value for n in self._schema.context if (value := message.context.get(n)) is not None}
        if self._hard and message.activation != "deferred":
            rows = self._catalogue.rows([item.item_id for item in message.items])
            user.shown += rows[rows >= 0].tolist()
            del user.shown[:-SHOWN]

    def feedback(self, message: Feedback, now_ms: int) -> bool:
        """Take one event of the history, one positive, or both; train when a batch is full. A duplicate does nothing.

        False: the batch's gradient was not finite, and nothing was learned of it.
        """
        if message.type not in self._known or not self._seen.add(message.event_id, now_ms):
            return True
        user, row = self._user(message.user_id), self._catalogue.row(message.item_id)
        asked = message.request_id is not None and message.request_id == user.request_id
        context = message.context or (user.context if asked else {})
        if row is not None and message.type in self._types:
            user.shown = [shown for shown in user.shown if shown != row]
            past = [HistoryEvent(time_ms=0, event_id="", item_id=item, type=kind) for item, kind in user.events]
            features = user_features(self._schema, self._catalogue, message.user_id, past, context)
            if past or features.shared_mask[1:].any():
                self._positives.append(_Positive(features, row, user.shown[-self._hard :] if self._hard else []))
        if message.type in self._past:
            user.events.append((message.item_id, message.type))
            del user.events[: -self._length]
        if len(self._positives) < BATCH:
            return True
        batch, self._positives = self._positives, []
        return self._learn(batch, now_ms)

    def forget(self, user_id: str) -> None:
        """Drop what is kept of a user."""
        self._users.pop(user_id, None)
        key = key_of(user_id)
        self._positives = [p for p in self._positives if p.user.shared_keys[0] != key]

    def _learn(self, batch: list[_Positive], now_ms: int) -> bool:
        passed = np.full((len(batch), self._hard), -1)
        for index, p in enumerate(batch):
            passed[index, : len(p.passed)] = p.passed
        rows = np.concatenate([[p.row for p in batch], np.maximum(passed, 0).ravel()]).astype(np.int64)
        item_mask = self._catalogue.mask[rows]
        item_mask[len(batch) :] &= (passed >= 0).reshape(-1, 1)
        block, (user, past, item), present = self._lay_out(batch, rows, item_mask)
        values = torch.from_numpy(self._table.lookup_train(block.slots, block.keys, now_ms)).requires_grad_()
        fields, narrow = self._schema.item_fields, self._schema.num_history_fields
        parts = [(user, np.arange(user.shape[1] + 1)), (past, starts(fields[:narrow])), (item, starts(fields))]
        mine, history, items = fused.take_fields(values, values.shape[1], parts)
        self.steps += 1
        positives: Int64 = self._catalogue.keys[rows[: len(batch)], 0]
        self.frequency.update(self.steps, positives)
        self.model.train()
        users = self.model.user_vectors(mine, history, torch.from_numpy(present))
        vectors = self.model.item_vectors(items)
        log_q = torch.from_numpy(np.log(self.frequency.probability(positives)).astype(np.float32))
        mean = self.model.loss(
            users,
            vectors[: len(batch)],
            torch.from_numpy(positives),
            log_q,
            torch.ones(len(batch)),
            Passed(vectors[len(batch) :].view(*passed.shape, -1), torch.from_numpy(passed >= 0))
            if self._hard
            else None,
        )
        self.optimizer.zero()
        mean.backward()
        gradient = np.zeros(values.shape, np.float32) if values.grad is None else values.grad.numpy() * len(batch)
        if not (np.isfinite(gradient).all() and torch.isfinite(self.optimizer.gradient).all()):
            return False
        self.optimizer.step()
        self._table.apply_gradients(block.slots, block.keys, gradient, now_ms)
        return True

    def _lay_out(self, batch: list[_Positive], rows: Int64, item_mask: Bool) -> tuple[Block, list[Index], Bool]:
        """Rows to look up, the places of users, histories and items among them, and which history entries are present."""
        longest = max(1, max(len(p.user.history_keys) for p in batch))
        past = np.zeros((len(batch), longest, len(self._schema.history_slots)), np.int64)
        present = np.zeros(past.shape, np.bool_)
        for index, p in enumerate(batch):
            past[index, : len(p.user.history_keys)] = p.user.history_keys
            present[index, : len(p.user.history_keys)] = p.user.history_mask
        shared, shared_mask = (
            np.stack([getattr(p.user, name) for p in batch]) for name in ("shared_keys", "shared_mask")
        )
        block, places = unique_rows(
            [
                (self._schema.shared_slots, shared, shared_mask),
                (self._schema.history_slots, past, present),
                (self._schema.item_slots, self._catalogue.keys[rows], item_mask),
            ],
            "tower",
        )
        return block, places, present[..., 0]

    def arrays(self) -> dict[str, Any]:
        """Item frequencies and the ids of recent feedback, as arrays."""
        return {f"{name}.{key}": array for name, part in self._parts().items() for key, array in part.state().items()}

    def restore_arrays(self, arrays: Mapping[str, Any]) -> None:
        """Load what `arrays` returned."""
        for name, part in self._parts().items():
            part.restore({key.removeprefix(f"{name}."): a for key, a in arrays.items() if key.startswith(f"{name}.")})

    def _parts(self) -> dict[str, Frequency | Recent]:
        return {"frequency": self.frequency, "seen": self._seen}

    def state(self) -> dict[str, Any]:
        """Users, waiting positives and step, as JSON-able values."""
        return {
            "users": [[name, u.events, u.shown, u.request_id, u.context] for name, u in self._users.items()],
            "positives": [
                [p.row, p.passed, *(getattr(p.user, name).tolist() for name in _USER_ARRAYS)] for p in self._positives
            ],
            "steps": self.steps,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Load what `state` returned."""
        self._users = OrderedDict(
            (name, _User([(i, k) for i, k in events], shown, request_id, context))
            for name, events, shown, request_id, context in state["users"]
        )
        self._positives = [self._positive(*p) for p in state["positives"]]
        self.steps = state["steps"]

    def _positive(self, row: int, passed: list[int], *arrays: Any) -> _Positive:
        width = len(self._schema.history_slots)
        found: dict[str, Any] = {
            name: np.array(values, dtype) for (name, dtype), values in zip(_USER_ARRAYS.items(), arrays, strict=True)
        }
        for name in ("history_keys", "history_mask"):
            found[name] = found[name].reshape(-1, width)
        return _Positive(UserFeatures(**found), row, passed)


_USER_ARRAYS = {
    "shared_keys": np.int64,
    "shared_mask": np.bool_,
    "history_keys": np.int64,
    "history_mask": np.bool_,
    "history_kinds": np.uint8,
    "history_gaps": np.uint8,
}
