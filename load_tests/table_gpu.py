"""The CUDA table against plain torch and the device's copy bandwidth: `python -m load_tests.table_gpu --json --save`.

Needs torch, triton, numpy and `recsys.table.cuda_rows`, nothing else. Without a device it measures nothing, and says so.

Every time is a median over batches that differ, ours and torch's in turn, between two events of the device. A share is
the least that must be moved (each gradient and each answer once; each distinct row and its index entry once, what is
changed once more) over the bytes that a plain copy moves in that time.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
import triton
from torch import Tensor

from recsys.table.base import Layout, Segment, SlotPolicy
from recsys.table.cuda_rows import DeviceRows

DIMS = (32, 64, 128)
BATCHES = (8_192, 65_536, 1_048_576)
ZIPF = 1.05
ROUNDS, WARM_UP, DIFFERENT = 15, 3, 5
FIRST_ROWS, MOST_ROWS = 10_000_000, 500_000_000
CUDA = torch.device("cuda")
SHARE_OF_MEMORY = 0.8
"""Of the free memory, for the largest table: a growing index stands beside the one that it replaces."""
ROOM = 8 * BATCHES[-1]
"""Rows that stay free: a table that might be full asks the device for its counts in every batch."""
SECTOR = 32
"""Bytes: the least that is read from memory."""
RESULTS = Path(__file__).resolve().parent / "results" / "table_gpu.json"


class Clock:
    """The seconds that are left."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        return self._end - time.monotonic()


def timed(works: list[Callable[[int], object]]) -> list[float]:
    """Median seconds of each work, which are called in turn with the number of a batch."""
    seconds: list[list[float]] = [[] for _ in works]
    for turn in range(WARM_UP + ROUNDS):
        for number, work in enumerate(works):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work(turn % DIFFERENT)
            end.record()
            end.synchronize()
            if turn >= WARM_UP:
                seconds[number].append(begin.elapsed_time(end) / 1000)
    return [median(each) for each in seconds]


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a copy within the device."""
    source = torch.ones(2**28, device="cuda")
    target = torch.empty_like(source)
    (seconds,) = timed([lambda _: target.copy_(source)])
    return 2 * source.nbytes / seconds


def keys_of(numbers: Tensor) -> Tensor:
    """Distinct keys of distinct numbers, spread over all of int64."""
    return numbers * -7046029254386353131 + 0x5851F42D


def drawn(rows: int, count: int, zipf: bool, generator: torch.Generator) -> Tensor:
    """Numbers of rows, uniform or by Zipf's law (the inverse of its continuous distribution)."""
    uniform = torch.rand(count, generator=generator, device=generator.device, dtype=torch.float64)
    if not zipf:
        return (uniform * rows).to(torch.int64).clamp_(max=rows - 1)
    power = 1 - ZIPF
    ranks: Tensor = (uniform * ((rows + 1.0) ** power - 1) + 1) ** (1 / power)
    return (ranks.to(torch.int64) - 1).clamp_(0, rows - 1)


def filled(dim: int, rows: int, device: torch.device = CUDA) -> DeviceRows:
    """A table of so many rows."""
    segment = Segment(name="deep", dim=dim, init_scale=0.01)
    layout = Layout(name="deep", segments=(segment,), slots={0: SlotPolicy()}, capacity=rows + ROOM)
    table = DeviceRows(layout, device)
    step = 2**20
    for start in range(0, rows, step):
        numbers = torch.arange(start, min(start + step, rows), device=device)
        table.lookup_train(torch.zeros_like(numbers, dtype=torch.int32), keys_of(numbers), 0, 1)
    return table


class Plain:
    """An embedding and its row-wise Adagrad in plain torch, given the row numbers."""

    def __init__(self, dim: int, rows: int, device: torch.device = CUDA) -> None:
        self.weight = torch.empty((rows, dim), device=device).uniform_(-0.01, 0.01)
        self._squares = torch.full((rows,), 0.1, device=device)

    def find(self, rows: Tensor) -> Tensor:
        return torch.embedding(self.weight, rows)

    def train(self, rows: Tensor, gradients: Tensor) -> None:
        self.find(rows)
        unique, place = torch.unique(rows, return_inverse=True)
        summed = gradients.new_zeros((len(unique), gradients.shape[1])).index_add_(0, place, gradients)
        squares = self._squares[unique] + summed.square().mean(1)
        self._squares[unique] = squares
        self.weight.index_add_(0, unique, summed * (-0.05 / (squares.sqrt() + 1e-8))[:, None])


