"""Learning the retrieval towers: each positive feedback is (the user's history before it, the item)."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from recsys.config import Config
from recsys.features.build import UserFeatures, user_features
from recsys.features.catalogue import Catalogue
from recsys.features.schema import Schema
from recsys.keys import key_of
from recsys.model import build, fused
from recsys.model.assemble import starts
from recsys.model.frequency import Frequency
from recsys.model.plan import unique_rows
from recsys.table.tables import Tables
from recsys.training.dense import DenseOptimizer
from recsys.types import Feedback, HistoryEvent, Int64

BATCH = 64
"""Positives of one step: in-batch negatives of half as many teach little, double waits longer for the first."""
MAX_USERS = 200_000
"""Users whose recent items are kept (least recently active leave): about 100 MB."""


@dataclass(slots=True)
class _Positive:
    user: UserFeatures
    row: int


class TowerLearner:
    """Two-tower training state. Not thread-safe."""

    def __init__(self, config: Config, schema: Schema, tables: Tables, catalogue: Catalogue) -> None:
        self._schema, self._catalogue = schema, catalogue
        self._table = tables["tower"]
        self._types = set(config.retrieval.count_types)
        self._length = config.features.history_len
        self.model = build.two_tower(config, schema)
        self.optimizer = DenseOptimizer(self.model, config.model.dense_optimizer, config.model.dense_learning_rate)
        self.frequency = Frequency()
        self._histories: OrderedDict[str, list[tuple[str, str]]] = OrderedDict()
        """(item, feedback type) of each user, oldest first."""
        self._positives: list[_Positive] = []
        self.steps = 0

    def feedback(self, message: Feedback, now_ms: int) -> None:
        """Take one positive; train when a batch is full."""
        if message.type not in self._types:
            return
        history = self._histories.setdefault(message.user_id, [])
        self._histories.move_to_end(message.user_id)
        row = self._catalogue.row(message.item_id)
        if row is not None and history:
            past = [HistoryEvent(time_ms=0, event_id="", item_id=item, type=kind) for item, kind in history]
            self._positives.append(
                _Positive(user_features(self._schema, self._catalogue, message.user_id, past, {}), row)
            )
        history.append((message.item_id, message.type))
        del history[: -self._length]
        if len(self._histories) > MAX_USERS:
            self._histories.popitem(last=False)
        if len(self._positives) >= BATCH:
            batch, self._positives = self._positives, []
            self._learn(batch, now_ms)

    def forget(self, user_id: str) -> None:
        """Drop what is kept of a user."""
        self._histories.pop(user_id, None)
        key = key_of(user_id)
        self._positives = [p for p in self._positives if p.user.shared_keys[0] != key]

    def _learn(self, batch: list[_Positive], now_ms: int) -> None:
        rows = np.array([p.row for p in batch])
        item_keys, item_mask = self._catalogue.keys[rows], self._catalogue.mask[rows]
        longest = max(len(p.user.history_keys) for p in batch)
        width = len(self._schema.history_slots)
        past_keys = np.zeros((len(batch), longest, width), np.int64)
        present = np.zeros((len(batch), longest, width), np.bool_)
        for index, p in enumerate(batch):
            past_keys[index, : len(p.user.history_keys)] = p.user.history_keys
            present[index, : len(p.user.history_keys)] = p.user.history_mask
        users = np.array([p.user.shared_keys[:1] for p in batch])
        block, (user, past, item) = unique_rows(
            [
                (self._schema.shared_slots[:1], users, np.ones_like(users, np.bool_)),
                (self._schema.history_slots, past_keys, present),
                (self._schema.item_slots, item_keys, item_mask),
            ],
            "tower",
        )
        values = torch.from_numpy(self._table.lookup_train(block.slots, block.keys, now_ms)).requires_grad_()
        fields, narrow = self._schema.item_fields, self._schema.num_history_fields
        parts = [(user, np.arange(2)), (past, starts(fields[:narrow])), (item, starts(fields))]
        mine, history, items = fused.take_fields(values, values.shape[1], parts)
        self.steps += 1
        positives: Int64 = item_keys[:, 0]
        self.frequency.update(self.steps, positives)
        self.model.train()
        user_vectors = self.model.user_vectors(mine, history, torch.from_numpy(present[..., 0]))
        item_vectors = self.model.item_vectors(items)
        log_q = torch.from_numpy(np.log(self.frequency.probability(positives)).astype(np.float32))
        mean = self.model.loss(user_vectors, item_vectors, torch.from_numpy(positives), log_q, torch.ones(len(batch)))
        self.optimizer.zero()
        mean.backward()
        gradient = np.zeros(values.shape, np.float32) if values.grad is None else values.grad.numpy() * len(batch)
        if not (np.isfinite(gradient).all() and torch.isfinite(self.optimizer.gradient).all()):
            return
        self.optimizer.step()
        self._table.apply_gradients(block.slots, block.keys, gradient, now_ms)

    def state(self) -> dict[str, Any]:
        """Histories, waiting positives and step, as JSON-able values."""
        return {
            "histories": list(self._histories.items()),
            "positives": [
                [p.row, p.user.shared_keys.tolist(), p.user.history_keys.tolist(), p.user.history_mask.tolist()]
                for p in self._positives
            ],
            "steps": self.steps,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self._histories = OrderedDict((user, [(i, k) for i, k in events]) for user, events in state["histories"])
        self._positives = [self._positive(*p) for p in state["positives"]]
        self.steps = state["steps"]

    def _positive(self, row: int, shared: list[int], keys: list[list[int]], mask: list[list[bool]]) -> _Positive:
        width = len(self._schema.history_slots)
        shared_keys = np.array(shared, np.int64)
        shared_mask = np.zeros(len(shared), np.bool_)
        shared_mask[0] = True
        user = UserFeatures(
            shared_keys=shared_keys,
            shared_mask=shared_mask,
            history_keys=np.array(keys, np.int64).reshape(-1, width),
            history_mask=np.array(mask, np.bool_).reshape(-1, width),
            history_kinds=np.ones(len(keys), np.uint8),
            history_gaps=np.zeros(len(keys), np.uint8),
        )
        return _Positive(user, row)
