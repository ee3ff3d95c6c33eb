"""Publishing what changed: take touched, append, flush, acknowledge. A failed push loses nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from recsys.events.deltas import Delta, RowDelta, Version, encode_delta, pieces
from recsys.streams.base import EventLog
from recsys.training.checkpoint import network_bytes
from recsys.training.trainer import Trainer

CURSOR = "publish"
SHARD = "0"


def row_deltas(trainer: Trainer) -> tuple[tuple[RowDelta, ...], Callable[[], None]]:
    """What was touched since the last acknowledged publish, copied, and the call that acknowledges it."""
    touched = {layout: table.touched(CURSOR) for layout, table in trainer.tables.items()}
    deltas = []
    for layout, change in touched.items():
        table = trainer.tables[layout]
        rows, defaults = table.export(change.slots, change.keys), table.defaults()
        # An edge that is not there is 0: 256 default rows of zeros need not travel ten times a second.
        shared = slice(0) if layout == "edge" else slice(None)
        deltas.append(
            RowDelta(
                layout=layout,
                slots=rows.slots,
                keys=rows.keys,
                values=rows.values,
                last_seen_ms=rows.last_seen_ms,
                removed_slots=change.removed_slots,
                removed_keys=change.removed_keys,
                default_slots=defaults.slots[shared],
                default_values=np.ascontiguousarray(defaults.values[shared]),
            )
        )

    def acknowledge() -> None:
        for layout, change in touched.items():
            trainer.tables[layout].acknowledge(CURSOR, change.version)

    return tuple(deltas), acknowledge


class Publisher:
    """Row deltas and dense weights of one trainer epoch to topic `parameters`. Not thread-safe."""

    def __init__(self, log: EventLog, trainer: Trainer, epoch: int = 0) -> None:
        self._log, self.trainer, self.epoch = log, trainer, epoch
        self.rows = 0
        self.tombstones = 0
        self._dense_step = -1
        self._number = 0
        """Deltas of this epoch."""

    def follow(self, trainer: Trainer) -> None:
        """Publish another trainer's state from now on, all of it."""
        self.trainer, self._dense_step = trainer, -1

    def publish_rows(self) -> None:
        """Publish every row touched since the last acknowledged publish. Blocks until they are accepted."""
        rows, acknowledge = row_deltas(self.trainer)
        if not any(len(r.keys) or len(r.removed_keys) for r in rows):
            return
        version, covers_ms, schema = self._version(), self.trainer.covers_ms, self.trainer.schema.hash
        for part in pieces(rows):
            self._send(Delta(version=version, covers_ms=covers_ms, schema=schema, rows=part))
        acknowledge()
        self.rows += sum(len(r.keys) for r in rows)
        self.tombstones += sum(len(r.removed_keys) for r in rows)

    def publish_dense(self) -> bool:
        """Publish the dense weights if a step ran since they were last published."""
        if self.trainer.steps == self._dense_step:
            return False
        payload = network_bytes(self.trainer)
        self._send(
            Delta(
                version=self._version(),
                covers_ms=self.trainer.covers_ms,
                schema=self.trainer.schema.hash,
                dense=payload,
                dense_version=max(1, self.trainer.steps),
            )
        )
        self._dense_step = self.trainer.steps
        return True

    def _version(self) -> Version:
        return Version(epoch=self.epoch, step=self.trainer.steps)

    def _send(self, delta: Delta) -> None:
        chunks = encode_delta(replace(delta, number=self._number + 1))
        self._log.append("parameters", [(SHARD, chunk) for chunk in chunks])
        self._number += 1
