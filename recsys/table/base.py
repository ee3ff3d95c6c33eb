"""The embedding table's contract: collisionless, growing, expirable. See `docs/table.md`.

Legend: N keys of a call, D width of a row's values (all segments side by side), S width of its optimiser state.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from recsys.types import Bool, Float32, Int32, Int64, UInt8

Optimizer = Literal["sgd", "adagrad", "rowwise_adagrad", "adam", "ftrl"]
Precision = Literal["float32", "float16", "bfloat16"]
Rounding = Literal["nearest", "stochastic"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A run of values of a row with its own optimiser: `deep` (an embedding) or `wide` (one weight a task)."""

    name: str
    dim: int
    optimizer: Optimizer = "rowwise_adagrad"
    learning_rate: float = 0.05
    initial_accumulator: float = 0.1
    """Starting sum of squares of Adagrad and FTRL; larger damps the first steps."""
    init_scale: float = 0.0
    """New rows are uniform in ±init_scale, by a hash of (seed, slot, key, position); 0 gives zeros, all that FTRL takes."""
    epsilon: float = 1e-8
    beta1: float = 0.9
    """Adam: decay of the mean of gradients."""
    beta2: float = 0.999
    """Adam: decay of the mean of squares."""
    beta: float = 1.0
    """FTRL: a weight's step is learning_rate / (beta + √sum of squares)."""
    l1: float = 0.0
    """FTRL: larger makes more weights exactly 0."""
    l2: float = 0.0
    """FTRL: pulls weights to 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotPolicy:
    """How rows of one slot come and go."""

    admission: int = 1
    """A key gets its own row when it was seen this many times in training; each occurrence in a call counts."""
    expiry_s: float | None = None
    """A row, or the count of a key not yet admitted, not seen for this long (log time) is expired; None: never."""
    init_scale: float | None = None
    """In place of every segment's `init_scale`, for rows of this slot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """One physical table: rows of the same segments, shared by many slots."""

    name: str
    segments: tuple[Segment, ...]
    slots: dict[int, SlotPolicy]
    capacity: int = 1_000_000
    spare: float = 0.0
    """Share of the capacity that is kept free: beyond it, rows of least worth go before others come (`worth.py`), and
    `lookup_train` never fails. 0: nothing goes by itself, a full table raises TableFull."""
    seed: int = 0
    order: int | None = None
    """Seed of the hash by which rows lie in the index and are looked at to make room; None: a secret of each table. A trainer
    whose replay must be bit-equal gives one that strangers do not know, or they could choose keys that collide."""
    precision: Precision = "float32"
    """Of the values in memory; optimiser state is float32, and every verb takes and gives float32. What is larger than
    the largest finite half becomes that."""
    rounding: Rounding = "nearest"
    """How a step stores half-precision values: nearest (even), or stochastic: up with the probability that makes the
    mean right, by a hash of (seed, slot, key, position, steps of the row), whose count is one more column of state."""
    filter_counters: int = 0
    """0: keys not yet admitted are counted exactly. Otherwise this many bytes hold a count-min sketch of four rows, in
    which a key may be admitted early, with probability ≤ (1 - exp(-4 n / filter_counters))⁴ for n keys waiting at an
    admission of 2; `admission` is at most 255 then, and all counts halve every longest `expiry_s`."""

    @property
    def dim(self) -> int:
        return sum(segment.dim for segment in self.segments)


@dataclass(frozen=True, slots=True, kw_only=True)
class Touched:
    """What changed since a cursor's acknowledged version: rows (live) and tombstones (gone). Owned by the caller."""

    version: int
    slots: Int32
    keys: Int64
    removed_slots: Int32
    removed_keys: Int64


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Whole rows for checkpoint and restore: values [N, D], state [N, S], last_seen_ms [N]. Owned by the caller."""

    slots: Int32
    keys: Int64
    values: Float32
    state: Float32
    last_seen_ms: Int64
    uses: UInt8 = field(default_factory=lambda: np.zeros(0, np.uint8))
    """How often each was seen, as a level 0 … 15 of about log2 [N]; empty: not known, 0."""

    @property
    def levels(self) -> UInt8:
        """`uses` [N], known or not."""
        return self.uses if len(self.uses) else np.zeros(len(self.keys), np.uint8)

    def take(self, at: Bool | Int64 | slice) -> Rows:
        """Some of the rows, as copies (views for a slice)."""
        return Rows(
            slots=self.slots[at],
            keys=self.keys[at],
            values=self.values[at],
            state=self.state[at],
            last_seen_ms=self.last_seen_ms[at],
            uses=self.levels[at],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Pending:
    """Occurrence counts of keys not yet admitted, and when each was last counted; or the counting filter.

    With `spare` at most as many keys are counted as the table may have rows: those of least worth are forgotten."""

    slots: Int32
    keys: Int64
    counts: Int64
    last_seen_ms: Int64
    sketch: UInt8 = field(default_factory=lambda: np.zeros(0, np.uint8))
    """The filter's counters [filter_counters, rounded up to a multiple of 4]; empty where counts are exact."""
    sketch_ms: int = 0
    """Log time from which its next halving is due, 0 before the first count."""
    windows: Int64 = field(default_factory=lambda: np.zeros(2, np.int64))
    """Where the next windows begin in which rows, and counts, make room [2]: `worth.Windows`."""


