"""Rows on a device: what the CUDA table does with tensors. Nothing waits for the device unless it says so.

Rows 0 … slots-1 are the slots' shared default rows, so a missing key is a row like any other. Tensors: slots int32, keys
int64, gradients float32, all on the device and contiguous; a slot that the layout has not gives NaN, and trains nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from recsys.table import triton_kernels as kernels
from recsys.table import triton_steps as steps
from recsys.table.base import Layout, Segment
from recsys.table.cuda_admission import DeviceAdmission
from recsys.table.cuda_index import INTERPRETED, KINDS, Chunks, DeviceIndex, lanes, launch, power
from recsys.table.rows import (
    LAST_SEEN_STEP_MS,
    ROUNDING_SEED,
    check_layout,
    default_values,
    initial_state,
    last_seen,
    scales,
    seed_head,
    state_width,
    table_full,
)
from recsys.table.worth import HALF_LIFE, counted, tick

CHUNK_ROWS = 2**18
"""Rows that are allocated together, a power of two: 67 MB at 64 values. Half doubles the list of addresses, which should
stay in a cache; double leaves more memory unused."""
_LARGEST = float(np.finfo(np.float32).max)
_PROGRAMS = 8192
"""Programs of one warp, twice what a device runs at a time: they share out what is counted on the device alone."""
_BESIDE = 2**17
"""Rows that are sorted beside other work: fewer take less time than the host needs to arrange that."""
_MARKS = 3
"""Numbers of a record behind the state: last-seen in steps, the version that the row was changed in, and its level of uses."""


class Ordered(NamedTuple):
    """A batch's rows in order [N], the position of each in the batch, its slots and keys, and what to wait for first."""

    rows: Tensor
    positions: Tensor
    slots: Tensor
    keys: Tensor
    done: torch.cuda.Event | None


