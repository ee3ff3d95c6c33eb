"""The serving copy of the trainer's parameters, kept up to date by its deltas."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from safetensors import SafetensorError

from recsys.errors import BadInput, SchemaMismatch
from recsys.model.layouts import same_parameters
from recsys.model.plan import Block
from recsys.parameters.arena import Sharing
from recsys.parameters.base import ParameterState, Reply
from recsys.parameters.deltas import WHOLE_BEGIN, WHOLE_END, Delta, RowDelta, Version, believable, not_finite
from recsys.table import segments
from recsys.table.base import Layout, Rows, Table
from recsys.table.fit import restore_within
from recsys.table.tables import Implementation, Tables
from recsys.types import Float32, Int32, Int64

WHOLE, EVERY = "whole", "every"
"""Cursors: what came since a whole state began to come; every row there is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """The last delta's epoch and number, and how many deltas before it never came."""

    epoch: int = 0
    number: int = 0
    missed: int = 0

    def after(self, delta: Delta, *, after_gap: bool) -> Counted:
        """With one more. A gap that is known, a delta again, or one that was not counted is no missing one."""
        expected = self.number + 1 if delta.version.epoch == self.epoch else 1
        known = delta.number and not after_gap and (self.number or delta.version.epoch != self.epoch)
        missed = max(0, delta.number - expected) if known else 0
        return Counted(epoch=delta.version.epoch, number=delta.number, missed=self.missed + missed)


