"""The trainer's speed: records through the joiner, and what an example costs in a step of one request and in a step of twenty.

CPU time of one process; steps of both sizes take turns. Run it with OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np

from load_tests.common import Report, run, say
from load_tests.models import some_features
from recsys import config
from recsys.config import Config
from recsys.events import messages
from recsys.features.build import encode
from recsys.features.schema import Schema
from recsys.training import learner
from recsys.training.joiner import Joiner
from recsys.training.journal import Entry
from recsys.training.trainer import Trainer
from recsys.types import Feedback, Impression, Item, Record, ShownItem

ITEMS, USERS, SHOWN, VALUES = 2000, 500, 10, 5000
KINDS = ("click", "view", "like", "click")
"""Feedback of each request."""
REQUESTS, SIZES = 200, (1, 20)
"""Requests of a turn of the joiner; of a step."""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--turns", type=int, default=40, help="of each measurement; a quarter more come before them")


def measure(options: argparse.Namespace, report: Report) -> None:
    """Join, then learn."""
    learner.warm_up()
    settings, rng = config.parse({}), np.random.default_rng(options.seed)
    say("joining")
    joined(report, settings, rng, options.turns)
    say("steps of one request and of twenty")
    steps(report, settings, rng, options.turns)


def answered(schema: Schema, rng: np.random.Generator, name: str, now_ms: int) -> list[Impression | Feedback]:
    """A request's impression, and what its user did."""
    items = [f"item-{n}" for n in rng.choice(ITEMS, SHOWN, replace=False)]
    history, user = int(rng.integers(1, schema.history_len + 1)), f"user-{rng.integers(USERS)}"
    features = some_features(
        schema, rng, SHOWN, history, lambda _, shape: (VALUES * rng.random(shape) ** 3).astype(int)
    )
    predictions = dict.fromkeys(schema.tasks, 0.1)
    impression = Impression(
        request_id=name,
        user_id=user,
        time_ms=now_ms,
        items=tuple(ShownItem(item_id=i, position=n, predictions=predictions) for n, i in enumerate(items, start=1)),
        features=encode(features),
        schema=schema.hash,
    )
    return [
        impression,
        *(
            Feedback(event_id=f"{name}-{n}", user_id=user, item_id=items[n], type=kind, time_ms=now_ms, request_id=name)
            for n, kind in enumerate(KINDS)
        ),
    ]


def ends(settings: Config) -> int:
    """Emissions of a request."""
    return len({task.window_s for task in settings.tasks})


def window_ms(settings: Config) -> int:
    """Until all of a request's labels are final."""
    return 1000 + int(1000 * max(task.window_s for task in settings.tasks))


def joined(report: Report, settings: Config, rng: np.random.Generator, turns: int) -> None:
    """Impressions of ten items and four feedbacks each, parsed, joined, and kept until their labels are emitted."""
    schema, rates = Schema.of(settings), []
    with tempfile.TemporaryDirectory(prefix="recsys-joiner-") as folder:
        joiner = Joiner(settings.tasks, Path(folder), settings.capacity.memory_bytes)
        for turn in range(turns + turns // 4):
            now_ms = 10**12 + turn * window_ms(settings)
            each = [answered(schema, rng, f"request-{turn}-{n}", now_ms) for n in range(REQUESTS)]
            records = [_record(one, n) for n, one in enumerate(itertools.chain(*each))]
            started = time.process_time()
            for record in records:
                if record.topic == "impression":
                    joiner.impression(messages.parse_impression(record.value), now_ms)
                else:
                    joiner.feedback(messages.parse_feedback(record.value, internal=True), now_ms)
            emitted = sum(1 for _ in joiner.close(now_ms))
            if turn >= turns // 4:
                rates.append(len(records) / (time.process_time() - started))
            assert emitted == (REQUESTS * ends(settings) if turn else 0)
        joiner.spill.close()
    report.add("joiner_records_per_s", median(rates), "records/s", "higher")


def steps(report: Report, settings: Config, rng: np.random.Generator, turns: int) -> None:
    """Whole steps: parse, join, learn, and what towers and ledger do; as many requests open as close in each."""
    seconds: dict[int, list[float]] = {size: [] for size in SIZES}
    with tempfile.TemporaryDirectory(prefix="recsys-steps-") as folder:
        trainers = {size: Trainer(settings, Path(folder) / str(size), order=1) for size in SIZES}
        for trainer in trainers.values():
            for n in range(ITEMS):
                trainer.item(Item(item_id=f"item-{n}"))
        for turn in range(turns + turns // 4):
            now_ms = 10**12 + turn * window_ms(settings)
            for size, trainer in trainers.items():
                each = [answered(trainer.schema, rng, f"{turn}-{n}", now_ms) for n in range(size)]
                records = [_record(one, turn * 1000 + n) for n, one in enumerate(itertools.chain(*each))]
                started = time.process_time()
                done = trainer.step(records, Entry(step=turn + 1, now_ms=now_ms, ends={}, wall_ms=now_ms))
                if turn >= turns // 4:
                    seconds[size].append(time.process_time() - started)
                assert not done.dead_letters and len(done.emissions) == (size * ends(settings) if turn else 0)
        for trainer in trainers.values():
            trainer.close()
    for size in SIZES:
        report.add(f"step_of_{size}", 1000 * median(seconds[size]), "cpu ms")
    report.add("step_of_one_per_example", _share(seconds), "ratio")


def _share(seconds: dict[int, Sequence[float]]) -> float:
    small, large = SIZES
    return median(large / small * a / b for a, b in zip(seconds[small], seconds[large], strict=True))


def _record(one: Impression | Feedback, offset: int) -> Record:
    if isinstance(one, Impression):
        topic, key, value = "impression", one.request_id, messages.dump_impression(one)
    else:
        topic, key, value = "feedback", one.user_id, messages.dump_feedback(one)
    return Record(topic=topic, partition=0, offset=offset, key=key, value=value, time_ms=one.time_ms)


if __name__ == "__main__":
    sys.exit(run("trainer", measure, arguments))
