"""The embedding table against torch and FBGEMM, on one thread: speed, memory, longest call.

FBGEMM and the table take turns in a process of another environment: `fbgemm.py`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import numpy as np
import torch

from load_tests import fbgemm
from load_tests.common import ROOT, ROUNDS, Report, run, say
from load_tests.table_curve import curve, roof, two_threads
from recsys.table.base import Layout, Optimizer, Segment, SlotPolicy
from recsys.table.cpu import CpuTable
from recsys.table.warm import warm_up
from recsys.types import Int32, Int64

DIM, CALL = 64, 4096
BATCHES = {"4k": 4096, "64k": 65_536}
ROUND_KEYS = 131_072
"""Keys of one side's turn in a round: 10 to 20 ms, shorter than most disturbances."""
SLOTS, EXAMPLES, ZIPF = 26, 4096, 1.05

Batches = list[tuple[Int64, Int64]]
"""Row numbers and keys of each."""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="1M rows, 3 growths, no FBGEMM: for developing")
    parser.add_argument("--fbgemm", type=Path, help="folder of FBGEMM's environment, kept; default: a temporary one")


def measure(options: argparse.Namespace, report: Report) -> None:
    """Every figure; ours and torch's in turns."""
    torch.set_num_threads(1)
    warm_up()
    rows, growths = (1_000_000, 3) if options.quick else (10_000_000, ROUNDS)
    rng = np.random.default_rng(options.seed)
    keys = rng.permutation(4 * rows)[:rows].astype(np.int64) * 7919
    say(f"growing to {rows} rows, {growths} times")
    table = growth(report, keys, growths)
    touched(report, table, keys, rng)
    say("find and gather in turns with torch")
    weight = torch.zeros(rows, DIM).uniform_()
    found = gathers(report, table, keys, weight, rng)
    del weight
    training(report, table, keys, rng)
    two_threads(report, table, keys, options.seed)
    del table
    roof(report, options.seed, rows, found)
    say("training of many slots in turns with torch")
    mixed(report, rng, rows // 5)
    small(report)
    compiling(report)
    curve(report, options.seed, rows if options.quick else 30_000_000)
    if not options.quick:
        say("FBGEMM")
        against_fbgemm(report, fbgemm.measure(options.fbgemm, rows, DIM))


def table_of(rows: int, dim: int = DIM, optimizer: Optimizer = "rowwise_adagrad", slots: int = 1) -> CpuTable:
    segment = Segment(name="deep", dim=dim, init_scale=0.01, optimizer=optimizer, learning_rate=0.05)
    policies = {slot: SlotPolicy() for slot in range(slots)}
    return CpuTable(Layout(name="measured", segments=(segment,), slots=policies, capacity=rows))


def slot(keys: Int64) -> Int32:
    return np.zeros(len(keys), np.int32)


def growth(report: Report, keys: Int64, times: int) -> CpuTable:
    """From nothing to all keys in calls of 4k, several times: as it comes, and once more into memory that the process had
    before. A virtual machine's first touch of a page may take longer than all the rest."""
    rate, longest = [], []
    table = None
    for _ in range(times):
        del table  # so that the next one gets its memory, unless the machine was quicker to take it back
        table = table_of(len(keys))
        calls, overhead = _grow(table, keys)
        rate.append(len(keys) / sum(calls))
        longest.append(max(calls) * 1000)
        say(f"{rate[-1] / 1e6:.2f} M keys/s, longest call {longest[-1]:.1f} ms, usual {median(calls) * 1000:.2f} ms")
    del table
    table = table_of(len(keys))
    for array in (table._store.values, table._store.state, table._index.arrays.entries, table._index.arrays.changed):
        array.reshape(-1).view(np.uint8)[::4096] = 0
    mapped, _ = _grow(table, keys)
    report.add("insert_keys_per_s", median(rate))
    report.add("insert_longest_call_ms", median(longest))
    report.add("insert_mapped", len(keys) / sum(mapped) / 1e6, "M keys/s", "higher")
    report.add("insert_mapped_longest_call", max(mapped) * 1000, "ms")
    report.add("insert_call_p50", median(calls) * 1000, "ms")
    report.add("bytes_per_row", float(np.mean(overhead)))
    report.add("bytes_per_row_worst", max(overhead), "bytes")
    return table


def _grow(table: CpuTable, keys: Int64) -> tuple[list[float], list[float]]:
    """Seconds of each call, and bytes a row beyond values and state over the second half."""
    calls, overhead = [], []
    for start in range(0, len(keys), CALL):
        batch = keys[start : start + CALL]
        started = time.perf_counter()
        table.lookup_train(slot(batch), batch, 0)
        calls.append(time.perf_counter() - started)
        if start >= len(keys) // 2:
            overhead.append(table.memory_bytes() / len(table) - 4 * (DIM + 1))
    return calls, overhead


def touched(report: Report, table: CpuTable, keys: Int64, rng: np.random.Generator) -> None:
    """100k rows, trained at random, taken and copied."""
    table.acknowledge("publish", table.touched("publish").version)
    seconds = []
    for _ in range(ROUNDS):
        for batch in np.split(rng.choice(keys, 100_000, replace=False), 25):
            table.apply_gradients(slot(batch), batch, np.zeros((len(batch), DIM), np.float32), 0)
        started = time.perf_counter()
        taken = table.touched("publish")
        copied = table.export(taken.slots, taken.keys)
        seconds.append(time.perf_counter() - started)
        assert len(copied.keys) == 100_000
        table.acknowledge("publish", taken.version)
    report.add("touched_100k_ms", median(seconds) * 1000)


def turns(sides: Sequence[Callable[[Int64, Int64], object]], keys: Int64, batch: int, seed: int) -> list[list[float]]:
    """Seconds of each side in each round; all sides get the round's fresh random rows."""
    rng = np.random.default_rng(seed)
    seconds: list[list[float]] = [[] for _ in sides]
    for number in range(3 * ROUNDS + 1):
        picked = rng.permutation(np.unique(rng.integers(0, len(keys), ROUND_KEYS + ROUND_KEYS // 4)))[:ROUND_KEYS]
        batches = [(rows, keys[rows]) for rows in picked.reshape(-1, batch)]
        for side, times in zip(sides, seconds, strict=True):
            started = time.perf_counter()
            for rows, asked in batches:
                side(rows, asked)
            if number:
                times.append(time.perf_counter() - started)
    return seconds


def gathers(report: Report, table: CpuTable, keys: Int64, weight: torch.Tensor, rng: np.random.Generator) -> float:
    """Rows a second of our lookup and of torch's gather, which gets the row numbers for nothing; ours at 64k a call."""
    rate = 0.0
    for name, batch in BATCHES.items():
        ours, theirs = turns(
            [
                lambda _, asked: table.lookup(slot(asked), asked),
                lambda rows, _: torch.nn.functional.embedding(torch.from_numpy(rows), weight),
            ],
            keys,
            batch,
            int(rng.integers(2**31)),
        )
        rate = ROUND_KEYS / median(ours)
        report.add(f"find_gather_vs_torch_{name}", median(b / a for a, b in zip(ours, theirs, strict=True)))
        report.add(f"find_gather_{name}", rate * 1e-6, "M rows/s", "higher")
        report.add(f"torch_gather_{name}", ROUND_KEYS / median(theirs) * 1e-6, "M rows/s", "higher")
    return rate


def training(report: Report, table: CpuTable, keys: Int64, rng: np.random.Generator) -> None:
    """Rows a second of an update, which looks up its keys, and of a lookup for training with its update; 64k a call."""
    gradients = rng.standard_normal((BATCHES["64k"], DIM), np.float32)

    def update(_: Int64, asked: Int64) -> None:
        table.apply_gradients(slot(asked), asked, gradients, 0)

    def both(_: Int64, asked: Int64) -> None:
        table.lookup_train(slot(asked), asked, 0)
        table.apply_gradients(slot(asked), asked, gradients, 0)

    alone, whole = turns([update, both], keys, BATCHES["64k"], int(rng.integers(2**31)))
    rate, whole_rate = ROUND_KEYS / median(alone), ROUND_KEYS / median(whole)
    report.add("find_adagrad", rate * 1e-6, "M rows/s", "higher")
    report.add("lookup_find_adagrad", whole_rate * 1e-6, "M rows/s", "higher")


def against_fbgemm(report: Report, figures: dict[str, float] | None) -> None:
    """Ratios to TBE, and the rates behind them; updates are judged at 64k keys a call, as the rest of training."""
    if figures is None:
        return
    report.add("find_adagrad_vs_tbe", figures.pop("find_adagrad_vs_tbe_64k"))
    for name, value in figures.items():
        if "_vs_" in name:
            report.add(name, value, "ratio", "higher")
        else:
            report.add(f"beside_tbe_{name}", value * 1e-6, "M rows/s", "higher")


def mixed(report: Report, rng: np.random.Generator, rows: int) -> None:
    """Zipf keys of 26 slots: lookup, gradients, update, against EmbeddingBag and Adagrad, with full Adagrad on both."""
    table = table_of(rows, optimizer="adagrad", slots=SLOTS)
    slots = np.repeat(np.arange(SLOTS, dtype=np.int32), EXAMPLES)
    each = rows // SLOTS
    for start in range(0, each, EXAMPLES):
        block = np.arange(start, min(start + EXAMPLES, each))
        table.lookup_train(np.repeat(np.arange(SLOTS, dtype=np.int32), len(block)), np.tile(block, SLOTS), 0)
    bag = torch.nn.EmbeddingBag(rows, DIM, mode="sum", sparse=True)
    optimizer = torch.optim.Adagrad(bag.parameters(), lr=0.05)
    gradients = rng.standard_normal((len(slots), DIM), np.float32)
    offsets, gradient = torch.arange(len(slots)), torch.from_numpy(gradients)
    shares = np.cumsum(np.arange(1, each + 1) ** -ZIPF)
    shares /= shares[-1]
    ours, theirs = [], []
    for number in range(ROUNDS + 1):
        ranks = np.searchsorted(shares, rng.random(len(slots)))
        ids = torch.from_numpy(slots * each + ranks)
        started = time.perf_counter()
        table.lookup_train(slots, ranks, 0)
        table.apply_gradients(slots, ranks, gradients, 0)
        middle = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        bag(ids, offsets).backward(gradient)
        optimizer.step()
        if number:
            ours.append(middle - started)
            theirs.append(time.perf_counter() - middle)
    report.add("mixed_vs_torch", median(b / a for a, b in zip(ours, theirs, strict=True)))
    report.add("mixed_step", median(ours) * 1000, "ms")


def small(report: Report) -> None:
    """A lookup of 600 keys of 32 numbers, Python included."""
    table, keys = table_of(100_000, dim=32), np.arange(100_000)
    table.lookup_train(slot(keys), keys, 0)
    asked = np.ascontiguousarray(keys[::100][:600])
    slots, rounds = slot(asked), []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        for _ in range(1000):
            table.lookup(slots, asked)
        rounds.append((time.perf_counter() - started) * 1000)
    report.add("small_batch_us", median(rounds))


def compiling(report: Report) -> None:
    """Seconds of `warm_up` in a process of its own: with nothing on disk, and with what the first left there."""
    script = "import time; from recsys.table.warm import warm_up; t = time.perf_counter(); warm_up(); print(time.perf_counter() - t)"
    with tempfile.TemporaryDirectory(prefix="recsys-numba-") as folder:
        for name in ("compile_first", "compile_cached"):
            environment = {**os.environ, "NUMBA_CACHE_DIR": folder}
            command = [sys.executable, "-c", script]
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, cwd=ROOT)
            report.add(name, float(done.stdout), "s")


if __name__ == "__main__":
    sys.exit(run("table", measure, arguments))
