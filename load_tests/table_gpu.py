"""The CUDA table against plain torch and the device's copy bandwidth: `python -m load_tests.table_gpu --json --save`.

Needs torch, triton, numpy and our CUDA part; the parameter service is measured too where what it needs is installed.
Without a device it measures nothing, and says so.

Every time is a median over batches that differ, ours and torch's in turn, between two events of the device, which has the
next batch waiting: so a small batch's time is what the host needs to start it. A share is the least that must be moved (each
key, gradient and answer once; each distinct row and its index entry once, what is changed once more) over the bytes that a
plain copy moves in that time: 552 bytes a distinct key of 64 values for find + copy, 1,392 with row-wise Adagrad.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

from recsys.table.base import Layout, Segment, SlotPolicy
from recsys.table.cuda_rows import DeviceRows

DIMS = (32, 64, 128)
BATCHES = (8_192, 65_536, 1_048_576)
LOOKUPS = (600, 4_200)
"""Keys that one request looks up: at least, and at most."""
ZIPF = 1.05
ROUNDS, WARM_UP, DIFFERENT = 15, 3, 5
FIRST_ROWS = 10_000_000
MOST_ROWS = {32: 500_000_000, 64: 400_000_000, 128: 200_000_000}
CUDA = torch.device("cuda")
SHARE_OF_MEMORY = 0.95
"""Of the free memory, for the largest table."""
ROOM = 8 * BATCHES[-1]
"""Rows that stay free: a table that might be full asks the device for its counts in every batch."""
SECTOR = 32
"""Bytes: the least that is read from memory."""
HKV = {8: (128_000_000, 2.470), 32: (128_000_000, 2.272), 64: (64_000_000, 1.982)}
"""HierarchicalKV's README: capacity, 2^30 finds a second at load 0.5 of 2^20 keys of which 0.6 are there, on an A100 of
1,935 GB/s. Of those a copy moves the same share as of an H200's 4,800: 0.87."""
HKV_HITS, HKV_BYTES_PER_S = 0.6, 0.87 * 1.935e12
FOLDER = Path(__file__).resolve().parent
RESULTS, BUDGETS = FOLDER / "results" / "table_gpu.json", FOLDER / "budgets.toml"


