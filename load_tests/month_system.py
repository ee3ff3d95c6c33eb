"""The three services' own objects in one process, on the embedded log and a clock that is set by hand: closed and opened from disk."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import psutil

from recsys import capacity
from recsys.clock import ManualClock
from recsys.config import Config
from recsys.ranking.shown import Shown
from recsys.streams.base import EventLog
from recsys.streams.open_log import open_log
from recsys.training.runner import OnStep, Runner
from recsys.types import Int64
from services.common.process import Stop
from services.parameter.main import ParameterService
from services.ranking import catalogue_api, parse
from services.ranking.service import RankingService

FULL_REQUESTS = 3_000_000
"""Requests of a month that the bounds are meant to press like."""
FULL_MEMORY_BYTES = 8 * 2**30
"""`capacity.memory_bytes` of such a month: half of a machine of 16 GiB."""
SAVE_S = 60.0
"""Ranking saves its counters this often."""


def settings(folder: Path, *, seed: int, fewer: float, share: float) -> Config:
    """The default configuration, but for bounds that are a `share` of the full ones, and times of upkeep that are multiplied by how
    many `fewer` requests there are, so that as many lie between them.

    The deadline is one that a busy machine cannot miss: answers must not depend on it.
    """
    default = Config()
    # The catalogue holds what the site sells, however few requests there are: its part of the budget is not divided.
    capacity.SHARES = {**capacity.SHARES, "catalogue": capacity.SHARES["catalogue"] / min(share, 1.0)}
    every = {
        "training": {name: getattr(default.training, name) * fewer for name in ("checkpoint_s", "dense_publish_s")},
        "parameter": {"snapshot_s": default.parameter.snapshot_s * fewer},
        "retrieval": {"rebuild_s": default.retrieval.rebuild_s * fewer},
    }
    return Config.model_validate(
        {
            "data_dir": folder,
            "seed": seed,
            "log": {"retention_bytes": max(2**20, int(default.log.retention_bytes * share))},
            "capacity": {"memory_bytes": int(FULL_MEMORY_BYTES * share)},
            "ranking": {"deadline_ms": 60_000.0},
            **every,
        }
    )


class System:
    """Ranking, trainer and parameter service. Everything happens when it is called, in the caller's thread."""

    def __init__(self, config: Config, clock: ManualClock, on_step: OnStep) -> None:
        self.config, self._clock, self._on_step = config, clock, on_step
        self._save_s = SAVE_S * config.parameter.snapshot_s / Config().parameter.snapshot_s
        self._saved_s = clock.monotonic_s()
        self.trainer_epochs = 0

    def open(self) -> None:
        """As the processes start: parameters from their snapshot, the trainer by its journal, ranking by what it saved."""
        logs: list[EventLog] = [
            open_log(self.config, self._clock, name) for name in ("parameter", "trainer", "ranking")
        ]
        self._logs = logs
        self.parameter = ParameterService(self.config, logs[0], self._clock)
        self.parameter.start()
        self.runner = Runner(self.config, logs[1], self._clock, self._on_step)
        self.runner.start()
        self._follow_parameters()
        self.ranking = RankingService(self.config, logs[2], self._clock, Stop(), self.parameter.store)
        self.ranking.restore()
        while self.ranking.turn():
            pass
        self.trainer_epochs += 1

    def turn(self) -> None:
        """Learn what came, publish it, follow it; then what is due by the clock."""
        while self.runner.turn():
            pass
        self._follow_parameters()
        self.parameter.maintain()
        while self.ranking.turn():
            pass
        now_s, generations = self._clock.monotonic_s(), self.ranking.generations
        if generations.due(now_s):
            generations.build(now_s)
        if now_s - self._saved_s >= self._save_s:
            self._saved_s = now_s
            self.ranking.save()

    def _follow_parameters(self) -> None:
        while self.parameter.turn():
            pass

    def recommend(self, asked: dict[str, Any], request_id: str) -> Shown:
        """As over HTTP, but for the id, which seeds what is drawn."""
        while self.ranking.turn():
            pass
        request = parse.recommend(orjson.dumps(asked), request_id, self.config)
        return self.ranking.recommend(request)[0]

    def feedback(self, events: list[dict[str, Any]]) -> list[dict[str, str]]:
        """As over HTTP."""
        ids = (f"none-{n}" for n in range(len(events)))  # every event brings its own
        parsed = parse.feedback(orjson.dumps({"events": events}), ids, self._clock.now_ms())
        return self.ranking.accept(parsed)

    def put(self, items: list[dict[str, Any]]) -> bool:
        """As over HTTP; whether all were accepted."""
        return self._accepted(catalogue_api.write(self.ranking, parse.items(orjson.dumps({"items": items}))).body)

    def delete(self, item_ids: list[str]) -> bool:
        """As over HTTP; whether all were accepted."""
        body = orjson.dumps({"item_ids": item_ids})
        return self._accepted(catalogue_api.write(self.ranking, parse.deletes(body)).body)

    @staticmethod
    def _accepted(body: bytes | memoryview) -> bool:
        return all(outcome["status"] == "accepted" for outcome in orjson.loads(bytes(body))["outcomes"])

    def close(self, *, killed: bool) -> None:
        """Stop as on SIGTERM; `killed`: as after a kill, with what was accepted and journaled and nothing else."""
        if killed:
            self.runner.checkpoints.close()
            self.runner.journal.close()
            self.ranking.store.close()
            self._logs[2].close()
        else:
            self.ranking.close()
            self.runner.close()
            self._follow_parameters()
            self.parameter.maintain(force=True)
        for log in self._logs:
            log.close()
        del self.ranking, self.runner, self.parameter, self._logs

    def has_row(self, item_keys: Int64) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Whether items have a deep row of their own at serving."""
        slot = self.ranking.schema.item_slots[0]
        slots = np.full(len(item_keys), slot, np.int32)
        found: np.ndarray[Any, np.dtype[np.bool_]] = self.parameter.store.tables["deep"].lookup(slots, item_keys)[1]
        return found

    def rows(self) -> dict[str, int]:
        """Rows of each of the trainer's tables."""
        return {name: len(table) for name, table in self.runner.trainer.tables.items()}

    def own_bytes(self) -> dict[str, int]:
        """What the large objects say they hold; of the rest, what it takes when it is saved."""
        trainer, sources = self.runner.trainer, self.ranking.sources
        small = orjson.dumps(trainer.small_state(), option=orjson.OPT_SERIALIZE_NUMPY)
        found = {
            "trainer_tables": trainer.tables.memory_bytes(),
            "serving_tables": self.parameter.store.tables.memory_bytes(),
            "trainer_small": len(small),
            "bandit": _nbytes(trainer.bandit.state()) if trainer.bandit else 0,
            "towers": _nbytes(trainer.towers.arrays()) if trainer.towers else 0,
            "trainer_catalogue": sum(getattr(trainer.catalogue, name).nbytes for name in ("keys", "mask", "alive")),
            "catalogue": _nbytes(sources.catalogue.state()),
        }
        return found | {f"counters_{part}": _nbytes(arrays) for part, arrays in sources.state().items()}


def _nbytes(arrays: Any) -> int:
    return sum(int(array.nbytes) for array in arrays.values() if hasattr(array, "nbytes"))


def private_bytes() -> int:
    """Memory of this process without mapped files, once Python and the allocator gave back what they could."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    memory = psutil.Process().memory_info()
    return int(memory.rss - memory.shared)


def disk_bytes(folder: Path) -> dict[str, int]:
    """Bytes of each file or folder of the data folder."""
    return {
        path.name: sum(map(_size, [path] if path.is_file() else path.rglob("*"))) for path in sorted(folder.iterdir())
    }


def _size(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except FileNotFoundError:  # renamed by a thread that writes a checkpoint
        return 0
