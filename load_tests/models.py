"""The ranker's speed: a request's 500 candidates, their features and scores, on one core; training in turns with plain PyTorch.

Times of one thread are its CPU time, in turns with a matmul of the same thread and in units of the reference machine's: what
neighbours on the machine cost, both pay. Sides that are compared take turns. Run it with OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy as np
import psutil
import torch
from torch.utils.flop_counter import FlopCounterMode

from load_tests.common import ROOT, Report, read_budgets, run, say
from load_tests.plain_model import Attention, PlainLearner, collate
from recsys import config
from recsys.candidates.sources import Sources
from recsys.config import Config
from recsys.features.build import Features, UserFeatures, item_features, user_features
from recsys.features.catalogue import Catalogue
from recsys.features.schema import Schema
from recsys.model import fused, scoring
from recsys.model.assemble import ranker_inputs
from recsys.model.din import TargetAttention
from recsys.model.layers import seeded
from recsys.model.layouts import layouts
from recsys.model.plan import plan
from recsys.model.torch_scoring import TorchScoring
from recsys.parameters.store import ParameterStore
from recsys.ranking.scorer import Scorer
from recsys.ranking.two_stages import TwoStages
from recsys.table.tables import Tables
from recsys.training.learner import Batch, Learner
from recsys.types import HistoryEvent, Item

CANDIDATES, HISTORY, DIM, IDS = 500, 50, 32, 3000
SCORINGS, STEPS, BATCHES = 60, 60, 8
USERS, ITEMS, PAIRS = 20_000, 7000, 200_000
"""Different values of a slot in training; popular ones are drawn more often."""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="a few rounds of each: for developing")


def measure(options: argparse.Namespace, report: Report) -> None:
    """Compile, score, train."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(options.seed)
    compiling(report)
    fused.warm_up()
    scoring.warm_up()
    rounds = 10 if options.quick else SCORINGS
    say("building features")
    building(report, rng, rounds)
    say("scoring")
    one_request(report, rng, rounds)
    attention(report, rounds)
    say("training in turns with plain PyTorch")
    training(report, rng, 10 if options.quick else STEPS)


def compiling(report: Report) -> None:
    """What a first start and a later one pay for the fused operations, each in a process of its own."""
    code = "from recsys.model import fused; print(fused.warm_up())"
    with tempfile.TemporaryDirectory(prefix="recsys-models-") as folder:
        environment = psutil.Process().environ() | {"NUMBA_CACHE_DIR": folder}
        for name in ("compile_first", "compile_cached"):
            command = [sys.executable, "-c", code]
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
            report.add(name, float(done.stdout), "s")