class Clock:
    """The seconds that are left."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        return self._end - time.monotonic()


def timed(works: list[Callable[[int], object]]) -> list[float]:
    """Median seconds of each work, which are called in turn with the number of a batch."""
    events: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in works]
    for turn in range(WARM_UP + ROUNDS):
        for number, work in enumerate(works):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work(turn % DIFFERENT)
            end.record()
            events[number].append((begin, end))
        if turn < WARM_UP:
            torch.cuda.synchronize()  # compiled by now
    torch.cuda.synchronize()
    return [median(begin.elapsed_time(end) / 1000 for begin, end in each[WARM_UP:]) for each in events]


def timed_here(work: Callable[[int], object], rounds: int = 300) -> dict[str, float]:
    """Median and 99th percentile of seconds on the host, to the answer."""
    seconds = []
    for turn in range(WARM_UP + rounds):
        begin = time.perf_counter()
        work(turn % DIFFERENT)
        seconds.append(time.perf_counter() - begin)
    half, most = np.quantile(seconds[WARM_UP:], [0.5, 0.99]).tolist()
    return {"seconds": half, "p99_seconds": most}


def replayed(table: DeviceRows, work: Callable[[int], object]) -> float:
    """Median seconds of the work as a graph of the device: what it takes without the host.

    A graph that makes rows could only be replayed as long as no memory grows; here all rows are there."""
    work(0)
    graphs = [torch.cuda.CUDAGraph() for _ in range(DIFFERENT)]
    for turn, graph in enumerate(graphs):
        assert len(table.index)  # waits: with the counts known, none are asked for within the graph
        with torch.cuda.graph(graph):
            work(turn)
    return timed([lambda turn: graphs[turn].replay()])[0]


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
    ranks: Tensor = (uniform * ((rows + 1.0) ** (1 - ZIPF) - 1) + 1) ** (1 / (1 - ZIPF))
    return (ranks.to(torch.int64) - 1).clamp_(0, rows - 1)


def slots_of(count: int, device: torch.device = CUDA) -> Tensor:
    return torch.zeros(count, dtype=torch.int32, device=device)


def layout_of(dim: int, capacity: int) -> Layout:
    segment = Segment(name="deep", dim=dim, init_scale=0.01)
    return Layout(name="deep", segments=(segment,), slots={0: SlotPolicy()}, capacity=capacity)


def filled(dim: int, rows: int, device: torch.device = CUDA, room: int = ROOM) -> DeviceRows:
    """A table of so many rows."""
    table = DeviceRows(layout_of(dim, rows + room), device)
    for start in range(0, rows, BATCHES[-1]):
        numbers = torch.arange(start, min(start + BATCHES[-1], rows), device=device)
        table.rows_train(slots_of(len(numbers), device), keys_of(numbers), 0, 1)
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
    slots = slots_of(batch)
    gradients = torch.randn((batch, dim), generator=generator, device="cuda")
    distinct = median(len(torch.unique(each)) for each in numbers)
    now_ms = iter(range(8_000, 2**40, 8_000))  # so that every batch writes when its rows were seen

    def find(turn: int) -> object:
        return table.lookup(slots, keys[turn])

    def train(turn: int) -> None:
        now = next(now_ms)
        _, ordered = table.lookup_train(slots, keys[turn], now, 1)
        table.steps.apply_gradients(ordered, gradients, now, 1)

    ours: list[tuple[str, Callable[[int], object]]] = [("find_copy", find), ("lookup_rowwise_adagrad", train)]
    theirs: list[Callable[[int], object]] = []
    if plain is not None:
        theirs = [lambda turn: plain.find(numbers[turn]), lambda turn: plain.train(numbers[turn], gradients)]
    found = batch * (8 + 4 * dim) + distinct * (SECTOR + 4 * dim)
    least = (found, found + batch * (8 + 4 * dim) + distinct * (8 * dim + 2 * SECTOR))
    for number, (name, work) in enumerate(ours):
        seconds, graph = timed([work, *theirs[number : number + 1]]), replayed(table, work)
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
            "graph_seconds": graph,
            "graph_share_of_copy_bandwidth": least[number] / graph / bandwidth,
            "torch_seconds": seconds[1] if theirs else None,
            "times_torch": seconds[1] / seconds[0] if theirs else None,
        }


def hkv(dim: int, bandwidth: float) -> Iterator[dict[str, Any]]:
    """What HierarchicalKV measures: find of unique keys of which some are there, and inserts, at load 0.5."""
    capacity, published = HKV[dim]
    rows, batch = capacity // 2, BATCHES[-1]
    table = filled(dim, rows, room=capacity - rows)
    generator = torch.Generator(CUDA).manual_seed(dim)
    picks = [torch.randperm(rows, generator=generator, device="cuda")[:batch] for _ in range(DIFFERENT)]
    hits = torch.arange(batch, device="cuda") % 10 < HKV_HITS * 10
    keys = [keys_of(torch.where(hits, pick, pick + rows)) for pick in picks]
    slots = slots_of(batch)
    found, rows_only = timed(
        [lambda turn: table.lookup(slots, keys[turn]), lambda turn: table.index.find(slots, keys[turn])]
    )
    fresh = [
        keys_of(torch.arange(start, start + batch, device="cuda")) for start in range(rows, capacity - batch, batch)
    ]
    (inserted,) = timed([lambda _: table.rows_train(slots, fresh.pop(), 0, 1)])
    scaled = published * 2**30 * bandwidth / HKV_BYTES_PER_S
    for name, seconds in (("hkv_find", found), ("hkv_find_rows", rows_only), ("hkv_insert", inserted)):
        row = {
            "name": name,
            "dim": dim,
            "rows": rows,
            "batch": batch,
            "seconds": seconds,
            "keys_per_s": batch / seconds,
        }
        yield row | {"times_hkv_scaled": batch / seconds / scaled if name == "hkv_find" else None}


def asked(rows: int) -> Iterator[tuple[int, list[Any]]]:
    """Keys of one request: different ones each time, as arrays."""
    rng = np.random.default_rng(0)
    for count in LOOKUPS:
        yield count, [keys_of(torch.from_numpy(rng.integers(0, rows, count))).numpy() for _ in range(DIFFERENT)]


def request(dim: int = 32, rows: int = 1_000_000) -> Iterator[dict[str, Any]]:
    """Lookups of one request, from arrays to arrays."""
    from recsys.table.cuda import CudaTable  # needs numba too

    table = CudaTable(layout_of(dim, rows))
    table.rows = filled(dim, rows)
    for count, keys in asked(rows):
        slots, row = np.zeros(count, np.int32), {"name": "table_lookup", "dim": dim, "rows": rows, "batch": count}
        yield row | timed_here(lambda turn: table.lookup(slots, keys[turn]))  # noqa: B023


def service(dim: int = 32, rows: int = 1_000_000) -> Iterator[dict[str, Any]]:
    """The same through the parameter service's store and gRPC server, over a Unix socket."""
    from recsys.model.plan import Block
    from recsys.parameters.grpc_parameters import GrpcParameters, serve
    from recsys.parameters.store import ParameterStore

    store = ParameterStore([layout_of(dim, 2 * rows)], "schema", "cuda")
    everything = keys_of(torch.arange(rows)).numpy()
    values = np.zeros((rows, dim), np.float32)
    store.tables["deep"].write(np.zeros(rows, np.int32), everything, values, 0)
    with tempfile.TemporaryDirectory() as folder:
        server = serve(store, f"unix:{folder}/socket", "schema")
        client = GrpcParameters(f"unix:{folder}/socket", "schema", timeout_s=5.0)
        try:
            for count, keys in asked(rows):
                blocks = [[Block(layout="deep", slots=np.zeros(count, np.int32), keys=each)] for each in keys]
                row = {"name": "service_lookup", "dim": dim, "rows": rows, "batch": count}
                yield row | timed_here(lambda turn: client.lookup(blocks[turn]))  # noqa: B023
        finally:
            client.close()
            server.stop(grace=None).wait()


