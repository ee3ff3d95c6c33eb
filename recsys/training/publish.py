"""Publishing what changed: take touched, append, flush, acknowledge. A failed push loses nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from recsys.parameters.deltas import WHOLE_BEGIN, WHOLE_END, Delta, RowDelta, Version, encode_delta, not_finite, pieces
from recsys.streams.base import EventLog
from recsys.table.base import Rows, Touched
from recsys.table.segments import LayoutDelta
from recsys.training.checkpoint import Checkpoints, network_bytes
from recsys.training.trainer import Trainer
from recsys.types import Int32, Int64

CURSOR = "publish"
SHARD = "0"
_NO_SLOTS, _NO_KEYS = np.zeros(0, np.int32), np.zeros(0, np.int64)


def touched_rows(trainer: Trainer) -> dict[str, Touched]:
    """What was touched in each table since the last acknowledged publish."""
    return {layout: table.touched(CURSOR) for layout, table in trainer.tables.items()}


def row_deltas(
    trainer: Trainer, touched: Mapping[str, Touched] | None = None
) -> tuple[tuple[RowDelta, ...], Callable[[], None]]:
    """What was touched since the last acknowledged publish, copied, and the call that acknowledges it."""
    touched = touched_rows(trainer) if touched is None else touched
    deltas = []
    for layout, change in touched.items():
        table = trainer.tables[layout]
        rows = table.export(change.slots, change.keys)
        deltas.append(_delta_of(layout, rows, table.defaults(), change.removed_slots, change.removed_keys))

    def acknowledge() -> None:
        for layout, change in touched.items():
            trainer.tables[layout].acknowledge(CURSOR, change.version)

    return tuple(deltas), acknowledge


def _delta_of(
    layout: str, rows: Rows, defaults: Rows, removed_slots: Int32 = _NO_SLOTS, removed_keys: Int64 = _NO_KEYS
) -> RowDelta:
    # An edge that is not there is 0: 256 default rows of zeros need not travel ten times a second.
    shared = slice(0) if layout == "edge" else slice(None)
    return RowDelta(
        layout=layout,
        slots=rows.slots,
        keys=rows.keys,
        values=rows.values,
        last_seen_ms=rows.last_seen_ms,
        removed_slots=removed_slots,
        removed_keys=removed_keys,
        default_slots=defaults.slots[shared],
        default_values=np.ascontiguousarray(defaults.values[shared]),
    )


class NotFinite(Exception):
    """What would be published is not all finite; none of it was sent."""


class Publisher:
    """Row deltas and dense weights of one trainer epoch to topic `parameters`. Not thread-safe."""

    def __init__(self, log: EventLog, checkpoints: Checkpoints) -> None:
        """What is published is the state of the trainer whose checkpoints these are; another may take its place."""
        self._log, self._checkpoints, self.epoch = log, checkpoints, 0
        self.rows = 0
        self.tombstones = 0
        self._dense_step = -1
        self._number = 0
        """Deltas of this epoch."""

    def begin(self, epoch: int) -> None:
        """Publish under a newer epoch from now on."""
        self.epoch, self._number = epoch, 0

    @property
    def trainer(self) -> Trainer:
        """The one of now."""
        return self._checkpoints.trainer

    def publish_rows(self) -> None:
        """Publish every row touched since the last acknowledged publish. Blocks until they are accepted. Raises NotFinite."""
        touched = touched_rows(self.trainer)
        if not any(len(each.keys) or len(each.removed_keys) for each in touched.values()):
            return  # ten times a second: before the default rows are copied
        rows, acknowledge = row_deltas(self.trainer, touched)
        _check_rows(rows)
        self._send_rows(rows, self._now())
        acknowledge()

    def publish_dense(self) -> bool:
        """Publish the dense weights if a step ran since they were last published. Raises NotFinite."""
        if self.trainer.steps == self._dense_step:
            return False
        self._send_dense(_checked(network_bytes(self.trainer)), self._now())
        self._dense_step = self.trainer.steps
        return True

    def publish_whole(self) -> None:
        """Publish everything; rows that serving has beyond that are gone at its end."""
        for table in self.trainer.tables.values():
            table.release(CURSOR)
        now, self._dense_step = self._now(), -1
        self._send(replace(now, whole=WHOLE_BEGIN))
        self.publish_rows()
        self.publish_dense()
        self._send(replace(now, whole=WHOLE_END))

    def publish_older(
        self, step: int, covers_ms: int, tables: Mapping[str, LayoutDelta], dense: Mapping[str, torch.Tensor]
    ) -> None:
        """Publish a checkpoint's state whole, as of its step; the bandit's clusters as they are now. Raises NotFinite before anything."""
        rows = [_delta_of(name, part.rows, part.defaults) for name, part in tables.items()]
        _check_rows(rows)
        weights = _checked(network_bytes(self.trainer, dense))
        then = replace(self._now(), version=Version(epoch=self.epoch, step=step), covers_ms=covers_ms)
        self._send(replace(then, whole=WHOLE_BEGIN))
        self._send_rows(rows, then)
        self._send_dense(weights, then)
        self._send(replace(then, whole=WHOLE_END))

    def unsound(self) -> str:
        """What of the next publish is not finite; empty: nothing."""
        try:
            _check_rows(row_deltas(self.trainer)[0])
            _checked(network_bytes(self.trainer))
        except NotFinite as error:
            return str(error)
        return ""

    def _now(self) -> Delta:
        trainer = self.trainer
        version = Version(epoch=self.epoch, step=trainer.steps)
        return Delta(version=version, covers_ms=trainer.covers_ms, schema=trainer.parameters)

    def _send_rows(self, rows: Sequence[RowDelta], as_of: Delta) -> None:
        for part in pieces(rows):
            self._send(replace(as_of, rows=part))
        self.rows += sum(len(r.keys) for r in rows)
        self.tombstones += sum(len(r.removed_keys) for r in rows)

    def _send_dense(self, payload: bytes, as_of: Delta) -> None:
        self._send(replace(as_of, dense=payload, dense_version=max(1, as_of.version.step)))

    def _send(self, delta: Delta) -> None:
        chunks = encode_delta(replace(delta, number=self._number + 1))
        self._log.append("parameters", [(SHARD, chunk) for chunk in chunks])
        self._number += 1


def _check_rows(rows: Sequence[RowDelta]) -> None:
    for part in rows:
        if not (np.isfinite(part.values).all() and np.isfinite(part.default_values).all()):
            raise NotFinite(f"rows of {part.layout!r} are not finite")


def _checked(weights: bytes) -> bytes:
    if name := not_finite(weights):
        raise NotFinite(f"{name} is not finite")
    return weights
