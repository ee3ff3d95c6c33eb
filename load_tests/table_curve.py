"""How the table's costs grow with its rows, and the roof: what the machine's memory can do.

`python -m load_tests.table_curve` draws docs/table_curve.svg from load_tests/results/table.json.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from statistics import median

import numpy as np

from load_tests.chart import line_chart
from load_tests.common import RESULTS, ROOT, ROUNDS, Report, say
from recsys.table import kernels
from recsys.table.base import Layout, Segment, SlotPolicy
from recsys.table.cpu import CpuTable
from recsys.table.memory import reserve
from recsys.types import Int64

DIM, CALL = 64, 4096
SIZES = {"100k": 10**5, "300k": 3 * 10**5, "1M": 10**6, "3M": 3 * 10**6, "10M": 10**7, "30M": 3 * 10**7}
COSTS = {
    "find_gather": "look-up, 4k keys",
    "find_adagrad": "update by row-wise Adagrad, 4k keys",
    "insert": "insert while growing to this size",
    "touched_10k": "10k of 100k touched rows, taken and copied",
}
"""Figures at each size, in ns a key."""
ROUND_KEYS = 65_536


def curve(report: Report, seed: int, largest: int) -> None:
    """One table that grows from size to size; what each verb costs there, ns a key."""
    say(f"the curve, up to {largest} rows")
    rng = np.random.default_rng(seed)
    segment = Segment(name="deep", dim=DIM, init_scale=0.01)
    table = CpuTable(Layout(name="curve", segments=(segment,), slots={0: SlotPolicy()}, capacity=largest))
    gradients = rng.standard_normal((CALL, DIM), np.float32)
    slots = np.zeros(CALL, np.int32)
    for name, size in SIZES.items():
        if size > largest:
            continue
        new = np.arange(len(table), size)
        started = time.perf_counter()
        for start in range(0, len(new), CALL):
            batch = keys_of(new[start : start + CALL])
            table.lookup_train(slots[: len(batch)], batch, 0)
        report.add(f"insert_{name}", (time.perf_counter() - started) / len(new) * 1e9, "ns")

        def batches(size: int = size) -> list[Int64]:
            return list(keys_of(rng.integers(0, size, ROUND_KEYS)).reshape(-1, CALL))

        report.add(f"find_gather_{name}", _per_key(lambda keys: table.lookup(slots, keys), batches), "ns")
        update = _per_key(lambda keys: table.apply_gradients(slots, keys, gradients, 0), batches)
        report.add(f"find_adagrad_{name}", update, "ns")
        report.add(f"touched_10k_{name}", _touched(table, size, rng), "ns")
        report.add(f"bytes_per_row_{name}", table.memory_bytes() / len(table) - 4 * (DIM + 1), "bytes")


def keys_of(numbers: Int64) -> Int64:
    """Distinct keys of distinct numbers, spread over all of int64."""
    return numbers * np.int64(-7046029254386353131)


def _per_key(use: Callable[[Int64], object], batches: Callable[[], list[Int64]]) -> float:
    seconds = []
    for _ in range(ROUNDS):
        asked = batches()
        started = time.perf_counter()
        for keys in asked:
            use(keys)
        seconds.append(time.perf_counter() - started)
    return median(seconds) / ROUND_KEYS * 1e9


def _touched(table: CpuTable, size: int, rng: np.random.Generator) -> float:
    """A snapshot's increment of 10,000 rows."""
    table.acknowledge("curve", table.touched("curve").version)
    seconds = []
    for _ in range(ROUNDS):
        chosen = keys_of(np.unique(rng.integers(0, size, 10_600))[:10_000])
        table.apply_gradients(np.zeros(10_000, np.int32), chosen, np.zeros((10_000, DIM), np.float32), 0)
        started = time.perf_counter()
        taken = table.touched("curve")
        copied = table.export(taken.slots, taken.keys)
        seconds.append(time.perf_counter() - started)
        assert len(copied.keys) == 10_000
        table.acknowledge("curve", taken.version)
    return median(seconds) / 10_000 * 1e9


def roof(report: Report, seed: int, rows: int, rows_per_s: float) -> None:
    """What one thread gets from this memory, and our look-ups' share of it: a key moves a line of the index and a row in, and
    a row out."""
    say("the roof")
    source, target = (reserve((2**27,), np.float32) for _ in range(2))
    started = time.perf_counter()
    source[:] = 1  # memory that this process never had: what a table's first growth gets
    report.add("roof_first_touch", source.nbytes / (time.perf_counter() - started) / 1e9, "GB/s", "higher")
    target[:] = 1
    seconds = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        np.copyto(target, source)
        seconds.append(time.perf_counter() - started)
    copied = 2 * source.nbytes / median(seconds)
    report.add("roof_copy", copied / 1e9, "GB/s", "higher")
    report.add("roof_copy_share", rows_per_s * (64 + 8 * DIM) / copied, "ratio", "higher")
    del source, target
    lines, rng = reserve((rows * DIM // 16, 16), np.float32), np.random.default_rng(seed)
    lines[:] = 1
    out, at = np.empty((CALL, 16), np.float32), np.empty((3, CALL), np.int32)
    seconds = []
    for _ in range(ROUNDS + 1):
        spent = 0.0
        for _ in range(ROUND_KEYS // CALL):
            at[0] = rng.integers(0, len(lines), CALL)
            started = time.perf_counter()
            kernels.gather(lines, at, out, False)
            spent += time.perf_counter() - started
        seconds.append(spent)
    random_lines = ROUND_KEYS / median(seconds[1:])
    report.add("roof_random_lines", random_lines / 1e6, "M/s", "higher")
    report.add("roof_random_share", rows_per_s * 2 / random_lines, "ratio", "higher")


def two_threads(report: Report, table: CpuTable, keys: Int64, seed: int) -> None:
    """Look-ups and updates a second when two threads share a batch of 64k keys: readers need no lock, writers take turns."""
    rng, both = np.random.default_rng(seed), 2 * CALL
    gradients, slots = np.zeros((CALL, DIM), np.float32), np.zeros(CALL, np.int32)
    verbs: dict[str, Callable[[Int64], object]] = {
        "find_gather_two_threads": lambda asked: table.lookup(slots, asked),
        "find_adagrad_two_threads": lambda asked: table.apply_gradients(slots, asked, gradients, 0),
    }
    with ThreadPoolExecutor(2) as pool:
        for name, verb in verbs.items():
            seconds = []
            for _ in range(ROUNDS):
                asked = keys[rng.integers(0, len(keys), 16 * both)].reshape(2, -1, CALL)
                started = time.perf_counter()
                list(pool.map(lambda half, use=verb: [use(part) for part in half], asked))  # type: ignore[misc]
                seconds.append(time.perf_counter() - started)
            report.add(name, 16 * both / median(seconds) / 1e6, "M rows/s", "higher")


def chart() -> str:
    """The curve of the committed result, as SVG."""
    result = json.loads((RESULTS / "table.json").read_text(encoding="utf-8"))
    values = {row["name"]: row["value"] for row in result["results"]}
    series = {
        title: [(float(size), values[f"{cost}_{name}"]) for name, size in SIZES.items() if f"{cost}_{name}" in values]
        for cost, title in COSTS.items()
    }
    return line_chart(f"Cost of a key, rows of {DIM} values, one thread", "rows in the table", "ns a key", series)


if __name__ == "__main__":
    (ROOT / "docs" / "table_curve.svg").write_text(chart(), encoding="utf-8")