class DeviceRows:
    """Index, values, records (optimiser state, last-seen, version) and admission counts of one layout.

    One stream, one thread at a time.
    """

    def __init__(self, layout: Layout, device: torch.device, chunk_rows: int = CHUNK_ROWS) -> None:
        check_layout(layout)
        if device.type != "cuda" and not INTERPRETED:
            raise ValueError(
                f"table {layout.name!r} needs a CUDA device, not {device}: or TRITON_INTERPRET=1, for tests"
            )
        self.layout, self.device = layout, device
        slots = sorted(layout.slots)
        self.first = len(slots)
        default_row = np.full(65536, -1, np.int32)
        default_row[slots] = np.arange(len(slots))
        self.fallback = self.tensor(default_row)
        self.fresh = self.tensor(initial_state(layout))
        self.width = len(self.fresh)
        record = self.width + _MARKS
        record = power(record) if record <= 8 else -(-record // 8) * 8  # a sector of memory, or whole ones
        total = len(slots) + layout.capacity
        self.values = Chunks(total, layout.dim, getattr(torch, layout.precision), device, chunk_rows)
        self.records = Chunks(total, record, torch.int32, device, chunk_rows)
        self.index = DeviceIndex(layout.capacity, len(slots), self.fallback, (self.values, self.records))
        self.admission = DeviceAdmission(layout, self.fallback)
        defaults = torch.arange(len(slots), dtype=torch.int32, device=device)
        self.put(defaults, self.tensor(default_values(layout)), self.fresh.expand(len(slots), -1))
        seed, drawn = (self.tensor(seed_head(s).view(np.int64)) for s in (layout.seed, layout.seed ^ ROUNDING_SEED))
        start = (seed, self.tensor(scales(layout)), self.fresh)
        self._drawn = drawn if layout.rounding == "stochastic" else None
        self._columns = (self.values.addresses, self.records.addresses)
        self._new = (*self._columns, *start)
        rates = np.array([_rates(segment) for segment in layout.segments])
        self._padded = power(layout.dim)
        values_shape = (chunk_rows, layout.dim, self._padded, KINDS[self.values.dtype])
        self._layout_shape = (*values_shape, record, self.width, power(max(1, self.width)), self.first)
        self._rates = list(self.tensor(rates))
        # What is sorted beside a copy has to come first, or waits until all of the copy's programs have begun.
        self._sorting: tuple[Any, ...] | None = None
        self._beside = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    def tensor(self, array: npt.NDArray[Any]) -> Tensor:
        """A copy on the device; on the CPU it may be the array itself."""
        return torch.from_numpy(np.require(array, None, ["C", "A", "W"])).to(self.device)

    @property
    def nbytes(self) -> int:
        parts = (self.values, self.records, self.index, self.admission, self.fallback)
        return sum(part.nbytes for part in parts)

    def lookup(self, slots: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Values [N, D] and rows [N]; a missing key gets its slot's default row, which is below `first`."""
        rows = torch.empty(len(keys), dtype=torch.int32, device=self.device)
        out = torch.empty((len(keys), self.layout.dim), device=self.device)
        if len(keys):
            size, programs = lanes(len(keys), self._padded)
            given = (self.index.index, (slots, keys), self.values.addresses, (rows, out), len(keys))
            launch(kernels.lookup, programs, *given, shape=self._shape(size))
        return out, rows

    def lookup_train(
        self, slots: Tensor, keys: Tensor, now_ms: int, version: int, admit: bool = True
    ) -> tuple[Tensor, Ordered]:
        """Values [N, D], and what `apply_gradients` needs, sorted meanwhile. As `Table.lookup_train`, but last-seen of rows
        that were there moves on with `apply_gradients` (or `see`), which saves a pass over them."""
        rows = self.rows_train(slots, keys, now_ms, version, admit)
        ordered = self.order(rows, slots, keys)
        return self.values.gather(rows), ordered

    def rows_train(
        self, slots: Tensor, keys: Tensor, now_ms: int, version: int, admit: bool = True, room: int | None = None
    ) -> Tensor:
        """Rows [N]: counts, admits and creates as `Table.lookup_train`; of the keys that are due the first `room`, if given. New
        rows are seen now and marked as changed. Rows stay what they are until some are removed or expire."""
        if not admit:
            return self.index.find(slots, keys)
        if room is not None or not self.admission.at_once:
            return self._admit(slots, keys, now_ms, version, room)
        return self._make(slots, keys, now_ms, version, lambda: self._missing(slots, keys))

    def order(self, rows: Tensor, slots: Tensor, keys: Tensor) -> Ordered:
        """Rows in order, for `apply_gradients`: sorted beside what the device does next, and before what needs it."""
        if self._beside is None or len(rows) < _BESIDE:
            return Ordered(*torch.sort(rows, stable=True), slots, keys, None)
        out = torch.empty_like(rows), torch.empty(len(rows), dtype=torch.int64, device=rows.device)
        self._beside.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._beside):
            torch.sort(rows, stable=True, out=out)
        done = self._beside.record_event()
        if not torch.cuda.is_current_stream_capturing():  # a graph keeps its memory to itself
            if self._sorting is not None:
                self._sorting[0].wait()  # what was held for it can be given to others after this
            self._sorting = done, rows, *out
        return Ordered(*out, slots, keys, done)

    def state(self, rows: Tensor) -> Tensor:
        """Optimiser state [N, S]."""
        return self.records.gather(rows, 0, self.width).view(torch.float32)

    def seen_ms(self, rows: Tensor) -> Tensor:
        """When the rows were last seen [N]."""
        return self.records.gather(rows, self.width, 1)[:, 0].to(torch.int64) * LAST_SEEN_STEP_MS

    def uses(self, rows: Tensor) -> Tensor:
        """Levels of how often the rows were seen [N]."""
        return self.records.gather(rows, self.width + 2, 1)[:, 0]

    def worth(self, rows: Tensor) -> Tensor:
        """What the rows are worth [N]: `worth.py`."""
        return self.records.gather(rows, self.width, 1)[:, 0].to(torch.int64) + HALF_LIFE * self.uses(rows).to(
            torch.int64
        )

    def count_uses(self, slots: Tensor, keys: Tensor, rows: Tensor, now_ms: int) -> None:
        """Count the rows of a call, each once, before they are seen; lanes below `first` are skipped. Waits for the device."""
        there = rows >= self.first
        where = self.index.group(slots, keys, there)
        chosen = there & (where == torch.arange(len(keys), device=self.device))
        rows, of = rows[chosen], tick(now_ms)
        seen, levels = (part[:, 0].tolist() for part in self.records.gather(rows, self.width, 3)[:, [0, 2]].split(1, 1))
        now = int(last_seen(now_ms)) // LAST_SEEN_STEP_MS
        new = [
            counted(level, now - at, key, of)
            for level, at, key in zip(levels, seen, keys[chosen].tolist(), strict=True)
        ]
        self.records.scatter(rows, self.tensor(np.array(new, np.int32))[:, None], self.width + 2)

    def due(self, slots: Tensor, keys: Tensor, now_ms: int) -> int:
        """How many keys of a call are due for a row. Waits for the device."""
        rows = self.index.find(slots, keys)
        due, _ = self.admission.due(slots, keys, (rows >= 0) & (rows < self.first), now_ms)
        return self._different(slots, keys, due)

    def changed(self, rows: Tensor) -> Tensor:
        """The version [N] that the rows were changed in."""
        return self.records.gather(rows, self.width + 1, 1)[:, 0]

    def put(self, rows: Tensor, values: Tensor, state: Tensor) -> None:
        """Set unique rows; those below 0 are skipped."""
        self.values.scatter(rows, values)
        self.records.scatter(rows, state.contiguous().view(torch.int32))

    def mark(self, rows: Tensor, seen_ms: Tensor, version: int, uses: Tensor) -> None:
        """Set when unique rows were last seen and how often, and the version they were changed in."""
        seen = (last_seen(seen_ms) // LAST_SEEN_STEP_MS).to(torch.int32)
        marks = torch.stack([seen, torch.full_like(seen, version), uses.to(torch.int32)], 1)
        self.records.scatter(rows, marks, self.width)

    def create(self, slots: Tensor, keys: Tensor, now_ms: int, version: int) -> Tensor:
        """Each lane's row, made where missing, seen now and changed; -1 if a later lane has the same key.

        TableFull before anything changed."""
        rows = self._make(slots, keys, now_ms, version, lambda: self._missing(slots, keys))
        self.admission.forget(slots, keys)
        self.see(rows, now_ms, version)
        where = self.index.group(slots, keys, torch.ones_like(keys, dtype=torch.bool))
        at = torch.arange(len(keys), device=self.device)
        last = torch.full_like(at, -1).scatter_reduce_(0, where, at, "amax")
        return torch.where(last[where] == at, rows, -1)

    def see(self, rows: Tensor, now_ms: int, version: int | None = None) -> None:
        """Move last-seen of rows on; with a version, mark them as changed then."""
        if len(rows):
            size, programs = lanes(len(rows))
            given = (self.records.addresses, rows, _stamp(now_ms, version or 1), len(rows))
            launch(kernels.see, programs, *given, shape=self._shape(size, version is not None))

    def refused(self, gradients: Tensor) -> Tensor:
        """A tensor [1] that is not 0 if gradients are not finite, or so large (3.4e38 / N) that a sum might not be."""
        refused = torch.zeros(1, dtype=torch.int32, device=self.device)
        if gradients.numel():
            size, programs = lanes(gradients.numel(), 1, 2048)
            given = (gradients, refused, _LARGEST / len(gradients), gradients.numel())
            launch(steps.refuse, programs, *given, shape=(size,))
        return refused

    def apply_gradients(self, ordered: Ordered, gradients: Tensor, now_ms: int, version: int) -> Tensor:
        """One optimiser step of rows, those below 0 left out; equal rows' gradients [N, D] are summed first.

        A row whose sum is not finite stays as it is: then the answer, a tensor [1], is not 0. See `refused` for a check
        before anything is changed, which reads the gradients once more.
        """
        flags = torch.zeros(8, dtype=torch.int32, device=self.device)
        refused, frequent = flags[:1], flags[4:5]
        count = len(gradients)
        if not count:
            return refused
        if ordered.done is not None:
            torch.cuda.current_stream(self.device).wait_event(ordered.done)
        order: tuple[Tensor, ...] = (ordered.rows, ordered.positions)
        given = (gradients, self._combine(order, gradients, frequent), refused)
        if self._drawn is not None:
            order = (*order, ordered.slots, ordered.keys, self._drawn)
        start = state = 0
        for number, segment in enumerate(self.layout.segments):
            padded = power(segment.dim)
            size, programs = lanes(count, padded, values=1024)
            last = start + segment.dim == self.layout.dim
            rounding = steps.NEAREST if self._drawn is None else steps.COUNTED if last else steps.STOCHASTIC
            whole = start == 0 and segment.optimizer == "rowwise_adagrad" and self.records.width == 4
            span = (start, segment.dim, padded, state, getattr(steps, segment.optimizer.upper()), rounding, whole)
            same = (order, given, self._columns, self._rates[number], _stamp(now_ms, version), count)
            launch(steps.step, programs, *same, shape=(*self._shape(size, start == 0), *span), warps=2)
            start, state = start + segment.dim, state + state_width(segment)
        return refused

    def remove(self, slots: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Free the rows of the keys that are there; those slots and keys. Waits for the device."""
        rows = self.index.find(slots, keys)
        there = rows >= self.first
        where = self.index.group(slots, keys, there)
        chosen = there & (where == torch.arange(len(keys), device=self.device))
        slots, keys, rows = slots[chosen], keys[chosen], rows[chosen]
        self.index.drop(slots, keys, rows)
        return slots, keys

    def _shape(self, size: int, change: bool = False) -> tuple[int, ...]:
        """SHAPE of the kernels."""
        return (*self._layout_shape, size, change)

    def _missing(self, slots: Tensor, keys: Tensor) -> int:
        """How many different keys have no row. Waits for the device."""
        rows = self.index.find(slots, keys)
        return self._different(slots, keys, (rows >= 0) & (rows < self.first))

    def _different(self, slots: Tensor, keys: Tensor, chosen: Tensor) -> int:
        where = self.index.group(slots, keys, chosen)
        return int((chosen & (where == torch.arange(len(keys), device=self.device))).sum())

    def _make(self, slots: Tensor, keys: Tensor, now_ms: int, version: int, wanted: Callable[[], int]) -> Tensor:
        """Rows [N], made where missing, as new. TableFull before anything changed."""
        self.index.reserve(len(keys), wanted, lambda held, more: table_full(self.layout, held, more))
        claims = self.index.enter(slots, keys)
        if len(keys):
            size, _ = lanes(len(keys), self._padded)
            given = (self.index.index, (slots, keys), claims, self._new, _stamp(now_ms, version), len(keys))
            launch(kernels.settle, -(-len(keys) // kernels.BLOCK), *given, shape=self._shape(size))
        return claims[0]

    def _admit(self, slots: Tensor, keys: Tensor, now_ms: int, version: int, room: int | None) -> Tensor:
        """Count missing keys and make the rows that are due; rows [N] after that."""
        rows = self.index.find(slots, keys)
        due, waiting = self.admission.due(slots, keys, (rows >= 0) & (rows < self.first), now_ms)
        if room is not None:
            at = torch.arange(len(keys), device=self.device)
            where = torch.where(due, self.index.group(slots, keys, due), at)
            number = torch.cumsum(due & (where == at), 0) - 1
            due = due & (number[where] < room)
        made = self._make(torch.where(due, slots, -1), keys, now_ms, version, lambda: self._different(slots, keys, due))
        self.admission.count(slots, keys, due, waiting)
        return torch.where(made >= 0, made, rows)

    def _combine(self, order: tuple[Tensor, ...], gradients: Tensor, number: Tensor) -> Tensor:
        """Sums [N / 3, D] of rows that occur more than twice, where the kernel `step` looks for them. `number`: [1], 0."""
        count, dim = gradients.shape
        tiles, padded = -(-count // steps.TILE), power(dim)
        sums = torch.empty((tiles, dim), dtype=torch.float64, device=self.device)
        summed = torch.empty((count // 3 + 1, dim), device=self.device)
        heads = torch.empty(count // 3 + 1, dtype=torch.int32, device=self.device)
        frequent = (heads, number)
        shape = (dim, padded, max(1, min(steps.TILE, 2048 // padded)))
        launch(steps.presum, tiles, order, gradients, sums, frequent, count, shape=shape)
        given = (order, (gradients, sums), frequent, summed, count)
        launch(steps.combine, min(len(heads), _PROGRAMS), *given, shape=(dim, padded, max(1, 512 // padded)), warps=1)
        return summed


def _rates(segment: Segment) -> tuple[float, ...]:
    """`rates` of the kernel `step`; an even number of them keeps each segment's aligned."""
    own = (segment.beta, segment.l1, segment.l2, 0.0)
    if segment.optimizer == "adam":
        decays = np.array([segment.beta1, segment.beta2])
        with np.errstate(divide="ignore"):
            own = (segment.beta1, segment.beta2, *np.log(decays).tolist())
    return (segment.learning_rate, segment.epsilon, *own)


def _stamp(now_ms: int, version: int) -> int:
    """Version (>= 1) and time as the kernels take them; never below 2^32, which would be another type."""
    return version << 32 | (int(last_seen(now_ms)) // LAST_SEEN_STEP_MS & 0xFFFFFFFF)
