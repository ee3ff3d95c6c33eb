"""Retrieval at 10k, 100k and 1M items of 32 numbers: what each type of index finds, costs and weighs; filters; a running system.

Recall is the share of the 100 found that are no worse than the 100th of comparing everything: items may look alike. Times are CPU
time of one thread. `towers`: the generated world's items, searched by its users; `clustered`: around 2,000 centres, spread .5;
`loose`: the same around centres of length 1, hardly clusters; `uniform`: none.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from load_tests import retrieval_served
from load_tests.common import Report, choose_parts, percentile, run, say
from recsys import config as configuration
from recsys.retrieval.item_index import ItemIndex
from recsys.retrieval.searcher import Searcher
from recsys.testing.trained_world import TrainedWorld
from recsys.testing.vectors import clustered, near, uniform
from recsys.types import Bool, Float32

PARTS = ("chosen", "rivals", "world", "served")
SIZES = (10_000, 100_000, 1_000_000)
DIM, TOP, QUERIES = 32, 100, 300
CLICKS, EXPLORED = 10_000, 2000
"""Of the generated world: clicks its towers are trained on, and answers its bandit learned from."""
SELECTIVITY = (0.5, 0.1, 0.03, 0.01, 0.001)
CATEGORIES = 100
"""Values of the attribute that goes with where an item lies."""
HNSW_LINKS, PQ_BYTES = 16, 16

Search = Callable[[Float32], Any]


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--items", type=int, default=1_000_000, help="of the largest measurements")
    choose_parts(parser, PARTS)


def measure(options: argparse.Namespace, report: Report) -> None:
    measured = {
        "chosen": lambda: _chosen(report, options),
        "rivals": lambda: [_rivals(report, size, options.seed) for size in SIZES if size <= options.items],
        "world": lambda: _world(report, options),
        "served": lambda: retrieval_served.measure(report, options.items, options.seed),
    }
    report.keep()
    for part in options.parts:
        measured[part]()


def _chosen(report: Report, options: argparse.Namespace) -> None:
    """Our index over clustered vectors of each size, its filters, and over vectors that are harder to search."""
    for size in (size for size in SIZES if size <= options.items):
        vectors = _vectors("clustered", size, options.seed)
        queries = near(vectors, QUERIES, seed=options.seed)
        searcher = _ours(report, f"{size}_chosen", vectors, queries)
        if size == SIZES[-1]:
            _filters(report, searcher, vectors, queries)
    for kind in ("loose", "uniform"):
        vectors = _vectors(kind, options.items, options.seed)
        _ours(report, kind, vectors, near(vectors, QUERIES, seed=options.seed))


def _vectors(kind: str, size: int, seed: int) -> Float32:
    if kind == "uniform":
        return uniform(size, DIM, seed=seed)
    return clustered(size, DIM, unit_centres=kind == "loose", seed=seed)


def _timed(calls: int, call: Callable[[int], Any]) -> tuple[list[Any], list[float]]:
    """What each call gave, and its CPU time, ms."""
    call(0)
    found, times = [], []
    for number in range(calls):
        started = time.thread_time()
        found.append(call(number))
        times.append((time.thread_time() - started) * 1000)
    return found, times


def _recall(found: list[Any], vectors: Float32, queries: Float32, allowed: Bool | None = None) -> float:
    rows = np.arange(len(vectors)) if allowed is None else np.flatnonzero(allowed)
    among = vectors if allowed is None else vectors[rows]
    top = min(TOP, len(rows))
    scores, _ = faiss.knn(queries[: len(found)], among, top, metric=faiss.METRIC_INNER_PRODUCT)
    hits = [
        np.count_nonzero(vectors[some] @ query >= least - 1e-6)
        for some, query, least in zip(found, queries, scores[:, -1], strict=False)
    ]
    return float(np.sum(hits)) / (top * len(found))


def _rivals(report: Report, size: int, seed: int) -> None:
    """Other types of index over the clustered vectors."""
    vectors = _vectors("clustered", size, seed)
    queries = near(vectors, QUERIES, seed=seed)
    lists = int(2 * np.sqrt(size))
    quantizer = faiss.IndexFlatIP(DIM)
    metric = faiss.METRIC_INNER_PRODUCT
    flat = faiss.IndexFlatIP(DIM)
    hnsw = faiss.IndexHNSWFlat(DIM, HNSW_LINKS, metric)
    hnsw.hnsw.efConstruction, hnsw.hnsw.efSearch = 40, 200
    pq = faiss.IndexIVFPQ(quantizer, DIM, lists, PQ_BYTES, 8, metric)
    pq.nprobe, pq.cp.max_points_per_centroid = 32, 40
    for name, index in (("flat", flat), ("hnsw", hnsw), ("ivf_pq", pq)):
        say(f"{name} over {size}")
        started = time.thread_time()
        if not index.is_trained:
            index.train(vectors[:: max(1, size // (40 * lists))])
        index.add(vectors)
        report.add(f"{size}_{name}_build", time.thread_time() - started, "cpu s")
        found, times = _timed(QUERIES, lambda n, index=index: index.search(queries[n : n + 1], TOP)[1][0])  # type: ignore[misc]
        _search_figures(report, f"{size}_{name}", _recall(found, vectors, queries), times)
        report.add(f"{size}_{name}_memory", _bytes_of(index) / size, "bytes an item")


def _bytes_of(index: Any) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index"
        faiss.write_index(index, str(path))
        return path.stat().st_size


def _search_figures(report: Report, name: str, recall: float, times: list[float]) -> None:
    report.add(f"{name}_recall_at_100", recall, "share", "higher")
    report.add(f"{name}_search_p50", percentile(times, 50), "cpu ms")
    report.add(f"{name}_search_p99", percentile(times, 99), "cpu ms")


def _ours(report: Report, name: str, vectors: Float32, queries: Float32) -> Searcher:
    """The index that the project chooses, from building to searching."""
    say(f"{name}: our index over {len(vectors)}")
    started = time.thread_time()
    index = ItemIndex.build(np.arange(len(vectors), dtype=np.int32), vectors)
    report.add(f"{name}_build", time.thread_time() - started, "cpu s")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index"
        index.save(path)
        report.add(f"{name}_memory", path.stat().st_size / len(vectors), "bytes an item")
        searcher = Searcher(ItemIndex.load(path))
    found, times = _timed(len(queries), lambda n: searcher.search(queries[n], TOP)[0])
    _search_figures(report, name, _recall(found, vectors, queries), times)
    return searcher


def _filters(report: Report, searcher: Searcher, vectors: Float32, queries: Float32) -> None:
    """Filters that let a share of the items through: drawn at random, and an attribute that goes with where an item lies."""
    generator = np.random.default_rng(1)
    value = (vectors @ generator.standard_normal((DIM, CATEGORIES), np.float32)).argmax(1)
    masks = {f"random_{1000 * share:g}_of_1000": generator.random(len(vectors)) < share for share in SELECTIVITY}
    masks |= {f"category_{count}": value < count for count in (1, 10, 30)}
    for name, allowed in masks.items():
        found, times = _timed(100, lambda n, allowed=allowed: searcher.search(queries[n], TOP, (), allowed)[0])  # type: ignore[misc]
        _search_figures(report, f"filter_{name}", _recall(found, vectors, queries, allowed), times)


@contextlib.contextmanager
def _trained(options: argparse.Namespace, vectors: Float32 | None = None) -> Iterator[TrainedWorld]:
    say(f"a world of {options.items} items, {CLICKS} clicks")
    with tempfile.TemporaryDirectory() as folder:
        config = configuration.parse({"data_dir": folder})
        yield TrainedWorld(config, num_items=options.items, num_clicks=CLICKS, seed=options.seed, vectors=vectors)


def _world(report: Report, options: argparse.Namespace) -> None:
    """Towers trained on the world's clicks, and every source of a request over its items; then over clustered vectors."""
    with _trained(options) as world:
        vectors, users = world.item_vectors(), world.user_vectors(QUERIES)
        _ours(report, "towers", vectors, users)
        del vectors
        _stage(report, "source_stage", world)
    del world
    with _trained(options, _vectors("clustered", options.items, options.seed)) as world:
        _stage(report, "source_stage_clustered", world)


def _stage(report: Report, name: str, world: TrainedWorld) -> None:
    """Every source of a request, once the bandit has learned, and the share of requests that it brings candidates for."""
    world.explore(EXPLORED)
    opened = [world.opened(world.any_user(), f"timed-{n}") for n in range(QUERIES)]
    gathered, times = _timed(QUERIES, lambda n: world.pipeline.gather(opened[n]))
    report.add(f"{name}_p50", percentile(times, 50), "cpu ms")
    report.add(f"{name}_p99", percentile(times, 99), "cpu ms")
    explored = [any("bandit" in one.candidates.sources(n) for n in range(len(one.candidates.rows))) for one in gathered]
    report.add(f"{name}_explored", float(np.mean(explored)), "share", "higher")


if __name__ == "__main__":
    sys.exit(run("retrieval", measure, arguments))