class ServingTable(Protocol):
    """One layout's rows, as they are served and saved. One writer thread; readers may run beside it and never see half a row.

    A row's identity is (slot, key), both compared: nothing is ever merged. Slots not in the layout raise ValueError.
    """

    layout: Layout

    def lookup(self, slots: Int32, keys: Int64) -> tuple[Float32, Bool]:
        """Serving: values [N, D] (a fresh array) and found [N]. A missing key gets its slot's shared default row."""
        ...

    def touched(self, cursor: str) -> Touched:
        """Everything changed since `acknowledge(cursor, ...)`; without it, all comes again, merged with newer changes.

        A cursor is born with its first call and then gets every row that exists. A key removed and created again is a
        row; created and removed, a tombstone. Default rows are not in it: see `defaults`.
        """
        ...

    def acknowledge(self, cursor: str, version: int) -> None:
        """Forget, for this cursor, what was touched up to `version`."""
        ...

    def release(self, cursor: str) -> None:
        """Forget the cursor, and what was kept for it; its next `touched` gives every row, as its first did."""
        ...

    def export(self, slots: Int32, keys: Int64) -> Rows:
        """Whole rows of live keys, state included. KeyError names a key that is not there."""
        ...

    def restore(self, rows: Rows) -> None:
        """Insert or overwrite whole rows (checkpoint load), the last of duplicates. `state` may have width 0: values
        only, fresh state. Raises TableFull before anything changed."""
        ...

    def write(self, slots: Int32, keys: Int64, values: Float32, now_ms: int) -> None:
        """Serving copy: insert or overwrite values (a delta), the last of duplicates; optimiser state stays fresh.
        Raises TableFull before anything changed."""
        ...

    def remove(self, slots: Int32, keys: Int64) -> None:
        """Remove rows (tombstones of a delta); unknown keys are ignored."""
        ...

    def defaults(self) -> Rows:
        """The shared default rows, one per slot of the layout (key 0), with optimiser state."""
        ...

    def restore_defaults(self, rows: Rows) -> None:
        """Overwrite the shared default rows of the given slots; `state` may have width 0."""
        ...

    def memory_bytes(self) -> int:
        """Bytes in use for rows, index and counts; reserved address space that was never touched is not counted."""
        ...

    def __len__(self) -> int:
        """Live rows, without the default rows."""
        ...


class Table(ServingTable, Protocol):
    """One layout's rows, trained. Duplicate (slot, key) pairs of one call are combined first, in order of first occurrence."""

    evicted: int
    """Rows that went to make room since the table was made."""
    refused: int
    """Keys that were due for a row since then and found no room."""

    def lookup_train(self, slots: Int32, keys: Int64, now_ms: int, admit: bool = True) -> Float32:
        """Training: count occurrences (if `admit`), create the rows that are admitted by it, and return values [N, D].

        An unadmitted key gets its slot's shared default row. Touches last-seen, does not mark rows as touched
        unless created. With `spare`, rows of least worth go first, never those of the call; what still finds no room, the
        last keys of a call larger than the table, stays unadmitted. Without, it raises TableFull before anything changed.
        """
        ...

    def make_room(self, rows: int) -> int:
        """Remove rows of least worth, so that `rows` more fit and, in steps, `spare` is kept; how many went. They are tombstones.
        Looks at a part of the table, in proportion to what goes, and at the next part in the next call."""
        ...

    def apply_gradients(self, slots: Int32, keys: Int64, gradients: Float32, now_ms: int) -> None:
        """One optimiser step with gradients [N, D]; duplicates are summed first (float64). Unadmitted keys train the
        slot's shared default row, never another key's. Non-finite gradients raise ValueError, nothing changed."""
        ...

    def expire(self, now_ms: int, max_rows: int | None = None) -> int:
        """Remove rows whose slot's expiry has passed; their memory serves later keys. Looks at up to `max_rows` rows a
        call, going on where the last call stopped. Counts of unadmitted keys expire too. Returns how many rows went.

        Where a partial sweep stops depends on where rows happen to lie, which a restart changes: a trainer whose replay
        must be bit-equal calls it without `max_rows`."""
        ...

    def pending(self) -> Pending:
        """Counts of unadmitted keys, for the checkpoint."""
        ...

    def restore_pending(self, pending: Pending) -> None:
        """Replace all counts of unadmitted keys."""
        ...
