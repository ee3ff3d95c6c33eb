"""Retrieval generations are built in a process of their own, at the lowest priority: `python -m services.ranking.builder FOLDER`.

The folder of a job holds its towers, item columns and configuration; the process looks the items' rows up at the parameter service
and leaves `items.index` there, which ranking maps. A build that fails leaves the generation in use alone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from recsys import metrics
from recsys.candidates.generation import Job, build_index
from recsys.config import Config
from recsys.errors import RecsysError, SnapshotCorrupt
from recsys.features.schema import Schema
from recsys.model import specs
from recsys.model.layouts import parameters_name
from recsys.model.tower_scoring import Towers
from recsys.parameters.grpc_parameters import GrpcParameters
from recsys.parameters.shared_rows import SharedParameters
from recsys.ranking.scorer import Scorer
from recsys.retrieval.item_index import ItemIndex
from recsys.types import Bool, Float32, Int64
from services.common.process import logger, setup_logging

NICE = 19
"""Builds yield to everything that somebody waits for: at 10, p99 beside a build was 170 ms instead of 75. On cores that are never idle a
build takes minutes."""
LOOKUP_S = 30.0
"""A look-up may take this long: at the lowest priority on busy cores an answer that came in time is read late."""
AGAIN_S = 5.0
"""After a build that failed the next begins so much later; each failure in a row doubles it, up to a minute."""
LONGEST_S = 1800.0
"""A build that takes longer is killed: a million items take about half a minute of one core."""
_ARRAYS = ("rows", "keys", "mask")


class Builder:
    """Starts the builder process and watches it. Not thread-safe."""

    def __init__(self, config: Config, folder: Path) -> None:
        self._config, self._folder = config, folder
        self._job: Job | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._failures = 0
        self._from_s = self._until_s = 0.0
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier ranking process

    @property
    def idle(self) -> bool:
        """Whether a job may be started now."""
        return self._process is None and time.monotonic() >= self._from_s

    @property
    def pid(self) -> int | None:
        """Of the process at work."""
        return self._process.pid if self._process else None

    def start(self, job: Job) -> None:
        """Hand the job to a new process. What the disk or the system refuses is a build that failed."""
        try:
            self._start(job)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(self._folder / job.name, ignore_errors=True)
            self._job = None
            self._failed(job.name, error)

    def _start(self, job: Job) -> None:
        folder = self._folder / job.name
        folder.mkdir(parents=True)
        for name in _ARRAYS:
            np.save(folder / f"{name}.npy", getattr(job, name))
        safetensors.numpy.save_file(dict(job.towers.weights), folder / "towers.safetensors")
        (folder / "config.json").write_text(self._config.model_dump_json(), encoding="utf-8")
        nothing = slice(0, 0)
        self._job = replace(job, rows=job.rows[nothing], keys=job.keys[nothing], mask=job.mask[nothing])
        self._until_s = time.monotonic() + LONGEST_S
        # Low before its second of imports. The pipe tells the process that its parent is gone.
        self._process = subprocess.Popen(
            ["nice", "-n", str(NICE), sys.executable, "-m", "services.ranking.builder", str(folder), job.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
        )

    def poll(self) -> tuple[Job, ItemIndex] | None:
        """The job and its index when it is done. A process that died is told of, and the next may start a little later."""
        if self._process is None or self._job is None:
            return None
        code = self._process.poll()
        if code is None:
            if time.monotonic() > self._until_s:
                self._process.kill()
            return None
        job, path = self._job, self._folder / self._job.name / "items.index"
        self._end()
        try:
            if code:
                raise SnapshotCorrupt(f"the builder process ended with {code}")
            index = ItemIndex.load(path)
            self._failures = 0
            return job, index
        except (SnapshotCorrupt, OSError) as error:
            self._failed(job.name, error)
            return None
        finally:
            shutil.rmtree(path.parent, ignore_errors=True)  # a mapped file lives until it is let go

    def _failed(self, name: str, error: Exception) -> None:
        wait_s = min(60.0, AGAIN_S * 2**self._failures)
        self._failures += 1
        self._from_s = time.monotonic() + wait_s
        metrics.GENERATION_FAILURES.inc()
        logger.error("generation %s not built (%s): again in %.0f s, the one in use stays", name, error, wait_s)

    def _end(self) -> None:
        if self._process is not None:
            if self._process.stdin is not None:
                self._process.stdin.close()
            self._process.wait()
        self._process = self._job = None

    def close(self) -> None:
        """Stop what is under way."""
        if self._process is not None:
            self._process.kill()
            self._end()
        shutil.rmtree(self._folder, ignore_errors=True)


def _end_with_parent() -> None:
    os.read(0, 1)  # nothing is ever written: the pipe's end
    os._exit(1)


def main(folder: Path, name: str) -> None:
    """Build the index of one job's folder."""
    started_s = time.monotonic()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    config = Config.model_validate_json((folder / "config.json").read_bytes())
    schema = Schema.of(config)
    name_of_rows = parameters_name(config, schema)
    remote = GrpcParameters(config.parameter_address, name_of_rows, LOOKUP_S)
    scorer = Scorer(config, schema, SharedParameters(config.data_dir / "parameter", name_of_rows, remote))
    towers = Towers(specs.two_tower(config, schema), safetensors.numpy.load_file(folder / "towers.safetensors"))
    rows, keys, mask = (np.load(folder / f"{array}.npy", mmap_mode="r") for array in _ARRAYS)

    def item_vectors(keys: Int64, mask: Bool, towers: Towers) -> Float32:
        return scorer.item_vectors(np.asarray(keys), np.asarray(mask), towers, required=True)

    job = Job(
        name=name,
        towers=towers,
        rows=np.asarray(rows),
        keys=keys,
        mask=mask,
        num_alive=len(rows),
        arrivals=0,
        hubness=config.retrieval.hubness,
    )
    index = build_index(job, item_vectors)
    index.save(folder / "items.index")
    logger.info("%s: %d items indexed in %.1f s", name, len(index), time.monotonic() - started_s)


if __name__ == "__main__":
    setup_logging("builder")
    try:
        main(Path(sys.argv[1]), sys.argv[2])
    except RecsysError as error:
        logger.error("%s", error)
        sys.exit(1)
