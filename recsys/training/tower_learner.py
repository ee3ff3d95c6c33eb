"""Learning the retrieval towers: each positive feedback is (the user's history before it and context, the item)."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recsys.capacity import entries
from recsys.config import Config
from recsys.events.seen_ids import Kind, SeenIds
from recsys.features.build import Index, history_columns, shared_columns
from recsys.features.catalogue import Catalogue
from recsys.features.schema import Schema
from recsys.keys import key_of, key_of_once
from recsys.model import networks
from recsys.model.frequency import Frequency
from recsys.model.learning_towers import TowerBatch, TowersLearning
from recsys.model.plan import Block, unique_rows
from recsys.model.row_fields import fields_back, fields_of, starts
from recsys.table.tables import Tables
from recsys.training import old_towers
from recsys.training.dense import DenseOptimizer
from recsys.training.positives import Positive, positives_of, positives_state
from recsys.training.tower_users import SHOWN, USER_BYTES, TowerUser, TowerUsers
from recsys.types import Bool, Feedback, Impression, Int64

BATCH = 64
"""Positives of one step: in-batch negatives of half as many teach little, double waits longer for the first."""
_GONE = 1000
"""So many items that are gone may have a frequency, whatever the catalogue's size, before they are looked for."""


class TowerLearner:
    """Two-tower training state. Not thread-safe."""

    def __init__(
        self, config: Config, schema: Schema, tables: Tables, catalogue: Catalogue, seen: SeenIds | None = None
    ) -> None:
        """`seen`: what the process saw, in which this one remembers events."""
        self._schema, self._catalogue = schema, catalogue
        self._table = tables["tower"]
        self._types, self._past = set(config.retrieval.count_types), set(config.features.history_types)
        self._known = self._types | self._past
        memory_bytes = config.capacity.memory_bytes
        self._seen = seen or SeenIds(memory_bytes)
        self._hard = config.model.hard_negatives
        self.model = networks.two_tower(config, schema)
        self.optimizer = DenseOptimizer(self.model, config.model.dense_optimizer, config.model.dense_learning_rate)
        self._learning = TowersLearning(self.model)
        self.frequency = Frequency()
        self._users = TowerUsers(schema, self._past, entries(memory_bytes, "contexts", 2 * USER_BYTES))
        self._positives: list[Positive] = []
        self.steps = 0
        self.numbered: Mapping[str, Any] | None = None
        """The state of an older release, which names items by row, until `number` says what the rows were."""

    def impression(self, message: Impression) -> None:
        """Keep what was shown, as long as it is not acted upon, and the request's context."""
        user = self._users.of(key_of(message.user_id))
        user.request = key_of_once(message.request_id)
        shared_keys, shared_mask = shared_columns(self._schema, message.user_id, message.context)
        user.shared_keys, user.shared_mask = array("q", shared_keys.tobytes()), shared_mask.tobytes()
        if self._hard and message.activation != "deferred":
            keys = np.array([key_of(item.item_id) for item in message.items], np.int64)
            user.shown.extend(keys[self._catalogue.rows_of(keys) >= 0].tolist())
            del user.shown[:-SHOWN]

    def feedback(self, message: Feedback, now_ms: int) -> bool:
        """Take one event of the history, one positive, or both; train when a batch is full. A duplicate does nothing.

        False: the batch's gradient was not finite, and nothing was learned of it. An item that the catalogue does not have is no
        positive: it was deleted, or a restart reads a log that holds only what it became later.
        """
        if message.type not in self._known or not self._seen.first(Kind.EVENT, message.event_id, now_ms):
            return True
        user, item = self._users.of(key_of(message.user_id)), key_of(message.item_id)
        if message.type in self._types and (row := self._catalogue.row_of(item)) is not None:
            if item in user.shown:
                user.shown = array("q", (shown for shown in user.shown if shown != item))
            if (positive := self._positive(message, user, row)) is not None:
                self._positives.append(positive)
        if message.type in self._past:
            self._users.happened(user, item, message.type)
        if len(self._positives) < BATCH:
            return True
        batch, self._positives = self._positives, []
        return self._learn(batch, now_ms)

    def _positive(self, message: Feedback, user: TowerUser, row: int) -> Positive | None:
        """None: nothing is known of the user, neither past nor context."""
        if not message.context and message.request_id is not None and key_of_once(message.request_id) == user.request:
            shared_keys, shared_mask = user.shared()
        else:
            shared_keys, shared_mask = shared_columns(self._schema, message.user_id, message.context or {})
        if not user.items and not shared_mask[1:].any():
            return None
        history_keys, history_mask = history_columns(self._schema, self._catalogue, self._users.recent(user))
        rows = np.array([row], np.int32)
        if self._hard and user.shown:
            passed = self._catalogue.rows_of(np.array(user.shown[-self._hard :]))
            rows = np.append(rows, passed[passed >= 0])
        return Positive(
            shared_keys, shared_mask, history_keys, history_mask, self._catalogue.keys[rows], self._catalogue.mask[rows]
        )

    @property
    def full_ratio(self) -> float:
        """How many of the users that may be kept are."""
        return self._users.full_ratio

    def forget(self, user_id: str) -> None:
        """Drop what is kept of a user."""
        key = key_of(user_id)
        self._users.forget(key)
        self._positives = [p for p in self._positives if p.shared_keys[0] != key]

    def drop_positives(self) -> None:
        """Forget the positives that wait for a full batch."""
        self._positives = []

    def _learn(self, batch: list[Positive], now_ms: int) -> bool:
        passed = np.zeros((len(batch), self._hard), np.bool_)
        keys, mask = (np.zeros((len(batch), 1 + self._hard, len(self._schema.item_slots)), k) for k in _KINDS)
        for index, p in enumerate(batch):
            passed[index, : len(p.keys) - 1] = True
            keys[index, : len(p.keys)], mask[index, : len(p.keys)] = p.keys, p.mask
        # The batch's items first, then what each passed over.
        item_keys, item_mask = (np.concatenate([a[:, 0], a[:, 1:].reshape(-1, a.shape[2])]) for a in (keys, mask))
        block, (user, past, item), present = self._lay_out(batch, item_keys, item_mask)
        values = self._table.lookup_train(block.slots, block.keys, now_ms)
        fields, narrow = self._schema.item_fields, self._schema.num_history_fields
        parts = [(user, np.arange(user.shape[1] + 1)), (past, starts(fields[:narrow])), (item, starts(fields))]
        self.steps += 1
        positives: Int64 = item_keys[: len(batch), 0]
        if len(self.frequency) > 2 * self._catalogue.num_alive + _GONE:
            self._forget_gone()
        self.frequency.update(self.steps, positives)
        mine, history, items = (fields_of(values, *part, values.shape[1]) for part in parts)
        log_q = np.log(self.frequency.probability(positives)).astype(np.float32)
        of_parts = self._learning.gradients(TowerBatch(mine, history, present, items, positives, log_q, passed))
        gradient = np.zeros(values.shape, np.float32)
        for g, part in zip(of_parts, parts, strict=True):
            fields_back(g, *part, values.shape[1], gradient)
        gradient *= len(batch)  # a row learns of the sum, the weights of the mean
        norm = self.optimizer.norm()
        if not (math.isfinite(norm) and np.isfinite(gradient).all()):
            return False
        self.optimizer.step(norm=norm)
        self._table.apply_gradients(block.slots, block.keys, gradient, now_ms)
        return True

    def _forget_gone(self) -> None:
        """Items that are no longer in the catalogue need no frequency: it holds at most twice as many as there are."""
        rows = self._catalogue.rows_of(self.frequency.keys())
        self.frequency.keep((rows >= 0) & self._catalogue.alive[rows])

    def _lay_out(self, batch: list[Positive], item_keys: Int64, item_mask: Bool) -> tuple[Block, list[Index], Bool]:
        """Rows to look up, the places of users, histories and items among them, and which history entries are present."""
        longest = max(1, max(len(p.history_keys) for p in batch))
        past = np.zeros((len(batch), longest, len(self._schema.history_slots)), np.int64)
        present = np.zeros(past.shape, np.bool_)
        for index, p in enumerate(batch):
            past[index, : len(p.history_keys)] = p.history_keys
            present[index, : len(p.history_keys)] = p.history_mask
        shared, shared_mask = (np.stack([getattr(p, name) for p in batch]) for name in ("shared_keys", "shared_mask"))
        block, places = unique_rows(
            [
                (self._schema.shared_slots, shared, shared_mask),
                (self._schema.history_slots, past, present),
                (self._schema.item_slots, item_keys, item_mask),
            ],
            "tower",
        )
        return block, places, present[..., 0]

    def arrays(self) -> dict[str, Any]:
        """Users, waiting positives, item frequencies and the ids of recent feedback, as arrays."""
        parts = {
            "frequency": self.frequency.state(),
            "seen": self._seen.state(Kind.EVENT),
            "users": self._users.state(),
        }
        parts["positives"] = positives_state(self._positives, self._schema)
        return {f"{name}.{key}": array for name, part in parts.items() for key, array in part.items()}

    def restore_arrays(self, arrays: Mapping[str, Any]) -> None:
        """Load what `arrays` returned."""
        parts: dict[str, dict[str, Any]] = {}
        for full, values in arrays.items():
            name, _, key = full.partition(".")
            parts.setdefault(name, {})[key] = values
        if "frequency" in parts:
            self.frequency.restore(parts["frequency"])
        if "seen" in parts:
            self._seen.restore(Kind.EVENT, parts["seen"])
        if "users" in parts:
            self._users.restore(parts["users"])
        if "positives" in parts:
            self._positives = positives_of(parts["positives"], self._schema)

    def state(self) -> dict[str, Any]:
        """The step, as JSON-able values: all else is in `arrays`."""
        return {"steps": self.steps}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Load what `state` returned; of what an older release wrote the rest waits for `number`."""
        self.steps = state["steps"]
        self.numbered = state if "users" in state else None

    def number(self, ids: Sequence[str] | None) -> None:
        """Finish restoring an older release's state, once the catalogue is there: `ids` says which item each row was."""
        if self.numbered is not None:
            old_towers.restore_users(self._users, self.numbered, ids, self._schema)
            self._positives = old_towers.restored_positives(self.numbered, ids, self._schema, self._catalogue)
            self.numbered = None


_KINDS = (np.int64, np.bool_)
