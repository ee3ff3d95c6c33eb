"""A parameter service without a log: `python -m tests.parameter_writer FOLDER`, a process whose tables others read in shared memory.

It writes one delta after the other, until its input ends. In each row all numbers are the step that wrote it: a row that holds two is
torn. Keys 0 … 999 are always there; others come and go, so that the index grows and its entries move.
"""

import sys
import threading
from pathlib import Path

import numpy as np

from recsys.parameters.arena import Sharing
from recsys.parameters.deltas import Delta, RowDelta, Version
from recsys.parameters.store import ParameterStore
from recsys.table.base import Layout, Segment, SlotPolicy

NAME, SLOT, DIM, STAYING, PASSING = "tested", 3, 18, 1000, 40_000
LAYOUTS = [Layout(name="deep", segments=(Segment(name="deep", dim=DIM),), slots={SLOT: SlotPolicy()}, capacity=60_000)]


def delta(step: int, keys: list[int], removed: list[int]) -> Delta:
    count, gone = len(keys), len(removed)
    rows = RowDelta(
        layout="deep",
        slots=np.full(count, SLOT, np.int32),
        keys=np.array(keys, np.int64),
        values=np.full((count, DIM), step, np.float32),
        last_seen_ms=np.zeros(count, np.int64),
        removed_slots=np.full(gone, SLOT, np.int32),
        removed_keys=np.array(removed, np.int64),
        default_slots=np.array([SLOT], np.int32),
        default_values=np.full((1, DIM), step, np.float32),
    )
    return Delta(version=Version(epoch=1, step=step), covers_ms=step, schema=NAME, rows=(rows,), number=step)


def main(folder: Path) -> None:
    """Announce, then write until nobody listens any more."""
    ended = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
    sharing = Sharing(folder, NAME)
    store = ParameterStore(LAYOUTS, NAME, "cpu", sharing)
    store.apply(delta(1, list(range(STAYING)), []))
    store.share()
    print("ready", flush=True)
    step, rng, passing = 1, np.random.default_rng(0), list[int]()
    while not ended.is_set():
        step += 1
        sharing.beat()
        come = (STAYING + rng.integers(0, PASSING, 300)).tolist()
        gone, passing = passing[:200], passing[200:] + come
        store.apply(delta(step, rng.integers(0, STAYING, 300).tolist() + come, gone))
    sharing.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