def serving() -> Config:
    """Twenty slots of 32 numbers, twelve crosses, a history of 50 items, four tasks of two groups; all sizes are the defaults."""
    attributes = [f"a{n}" for n in range(10)]
    return config.parse(
        {
            "catalogue": {"attributes": attributes, "multivalued": []},
            "features": {
                "context": [f"c{n}" for n in range(8)],
                "history_attributes": [],
                "history_len": HISTORY,
                "crosses": [*(["user", f"a{n}"] for n in range(7)), ["history", "item"]],
                "cross_history": 5,
            },
            "tasks": [{"name": f"t{n}", "types": ["click"], "group": ("inter", "watch")[n // 2]} for n in range(4)],
            "model": {"dim": DIM},
            "table": {"capacity": 200_000},
        }
    )


def some_features(
    schema: Schema, rng: np.random.Generator, items: int, history: int, draw: Callable[[int, Any], Any]
) -> Features:
    """A request with every column present; `draw(slots, shape)` makes the keys."""

    def block(slots: Any, *shape: int) -> tuple[Any, Any]:
        keys = draw(slots, (*shape, len(slots)))
        return keys, np.ones(keys.shape, np.bool_)

    (shared, shared_mask), (past, past_mask) = block(schema.shared_slots), block(schema.history_slots, history)
    (item, item_mask), (crosses, cross_mask) = block(schema.item_slots, items), block(schema.cross_slots, items)
    user = UserFeatures(
        shared_keys=shared,
        shared_mask=shared_mask,
        history_keys=past,
        history_mask=past_mask,
        history_kinds=np.ones(history, np.uint8),
        history_gaps=np.zeros(history, np.uint8),
    )
    return Features(
        user=user,
        item_keys=item,
        item_mask=item_mask,
        cross_keys=crosses,
        cross_mask=cross_mask,
        numbers=rng.standard_normal((items, len(schema.numbers)), np.float32),
    )


def cpu(report: Report, name: str, work: Callable[[], object], rounds: int) -> None:
    """Median CPU time of this thread, as the reference machine would take it, and as it was."""
    reference_ms = read_budgets()["calibration"]["matmul"] * 1000
    left, right = (np.random.default_rng(n).standard_normal((768, 768), np.float32) for n in range(2))
    product = np.empty_like(left)
    times, units = [], []
    for number in range(rounds + 5):
        started = time.thread_time()
        np.matmul(left, right, out=product)
        middle = time.thread_time()
        work()
        if number >= 5:
            units.append(middle - started)
            times.append(time.thread_time() - middle)
    report.add(name, median(t / u for t, u in zip(times, units, strict=True)) * reference_ms, "cpu ms")
    report.add(f"{name}_raw", median(times) * 1000, "cpu ms")


def building(report: Report, rng: np.random.Generator, rounds: int) -> None:
    """Keys of 500 candidates of a catalogue of 50,000, twenty slots and twelve crosses; and with the counters read before."""
    settings = serving()
    schema = Schema.of(settings)
    sources = Sources(settings, schema, Catalogue(schema))
    for n in range(50_000):
        attributes = {f"a{a}": f"v{n * (a + 3) % IDS}" for a in range(10)}
        sources.catalogue.apply(Item(item_id=str(n), attributes=attributes))
    history = tuple(
        HistoryEvent(time_ms=n, event_id=str(n), item_id=str(item), type="click")
        for n, item in enumerate(rng.integers(0, 50_000, HISTORY).tolist())
    )
    context = {f"c{n}": f"value {n}" for n in range(8)}
    rows = rng.choice(50_000, CANDIDATES, replace=False).astype(np.int32)
    user = user_features(schema, sources.catalogue, "user", history, context)
    signals = sources.signals(user, [], rows, 0)
    decay = settings.features.affinity_decay

    def keys() -> None:
        user = user_features(schema, sources.catalogue, "user", history, context)
        item_features(schema, sources.catalogue, user, rows, signals, decay)

    cpu(report, "features_500", keys, rounds)
    cpu(report, "features_500_with_counters", lambda: (sources.signals(user, [], rows, 0), keys()), rounds)


def one_request(report: Report, rng: np.random.Generator, rounds: int) -> None:
    """One request through the light stage and the network, as the ranking service does it, and its parts."""
    settings = serving()
    schema = Schema.of(settings)
    store = ParameterStore(layouts(settings, schema), schema.hash)
    for table in (store.tables["deep"], store.tables["wide"]):
        for number in table.layout.slots:
            table.lookup_train(np.full(IDS, number, np.int32), np.arange(IDS), 0)
    features = some_features(schema, rng, CANDIDATES, HISTORY, lambda _, shape: rng.integers(0, IDS, shape))
    scorer, stages, most = (
        Scorer(settings, schema, store),
        TwoStages(settings),
        settings.ranking.full_candidates,
    )
    lay = plan(schema, [features])
    deep, wide = scorer._rows.lookup([lay.deep, lay.wide]).values
    by_torch = TorchScoring(settings, schema, None)

    def forward() -> None:
        stages.score(scorer.networks.current.scores, lay, (deep, wide), most)

    with torch.inference_mode():
        every = ranker_inputs(schema, lay, torch.from_numpy(deep), torch.from_numpy(wide), DIM)
        cpu(report, "score_500", forward, rounds)
        with FlopCounterMode(display=False) as flops:
            stages.score(by_torch, lay, (deep, wide), most)  # nobody counts what the kernels do
        report.add("score_500_gflop", flops.get_total_flops() / 1e9)
        cpu(report, "score_500_all_by_network", lambda: by_torch.ranker(every), rounds)
        cpu(report, "score_500_with_rows", lambda: scorer.rank(features, most), rounds)
        cpu(report, "plan_500", lambda: plan(schema, [features]), rounds)


def attention(report: Report, rounds: int) -> None:
    """DIN with its published layers, 80 and 40: what each of two cores does of it, all on one core, and the naive form."""
    published = TargetAttention(DIM, HISTORY, (80, 40), generator=seeded(0)).eval()
    naive = Attention(DIM, HISTORY, (80, 40)).eval()
    candidates, history = torch.randn(CANDIDATES, DIM), torch.randn(1, HISTORY, DIM)
    mask, gaps = torch.ones(1, HISTORY, dtype=torch.bool), torch.zeros(1, HISTORY, dtype=torch.int64)
    half = candidates[: CANDIDATES // 2]

    def pool(part: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return published(part, history, mask, torch.zeros(len(part), dtype=torch.int64), gaps)

    def plain() -> torch.Tensor:
        with torch.inference_mode():
            many = history.expand(CANDIDATES, -1, -1)
            return naive(candidates, many, torch.ones(CANDIDATES, HISTORY))

    cpu(report, "din_80_40_two_cores", lambda: pool(half), rounds)
    cpu(report, "din_80_40_one_core", lambda: pool(candidates), rounds)
    cpu(report, "din_80_40_naive_one_core", plain, rounds)


def training(report: Report, rng: np.random.Generator, steps: int) -> None:
    """The short-video model, batches of 256 requests with one item each, rows by Adagrad on both sides; ours also row-wise, as configured."""
    settings = config.load(ROOT / "deploy" / "configs" / "kuairand.toml", {})
    schema = Schema.of(settings)
    size = settings.training.batch_size

    def draw(slots: Any, shape: tuple[int, ...]) -> Any:
        most = np.where(slots >= len(schema.deep_slots), PAIRS, np.where(slots == 0, USERS, ITEMS))
        return (most * rng.random(shape) ** 3).astype(np.int64)

    batches = [
        Batch(
            features=[
                some_features(schema, rng, 1, int(rng.integers(5, schema.history_len + 1)), draw) for _ in range(size)
            ],
            labels=rng.random((size, len(schema.tasks))) < 0.3,
            mask=np.ones((size, len(schema.tasks)), np.bool_),
            first=True,
        )
        for _ in range(BATCHES)
    ]
    ours, rowwise = (
        Learner(given, schema, Tables(layouts(given, schema)))
        for given in (
            settings.model_copy(update={"model": settings.model.model_copy(update={"row_optimizer": name})})
            for name in ("adagrad", "rowwise_adagrad")
        )
    )
    theirs = PlainLearner(settings, schema, USERS * len(schema.deep_slots), PAIRS * len(schema.wide_slots))

    def mine(batch: Batch) -> None:
        assert not ours.learn(batch, 0)

    def configured(batch: Batch) -> None:
        assert not rowwise.learn(batch, 0)

    def plain(batch: Batch) -> None:
        labels = torch.from_numpy(batch.labels.astype(np.float32))
        theirs.learn(collate(schema, batch.features, USERS, PAIRS), labels)

    seconds = in_turns((mine, configured, plain), batches, steps)
    for name, side in (("", 0), ("_rowwise", 1)):
        ratio = median(b / a for a, b in zip(seconds[side], seconds[2], strict=True))
        report.add(f"training_vs_plain{name}", ratio, "ratio", "higher")
        report.add(f"training_step{name}", median(seconds[side]) * 1000, "cpu ms")
    report.add("training_step_plain", median(seconds[2]) * 1000, "cpu ms")


def in_turns(sides: Sequence[Callable[[Batch], None]], batches: Sequence[Batch], steps: int) -> list[list[float]]:
    """CPU seconds of each side's step, one after the other on the same batch."""
    seconds: list[list[float]] = [[] for _ in sides]
    for number in range(steps + 2 * len(batches)):
        for side, times in zip(sides, seconds, strict=True):
            started = time.process_time()
            side(batches[number % len(batches)])
            if number >= 2 * len(batches):
                times.append(time.process_time() - started)
    return seconds


if __name__ == "__main__":
    sys.exit(run("models", measure, arguments))