class ParameterStore:
    """Tables, dense weights and version, kept up to date by deltas in order. One writer; lookups from any thread."""

    def __init__(
        self,
        layouts: Sequence[Layout],
        schema: str,
        implementation: Implementation = "cpu",
        sharing: Sharing | None = None,
    ) -> None:
        self._made_of, self._sharing = (layouts, implementation), sharing
        self.tables = self._new_tables()
        self._schema = schema
        self.state = ParameterState()
        self._dense = b""
        self._lock = threading.Lock()
        self._whole = threading.Lock()
        self._changes = 0
        """Odd while a delta is being applied."""
        self.counted = Counted()
        self.receiving = 0
        """The epoch whose whole state is coming; 0: none."""
        self.missing = 0
        self.found = 0

    def _new_tables(self) -> Tables:
        layouts, implementation = self._made_of
        return Tables(layouts, implementation) if self._sharing is None else self._sharing.tables(layouts)

    def share(self) -> None:
        """Let processes of this host read the tables from now on."""
        if self._sharing is not None:
            self._sharing.announce(self.tables, self.state)

    def lookup(self, blocks: Sequence[Block]) -> Reply:
        """Rows of exactly the version that the reply names: look again when a delta came in between, then wait for it."""
        before = self._changes
        if not before % 2:
            reply = self._look(blocks)
            if self._changes == before:
                return reply
        with self._whole:
            return self._look(blocks)

    def _look(self, blocks: Sequence[Block]) -> Reply:
        state = self.state
        values = []
        for block in blocks:
            rows, found = self.tables[block.layout].lookup(block.slots, block.keys)
            hits = int(found.sum())
            self.found += hits
            self.missing += len(found) - hits
            values.append(rows)
        return Reply(values=tuple(values), state=state)

    def dense(self) -> tuple[int, bytes]:
        with self._lock:
            return self.state.dense_version, self._dense

    def apply(self, delta: Delta, *, after_gap: bool = False) -> bool:
        """Apply one whole delta; False when it is of an older epoch or step and was ignored. Not thread-safe.

        Raises SchemaMismatch, and BadInput when it does not fit the tables or is too far ahead of the last one to be believed
        (`after_gap`: some are missing before it, so that any step may follow). Then nothing changed.
        """
        if not same_parameters(delta.schema, self._schema):
            raise SchemaMismatch(
                f"delta {delta.version} has schema {delta.schema}, this service {self._schema}: restart all processes with one configuration"
            )
        if delta.version < self.state.version:
            return False
        last = self.state.version
        if not believable(
            delta.version, Version(epoch=last.epoch, step=delta.version.step if after_gap else last.step)
        ):
            raise BadInput(f"delta {delta.version} is too far ahead of {last} to be believed", field="epoch")
        for rows in delta.rows:
            self._check_fits(rows)
        if delta.dense_version:
            _check_dense(delta.dense)
        gone = self._begin_or_end(delta)
        with self._whole:
            self._count_change()
            try:
                for layout, (slots, keys) in gone.items():
                    self.tables[layout].remove(slots, keys)
                self._apply(delta)
            finally:
                self._count_change()
        self.counted = self.counted.after(delta, after_gap=after_gap)
        return True

    def _count_change(self) -> None:
        self._changes += 1
        if self._sharing is not None:
            self._sharing.count(self._changes)

    def _begin_or_end(self, delta: Delta) -> dict[str, tuple[Int32, Int64]]:
        """Note where a whole state begins; at its end, the rows of before (slots, keys) that did not come with it."""
        if delta.version.epoch != self.receiving:
            self.receiving = 0  # its trainer died amid it
        if delta.whole == WHOLE_BEGIN:
            self.receiving = delta.version.epoch
            for table in self.tables.values():
                table.release(WHOLE)
            segments.skip(self.tables, WHOLE)
        if delta.whole != WHOLE_END or not self.receiving:
            return {}
        self.receiving = 0
        return {name: _not_touched(table) for name, table in self.tables.items()}

    def _check_fits(self, rows: RowDelta) -> None:
        if rows.layout not in self.tables:
            raise BadInput(
                f"delta has rows of layout {rows.layout[:80]!r}, the tables are {sorted(self.tables)}", field="layout"
            )
        layout = self.tables[rows.layout].layout
        slots = np.unique(np.concatenate([rows.slots, rows.removed_slots, rows.default_slots]))
        unknown = np.setdiff1d(slots, np.array(list(layout.slots), np.int32))
        if len(unknown):
            raise BadInput(
                f"delta has rows of slot {unknown[0]}, which layout {layout.name!r} does not have", field="slots"
            )
        if {rows.values.shape[1], rows.default_values.shape[1]} != {layout.dim}:
            raise BadInput(
                f"delta's rows of {layout.name!r} are {rows.values.shape[1]} wide, not {layout.dim}", field="values"
            )

    def _apply(self, delta: Delta) -> None:
        for rows in delta.rows:
            table = self.tables[rows.layout]
            if len(rows.removed_keys):
                table.remove(rows.removed_slots, rows.removed_keys)
            if len(rows.keys):
                none = np.zeros((len(rows.keys), 0), np.float32)
                given = Rows(
                    slots=rows.slots, keys=rows.keys, values=rows.values, state=none, last_seen_ms=rows.last_seen_ms
                )
                # A copy that is smaller than the trainer's table keeps what was seen last.
                restore_within(table, given)
            if len(rows.default_slots):
                table.restore_defaults(_defaults(rows.default_slots, rows.default_values))
        covers_ms = max(delta.covers_ms, self.state.covers_ms)
        if self.receiving:  # it may be an older state: as long as it is not whole, the older of both times holds
            covers_ms = min(delta.covers_ms, self.state.covers_ms)
        elif delta.whole:
            covers_ms = delta.covers_ms
        with self._lock:
            if delta.dense_version:
                self._dense = delta.dense
            self.state = ParameterState(
                version=delta.version,
                covers_ms=covers_ms,
                dense_version=delta.dense_version or self.state.dense_version,
            )
        if self._sharing is not None:
            self._sharing.tell(self.state)

    def restore(self, state: ParameterState, dense: bytes) -> None:
        """What a snapshot holds beside the tables' rows."""
        with self._lock:
            self.state, self._dense = state, dense

    def replace_all(self, deltas: Sequence[segments.TablesDelta], dense: bytes, dense_version: int) -> None:
        """The rows of a checkpoint in place of all that is here; then any delta may follow."""
        tables = self._new_tables()
        segments.load(tables, deltas)
        with self._whole:
            self._changes += 1
            try:
                self.tables = tables
                self.restore(ParameterState(covers_ms=self.state.covers_ms, dense_version=dense_version), dense)
            finally:
                self._changes += 1
        if self._sharing is not None and self._sharing.announced:
            self.share()


def _check_dense(data: bytes) -> None:
    """BadInput unless these are finite weights."""
    try:
        wrong = not_finite(data)
    except (ValueError, KeyError, TypeError, OverflowError, SafetensorError) as error:
        raise BadInput(f"delta's dense weights cannot be read ({error})", field="dense") from None
    if wrong:
        raise BadInput(f"delta's dense weights are not finite in {wrong[:80]!r}", field="dense")


def _not_touched(table: Table) -> tuple[Int32, Int64]:
    """Slots and keys of the rows that did not change since `WHOLE` began."""
    changed, every = table.touched(WHOLE), table.touched(EVERY)
    for cursor in (WHOLE, EVERY):
        table.release(cursor)
    pair = np.dtype([("slot", np.int32), ("key", np.int64)])
    old, new = np.empty(len(every.keys), pair), np.empty(len(changed.keys), pair)
    old["slot"], old["key"], new["slot"], new["key"] = every.slots, every.keys, changed.slots, changed.keys
    left = ~np.isin(old, new)
    return every.slots[left], every.keys[left]


def _defaults(slots: Int32, values: Float32) -> Rows:
    size = len(slots)
    return Rows(
        slots=slots,
        keys=np.zeros(size, np.int64),
        values=values,
        state=np.zeros((size, 0), np.float32),
        last_seen_ms=np.zeros(size, np.int64),
    )
