"""The trainer as the only process, on an embedded log that the test writes itself: what other processes would have appended."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

import httpx
import numpy as np

from recsys import config
from recsys.clock import Clock, SystemClock
from recsys.events import messages
from recsys.features.build import Features, UserFeatures, encode
from recsys.features.schema import Schema
from recsys.streams.sqlite_log import SqliteLog
from recsys.types import Feedback, Impression, Record, ShownItem
from tests.system.embedded import ROOT, command, environment, free_ports, wait_for

SMALL = """
tasks = [{ name = "click", types = ["click"], window_s = 0.8 }, { name = "like", types = ["like"], window_s = 0.9, prior = 0.01 }]
model = { dim = 4, expert_hidden = [8, 4], attention = [8], tower_dim = 4 }
"""
START_S = 300.0
"""On a busy machine, until a process is ready or has learned; nobody waits longer than it takes."""
ITEMS = 4
"""Of each impression."""


class TrainerAlone:
    """One trainer process. `hook` is Python that runs in it (and in what it starts) before anything else."""

    def __init__(self, folder: Path, extra: str = SMALL, *, hook: str = "", clock: Clock | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.data = folder, folder / "data"
        (self.port,) = free_ports(1)
        self.file = folder / "recsys.toml"
        self.file.write_text(f'data_dir = "{self.data}"\ntrainer.metrics_port = {self.port}\n{extra}', encoding="utf-8")
        self.config = config.load(self.file, {})
        self.schema = Schema.of(self.config)
        (folder / "hook").mkdir(exist_ok=True)
        (folder / "hook" / "sitecustomize.py").write_text(hook, encoding="utf-8")
        self.output = folder / "trainer.txt"
        self.process: subprocess.Popen[bytes] | None = None
        self.log = SqliteLog(self.data / "log", clock=clock or SystemClock())

    def spawn(self, *options: str) -> subprocess.Popen[bytes]:
        """Start it; do not wait."""
        env = environment() | {"PYTHONPATH": f"{self.folder / 'hook'}:{ROOT}"}
        with self.output.open("a") as out:
            self.process = subprocess.Popen(
                command(["serve", "trainer", "--config", self.file, *options]),
                cwd=ROOT,
                env=env,
                stdout=out,
                stderr=out,
            )
        return self.process

    def start(self, *options: str) -> TrainerAlone:
        """Start it and wait until it is ready."""
        process = self.spawn(*options)
        wait_for(lambda: self.ready() or process.poll() is not None, "the trainer ready", START_S)
        assert process.poll() is None, self.said()
        return self

    def said(self) -> str:
        return self.output.read_text()

    def ready(self) -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{self.port}/readyz", timeout=5.0).status_code == 200
        except httpx.HTTPError:
            return False

    def why_not_ready(self) -> str:
        """What /readyz says; empty when it is ready, or does not answer yet."""
        try:
            return str(httpx.get(f"http://127.0.0.1:{self.port}/readyz", timeout=5.0).json()["reason"])
        except httpx.HTTPError:
            return ""

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(START_S)

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.log.close()

    def metric(self, name: str) -> float:
        """The sum of one metric's samples."""
        text = httpx.get(f"http://127.0.0.1:{self.port}/metrics", timeout=10.0).text
        lines = [line for line in text.splitlines() if line.startswith((f"{name}{{", f"{name} "))]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def learns(self, labels: int) -> None:
        """Wait until this process has learned so many labels, and no more."""
        wait_for(lambda: self.metric("recsys_examples_total") >= labels, f"{labels} labels", START_S)
        assert self.metric("recsys_examples_total") == labels, self.said()

    def items(self, count: int) -> None:
        values = [{"version": 1, "item_id": f"i{n}", "attributes": {"category": f"c{n % 3}"}} for n in range(count)]
        self.log.append("item", [(v["item_id"], json.dumps(v).encode()) for v in values])

    def impression(self, request_id: str) -> bytes:
        """A valid message, as ranking writes it."""
        shown = tuple(ShownItem(item_id=f"i{n}", position=n + 1, predictions={"click": 0.1}) for n in range(ITEMS))
        return messages.dump_impression(
            Impression(
                request_id=request_id,
                user_id=f"u-{request_id}",
                time_ms=SystemClock().now_ms(),
                items=shown,
                schema=self.schema.hash,
                features=encode(features(self.schema, request_id, ITEMS)),
            )
        )

    def shows(self, names: Sequence[str]) -> None:
        """Append valid impressions, with a click on the first item of each."""
        self.log.append("impression", [(f"u-{name}", self.impression(name)) for name in names])
        self.log.append("feedback", [(f"u-{name}", click(name)) for name in names])

    def letters(self) -> list[dict[str, object]]:
        """What lies in topic `dead_letter`."""
        return [json.loads(record.value) for record in self.records("dead_letter")]

    def records(self, topic: str) -> list[Record]:
        return self.log.read(topic, 0, self.log.begin(topic, 0), 100_000)


LABELS = 2 * ITEMS
"""Labels of one valid impression, of both tasks."""


def click(request_id: str, item: str = "i0", event_id: str = "") -> bytes:
    """A valid click on an item of an impression."""
    return messages.dump_feedback(
        Feedback(
            event_id=event_id or f"{request_id}-{item}",
            user_id=f"u-{request_id}",
            item_id=item,
            type="click",
            time_ms=SystemClock().now_ms(),
            request_id=request_id,
        )
    )


def features(schema: Schema, seed: str, items: int) -> Features:
    """Features of a schema's shape, with keys of their own for each seed."""
    rng = np.random.default_rng(list(seed.encode()))

    def keys(*shape: int) -> np.ndarray:  # type: ignore[type-arg]
        return rng.integers(1, 1000, shape)

    past = 3
    return Features(
        user=UserFeatures(
            shared_keys=keys(len(schema.shared_slots)),
            shared_mask=np.ones(len(schema.shared_slots), np.bool_),
            history_keys=keys(past, len(schema.history_slots)),
            history_mask=np.ones((past, len(schema.history_slots)), np.bool_),
            history_kinds=np.ones(past, np.uint8),
            history_gaps=np.zeros(past, np.uint8),
        ),
        item_keys=keys(items, len(schema.item_slots)),
        item_mask=np.ones((items, len(schema.item_slots)), np.bool_),
        cross_keys=keys(items, len(schema.cross_slots)),
        cross_mask=np.ones((items, len(schema.cross_slots)), np.bool_),
        numbers=rng.random((items, len(schema.numbers)), np.float32),
    )