def case(table: DeviceRows, plain: Plain | None, batch: int, zipf: bool, bandwidth: float) -> Iterator[dict[str, Any]]:
    """Find + copy, and lookup + row-wise Adagrad, of one table and size of batch."""
    dim, rows = table.layout.dim, table.layout.capacity - ROOM
    generator = torch.Generator(CUDA).manual_seed(batch + zipf)
    numbers = [drawn(rows, batch, zipf, generator) for _ in range(DIFFERENT)]
    keys = [keys_of(each) for each in numbers]
    slots = torch.zeros(batch, dtype=torch.int32, device="cuda")
    gradients = torch.randn((batch, dim), generator=generator, device="cuda")
    distinct = median(len(torch.unique(each)) for each in numbers)

    def train(turn: int) -> None:
        table.lookup_train(slots, keys[turn], 1, 1)
        table.apply_gradients(slots, keys[turn], gradients, 1, 1)

    ours: list[tuple[str, Callable[[int], object]]] = [
        ("find_copy", lambda turn: table.lookup(slots, keys[turn])),
        ("lookup_rowwise_adagrad", train),
    ]
    theirs: list[Callable[[int], object]] = []
    if plain is not None:
        theirs = [lambda turn: plain.find(numbers[turn]), lambda turn: plain.train(numbers[turn], gradients)]
    found = batch * (4 * dim + 12) + distinct * (4 * dim + SECTOR)  # answers, keys, slots; rows and their entries
    least = (found, found + batch * 4 * dim + distinct * (8 * dim + 4 * SECTOR))  # rows, state and meta data, both ways
    for number, (name, work) in enumerate(ours):
        seconds = timed([work, *theirs[number : number + 1]])
        yield {
            "name": name,
            "dim": dim,
            "rows": rows,
            "batch": batch,
            "keys": f"zipf {ZIPF}" if zipf else "uniform",
            "distinct": int(distinct),
            "seconds": seconds[0],
            "keys_per_s": batch / seconds[0],
            "share_of_copy_bandwidth": least[number] / seconds[0] / bandwidth,
            "torch_seconds": seconds[1] if theirs else None,
            "times_torch": seconds[1] / seconds[0] if theirs else None,
        }


def largest(dim: int) -> int:
    """Rows of the largest table that fits: values, state, meta data, free list, and two generations of the index."""
    free, _ = torch.cuda.mem_get_info()
    row_bytes = 4 * dim + 4 + 32 + 4 + 16 * (1 + 0.5) * 2 / 0.6
    return min(MOST_ROWS, int(free * SHARE_OF_MEMORY / row_bytes) // 1_000_000 * 1_000_000 - ROOM)


def measure(clock: Clock, bandwidth: float) -> tuple[list[dict[str, Any]], list[str]]:
    """All cases that the time allows, and the names of those that it did not."""
    results: list[dict[str, Any]] = []
    skipped: list[str] = []
    for of_memory in (False, True):
        for dim in DIMS:
            rows = largest(dim) if of_memory else min(FIRST_ROWS, largest(dim))
            if clock.left() < 60:
                skipped.append(f"dim {dim}, {rows} rows: no time left")
                continue
            table = filled(dim, rows)
            plain = None if of_memory else Plain(dim, rows)
            for batch in BATCHES:
                for zipf in (False, True):
                    if clock.left() < 20:
                        skipped.append(f"dim {dim}, {rows} rows, batch {batch}, zipf {zipf}: no time left")
                        continue
                    results += case(table, plain, batch, zipf, bandwidth)
                    print(f"{clock.left():.0f} s left: {results[-1]}", file=sys.stderr, flush=True)
            del table, plain
            torch.cuda.empty_cache()
    return results, skipped


def report(seconds: float) -> dict[str, Any]:
    """The whole result; without a device, one that says that nothing was measured."""
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    if not torch.cuda.is_available():
        return {"device": None, "versions": versions, "note": "not measured: no CUDA device", "results": []}
    clock = Clock(seconds)
    bandwidth = copy_bandwidth()
    results, skipped = measure(clock, bandwidth)
    return {
        "device": torch.cuda.get_device_name(),
        "versions": versions,
        "copy_bytes_per_s": bandwidth,
        "rounds": ROUNDS,
        "seconds": seconds - clock.left(),
        "skipped": skipped,
        "results": results,
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m load_tests.table_gpu")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout, all else on stderr")
    parser.add_argument("--save", action="store_true", help=f"also write {RESULTS.name}, if anything was measured")
    parser.add_argument("--seconds", type=float, default=450.0, help="begin no case that would end later")
    options = parser.parse_args()
    result = report(options.seconds)
    if options.save and result["results"]:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if options.json:
        print(json.dumps(result))
    else:
        print(result.get("note") or f"{result['device']}: {result['copy_bytes_per_s'] / 1e9:.0f} GB/s copied")
        for row in result["results"]:
            ratio = "" if row["times_torch"] is None else f", {row['times_torch']:.2f} x torch"
            print(
                f"{row['name']:24}{row['dim']:4} x {row['rows']:11,} {row['keys']:9}{row['batch']:9,}: "
                f"{row['keys_per_s'] / 1e6:8.1f} M keys/s, {row['share_of_copy_bandwidth']:.0%} of a copy{ratio}"
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
