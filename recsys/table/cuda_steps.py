"""Optimiser steps of rows on a device. Nothing waits for the device unless it says so."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from recsys.table import triton_steps as steps
from recsys.table.base import Layout, Segment
from recsys.table.cuda_index import Chunks, lanes, launch, power
from recsys.table.cuda_records import RowRecords, stamp
from recsys.table.cuda_transfer import to_device
from recsys.table.rows import ROUNDING_SEED, seed_head, state_width

_LARGEST = float(np.finfo(np.float32).max)
_PROGRAMS = 8192
"""Programs of one warp, twice what a device runs at a time: they share out what is counted on the device alone."""
_BESIDE = 2**17
"""Rows that are sorted beside other work: fewer take less time than the host needs to arrange that."""


class Ordered(NamedTuple):
    """A batch's rows in order [N], the position of each in the batch, its slots and keys, and what to wait for first."""

    rows: Tensor
    positions: Tensor
    slots: Tensor
    keys: Tensor
    done: torch.cuda.Event | None


class DeviceSteps:
    """Of the rows of one layout. One stream, one thread at a time."""

    def __init__(self, layout: Layout, values: Chunks, records: RowRecords, shape: tuple[int, ...]) -> None:
        """`shape`: what kernels are told of the layout."""
        device = values.addresses.device
        self._layout, self._device, self._shape = layout, device, shape
        self._whole_records = records.chunks.width == 4
        self._columns = (values.addresses, records.chunks.addresses)
        drawn = to_device(seed_head(layout.seed ^ ROUNDING_SEED).view(np.int64), device)
        self._drawn = drawn if layout.rounding == "stochastic" else None
        self._rates = list(to_device(np.array([_rates(segment) for segment in layout.segments]), device))
        # What is sorted beside a copy has to come first, or waits until all of the copy's programs have begun.
        self._sorting: tuple[Any, ...] | None = None
        self._beside = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    def order(self, rows: Tensor, slots: Tensor, keys: Tensor) -> Ordered:
        """Rows in order, for `apply_gradients`: sorted beside what the device does next, and before what needs it."""
        if self._beside is None or len(rows) < _BESIDE:
            return Ordered(*torch.sort(rows, stable=True), slots, keys, None)
        out = torch.empty_like(rows), torch.empty(len(rows), dtype=torch.int64, device=rows.device)
        self._beside.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._beside):
            torch.sort(rows, stable=True, out=out)
        done = self._beside.record_event()
        if not torch.cuda.is_current_stream_capturing():  # a graph keeps its memory to itself
            if self._sorting is not None:
                self._sorting[0].wait()  # what was held for it can be given to others after this
            self._sorting = done, rows, *out
        return Ordered(*out, slots, keys, done)

    def refused(self, gradients: Tensor) -> Tensor:
        """A tensor [1] that is not 0 if gradients are not finite, or so large (3.4e38 / N) that a sum might not be."""
        refused = torch.zeros(1, dtype=torch.int32, device=self._device)
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
        flags = torch.zeros(8, dtype=torch.int32, device=self._device)
        refused, frequent = flags[:1], flags[4:5]
        count = len(gradients)
        if not count:
            return refused
        if ordered.done is not None:
            torch.cuda.current_stream(self._device).wait_event(ordered.done)
        order: tuple[Tensor, ...] = (ordered.rows, ordered.positions)
        given = (gradients, self._combine(order, gradients, frequent), refused)
        if self._drawn is not None:
            order = (*order, ordered.slots, ordered.keys, self._drawn)
        start = state = 0
        for number, segment in enumerate(self._layout.segments):
            padded = power(segment.dim)
            size, programs = lanes(count, padded, values=1024)
            last = start + segment.dim == self._layout.dim
            rounding = steps.NEAREST if self._drawn is None else steps.COUNTED if last else steps.STOCHASTIC
            whole = start == 0 and segment.optimizer == "rowwise_adagrad" and self._whole_records
            span = (start, segment.dim, padded, state, getattr(steps, segment.optimizer.upper()), rounding, whole)
            same = (order, given, self._columns, self._rates[number], stamp(now_ms, version), count)
            launch(steps.step, programs, *same, shape=(*self._shape, size, start == 0, *span), warps=2)
            start, state = start + segment.dim, state + state_width(segment)
        return refused

    def _combine(self, order: tuple[Tensor, ...], gradients: Tensor, number: Tensor) -> Tensor:
        """Sums [N / 3, D] of rows that occur more than twice, where the kernel `step` looks for them. `number`: [1], 0."""
        count, dim = gradients.shape
        tiles, padded = -(-count // steps.TILE), power(dim)
        sums = torch.empty((tiles, dim), dtype=torch.float64, device=self._device)
        summed = torch.empty((count // 3 + 1, dim), device=self._device)
        heads = torch.empty(count // 3 + 1, dtype=torch.int32, device=self._device)
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