def largest(dim: int) -> int:
    """Rows of the largest table that fits: values, records, free list, and two generations of the index."""
    free, _ = torch.cuda.mem_get_info()
    rows = MOST_ROWS[dim]
    while (rows + ROOM) * (4 * dim + 20) + 24 * triton.next_power_of_2(int(rows / 0.6)) > free * SHARE_OF_MEMORY:
        rows -= 1_000_000
    return rows


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
    for dim in HKV:
        if clock.left() < 40:
            skipped.append(f"hkv, dim {dim}: no time left")
            continue
        results += hkv(dim, bandwidth)
        torch.cuda.empty_cache()
    for lookups in (request, service):
        try:
            results += lookups()
        except ImportError as error:
            skipped.append(f"{lookups.__name__}: {error}")
    return results, skipped


def judged(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The budgeted figures: shares of 64 values and the largest batch of uniform keys, in the first table and the largest."""
    values: dict[str, float] = {}
    for case in cases:
        if case["dim"] == 64 and case["batch"] == BATCHES[-1] and case.get("keys") == "uniform":
            size = "10m" if case["rows"] == FIRST_ROWS else "largest"
            values[f"{case['name']}_share_{size}"] = case["share_of_copy_bandwidth"]
        if case["dim"] == 64 and case["name"] == "hkv_find":
            values["find_vs_hkv_scaled"] = case["times_hkv_scaled"]
    rows = []
    for name, budget in tomllib.loads(BUDGETS.read_text(encoding="utf-8"))["table_gpu"].items():
        value = float(f"{values[name]:.6g}") if name in values else None
        rows.append({"name": name, "value": value, **budget, "met": value is not None and value >= budget["budget"]})
    return rows


def report(seconds: float) -> dict[str, Any]:
    """The whole result; without a device, one that says that nothing was measured."""
    versions = {"torch": str(torch.__version__), "triton": triton.__version__}
    if not torch.cuda.is_available():
        return {
            "device": None,
            "versions": versions,
            "note": "not measured: no CUDA device",
            "results": [],
            "cases": [],
        }
    clock = Clock(seconds)
    bandwidth = copy_bandwidth()
    cases, skipped = measure(clock, bandwidth)
    return {
        "device": torch.cuda.get_device_name(),
        "versions": versions,
        "copy_bytes_per_s": bandwidth,
        "rounds": ROUNDS,
        "seconds": seconds - clock.left(),
        "skipped": skipped,
        "results": judged(cases),
        "cases": cases,
    }


def described(row: dict[str, Any]) -> str:
    """One line of the printed report."""
    more = [f"{row['share_of_copy_bandwidth']:.0%} of a copy"] if "share_of_copy_bandwidth" in row else []
    more += [
        f"{row[key]:.2f} x {name}"
        for key, name in (("times_torch", "torch"), ("times_hkv_scaled", "HKV"))
        if row.get(key)
    ]
    rate = f"{row['batch'] / row['seconds'] / 1e6:8.1f} M keys/s, {row['seconds'] * 1e6:8.1f} us"
    return f"{row['name']:24}{row['dim']:4} x {row['rows']:11,} {row.get('keys', ''):9}{row['batch']:9,}: " + ", ".join(
        [rate, *more]
    )


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
        for row in result["cases"]:
            print(described(row))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
