"""Compile the CPU table's kernels before anything waits for them."""

from __future__ import annotations

import numpy as np

from recsys.compiled import one_at_a_time
from recsys.table import upkeep
from recsys.table.base import Layout, Precision, Segment, SlotPolicy
from recsys.table.cpu import CpuTable
from recsys.table.shared_table import SharedTable


def warm_up(precision: Precision = "float32") -> None:
    """Compile every kernel for tables of this precision, or read it from the on-disk cache, so that no request waits for it."""
    with one_at_a_time("table"):
        _run_each_kernel(precision)


def _run_each_kernel(precision: Precision) -> None:
    segment = Segment(name="deep", dim=2)
    slot = {0: SlotPolicy(expiry_s=1.0)}
    table = CpuTable(Layout(name="warm_up", segments=(segment,), slots=slot, capacity=1000, precision=precision))
    slots, keys = np.zeros(1000, np.int32), np.arange(1000)
    table.touched("warm_up")
    table.lookup_train(slots, keys, now_ms=0)
    table.apply_gradients(slots, keys, np.zeros((1000, 2), np.float32), now_ms=0)
    table.lookup(slots, keys)
    SharedTable([0], 2, table.shared).lookup(slots, keys)
    table.remove(slots[:1], keys[:1])
    table.expire(now_ms=2000)
    table.touched("warm_up")
    upkeep.relabel(np.zeros(1, np.uint8), np.zeros(1, np.uint8))
