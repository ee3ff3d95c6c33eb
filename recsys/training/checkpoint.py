"""Checkpoints of the trainer, in numbered steps with one crash test each.

Their files are those of `checkpoint_files.py`. The checkpoint before the newest stays, with its journal: when a file of the newest is
bad, the trainer comes to the same state from there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
import torch

from recsys.errors import SnapshotCorrupt
from recsys.table import segments
from recsys.table.segments import SegmentFile
from recsys.training.checkpoint_files import Captured, CheckpointFiles, saved
from recsys.training.journal import Journal
from recsys.training.migration.made_of import unit
from recsys.training.trainer import Trainer

logger = logging.getLogger("recsys")
CURSOR = "checkpoint"


def _far(newer: Mapping[str, Any], labels: int, older: Mapping[str, Any]) -> bool:
    """Whether so many labels of a task were seen between two checkpoints."""
    then = older.get("judged", {})
    return any(n - then.get(task, 0) >= labels for task, n in newer["judged"].items())


class _Kept(NamedTuple):
    step: int
    positions: dict[str, int]


class Checkpoints:
    """Takes and loads checkpoints. `save` is called between steps by the trainer's thread; files are written by another."""

    def __init__(
        self, folder: Path, trainer: Trainer, journal: Journal, crash: Callable[[str], None] = lambda _: None
    ) -> None:
        self.folder, self.trainer, self._journal, self._crash = folder, trainer, journal, crash
        self.rolled_back = ""
        """Name of the last `recsys rollback` that was followed."""
        self.found = False
        """Whether there was one to load."""
        self.good = True
        """Whether what `load` found, or the state of now, may be served."""
        self.unpublished = False
        """Whether what `load` found was carried over from another configuration: nothing of it is published yet."""
        self.logs: dict[str, str] = {}
        """Which log each position of what `load` found belongs to; empty where an earlier release wrote it."""
        self._segments: list[SegmentFile] = []
        self._saved_step = -1
        self._origin: int | None = None
        self.files = CheckpointFiles(folder, trainer.config, crash)
        self._newest, self._before = _Kept(0, {}), _Kept(0, {})
        """The checkpoints on disk; step 0: the trainer's beginning."""
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: tuple[Captured, Future[list[SegmentFile]]] | None = None

    def save(self, positions: Mapping[str, int], logs: Mapping[str, str], *, wait: bool = False) -> bool:
        """Begin a checkpoint; False when the last one is still being written. `wait`: finish it; False when it failed."""
        self.poll(wait=wait)
        if self._pending is not None:
            return False
        if self.trainer.steps == self._saved_step:
            return True  # No step since: what is on disk is the checkpoint of now, and its files must not be written again.
        # 1. Copy what changed, the networks and the small state: a consistent cut between two steps.
        captured = self._capture(positions, logs)
        self._crash("captured")
        self._origin = None
        # 2. From here on, steps go to a new journal file; both are needed until the manifest is renamed.
        self._journal.begin(captured.step + 1)
        self._saved_step = captured.step
        self._crash("journal begun")
        self._pending = (captured, self._worker.submit(self.files.write, captured, list(self._segments)))
        return not wait or self.poll(wait=True) is not None

    def poll(self, *, wait: bool = False) -> dict[str, int] | None:
        """Finish a checkpoint whose files are written; returns, once, the positions from which the log must be kept."""
        if self._pending is None or not (wait or self._pending[1].done()):
            return None
        captured, future = self._pending
        self._pending = None
        try:
            self._segments = future.result()
        except (OSError, SnapshotCorrupt) as error:
            logger.error("no checkpoint (%s): the previous one stays, with its journal; free space", error)
            self._saved_step = -1
            if isinstance(error, SnapshotCorrupt):  # files that the next would build upon: it holds every row instead
                self._segments = []
                for table in self.trainer.tables.values():
                    table.release(CURSOR)
            return None
        # A rollback's does not follow from the one before it: that one is gone back to no more.
        if captured.origin is not None:
            self.files.manifests.forget_previous()
            self.files.kept.forget_after(captured.origin)
            self._newest = _Kept(captured.step, captured.positions)
        # 6. Only now is anything forgotten: touched rows; journal and older files but for the checkpoint before this one.
        segments.acknowledge(self.trainer.tables, CURSOR, captured.versions)
        self._crash("acknowledged")
        self._before, self._newest = self._newest, _Kept(captured.step, captured.positions)
        training = self.trainer.config.training
        if captured.good and captured.step:
            for fields in self.files.manifests.look():
                if fields["step"] == captured.step:
                    self.files.kept.keep(fields, training.kept_checkpoints, training.keep_every_s * 1000)
                    self.files.kept.trust(fields, partial(_far, fields, training.hold_examples))
        self._tidy()
        return self.kept_positions

    @property
    def kept_positions(self) -> dict[str, int]:
        """Of the checkpoint before the newest: what the log holds after them is needed when a file of the newest is bad."""
        return self._before.positions

    def _tidy(self) -> None:
        """Delete what neither of the two checkpoints needs, nor an older one that is kept, nor what is in memory now."""
        self._journal.cut(self._before.step + 1)
        if (spilled := self.files.sweep()) is not None:
            self.trainer.joiner.spill.sweep(spilled)

    def close(self) -> None:
        self._worker.shutdown(wait=True)

    def _capture(self, positions: Mapping[str, int], logs: Mapping[str, str]) -> Captured:
        trainer = self.trainer
        rows, versions = segments.take(trainer.tables, CURSOR)
        small: dict[str, Any] = {"positions": dict(positions), "logs": dict(logs), "trainer": trainer.small_state()}
        return Captured(
            step=trainer.steps,
            rows=rows,
            versions=versions,
            dense=dense_state(trainer),
            small=orjson.dumps(small, option=orjson.OPT_SERIALIZE_NUMPY),
            positions=dict(positions),
            spilled=sorted(small["trainer"]["joiner"]["spill"]),
            covers_ms=trainer.covers_ms,
            good=self.good,
            judged=dict(trainer.guard.judged),
            origin=self._origin,
            rolled_back=self.rolled_back,
            made_of=unit(trainer.config),
        )

    def load(self) -> dict[str, int]:
        """Load the newest checkpoint whose files are whole into the trainer; returns its log positions, empty when there is none.

        The one before it, with its journal, leads to the same state. SnapshotCorrupt names the file when neither can be used,
        Outgrown when it was made with another configuration, SchemaMismatch when nobody knows which.
        """
        self._segments, self._saved_step = [], -1
        self.found, self.good = False, True
        self._newest, self._before = _Kept(0, {}), _Kept(0, {})
        bad: SnapshotCorrupt | None = None
        for manifest in self.files.manifests.read():
            try:
                return self._load(manifest)
            except SnapshotCorrupt as error:
                logger.error("checkpoint not used: %s", error)
                bad = error
        if self.files.manifests.exist() and not self._journal.begins_at_first_step():
            raise bad or SnapshotCorrupt(
                f"{self.files.manifests.newest} is torn or flipped: restore it, or delete {self.folder} to start anew"
            )
        if next(self._journal.entries(1), None) is None:
            self._journal.discard()  # steps of a configuration of which there is no checkpoint
        return {}

    def go_back(self, manifest: Mapping[str, Any]) -> dict[str, int]:
        """Load an older checkpoint, which `open` opened before, into a new trainer; its log positions."""
        positions = self._load(manifest)
        self._saved_step, self._origin = -1, int(manifest["step"])
        return positions

    def _load(self, manifest: Mapping[str, Any]) -> dict[str, int]:
        trainer = self.trainer
        step, chain, small, dense = self.files.open(manifest)  # everything is read before anything is changed
        segments.resume(trainer.tables, chain, CURSOR, "publish")
        trainer.restore_small(small["trainer"])
        _restore_dense(trainer, dense)
        self._segments, self._saved_step = manifest["segments"], step
        self.rolled_back, self.unpublished = manifest.get("rolled_back", ""), bool(manifest.get("unpublished"))
        self.logs, self.good, self.found = small.get("logs", {}), manifest.get("good", True), True
        positions: dict[str, int] = small["positions"]
        self._newest = self._before = _Kept(step, dict(positions))
        for older in self.files.manifests.look():
            if older.get("step", step) < step:
                self._before = _Kept(older["step"], older.get("positions", {}))
        self._tidy()
        return positions


def dense_state(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Networks, the optimiser's moments, item frequencies and the bandit, copied, under flat names."""
    state: dict[str, torch.Tensor] = {}
    for name, part in _networks(trainer).items():
        for key, value in part.model.state_dict().items():
            state[f"{name}.model.{key}"] = value.detach().clone()
        state |= {f"{name}.moments.{key}": value for key, value in part.optimizer.state().items()}
    if trainer.towers:
        state |= {f"retrieval.{k}": torch.from_numpy(np.array(array)) for k, array in trainer.towers.arrays().items()}
    if trainer.bandit:
        state |= {f"bandit.{key}": torch.from_numpy(np.array(array)) for key, array in trainer.bandit.state().items()}
    return state


def _restore_dense(trainer: Trainer, state: dict[str, torch.Tensor]) -> None:
    for name, part in _networks(trainer).items():
        prefix = f"{name}.model."
        part.model.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
        prefix = f"{name}.moments."
        part.optimizer.restore({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    if trainer.towers:
        arrays = {k.removeprefix("retrieval."): v.numpy() for k, v in state.items() if k.startswith("retrieval.")}
        trainer.towers.restore_arrays(arrays)
    arrays = {k.removeprefix("bandit."): v.numpy() for k, v in state.items() if k.startswith("bandit.")}
    if trainer.bandit and arrays:
        trainer.bandit.restore(arrays)


def network_bytes(trainer: Trainer, dense: Mapping[str, torch.Tensor] | None = None) -> bytes:
    """What serving needs beside rows: safetensors with names `ranker.model.…`, `towers.model.…` and `clusters.…`; the networks of a
    checkpoint (`dense`), or as they are now."""
    state: dict[str, torch.Tensor] = {}
    if dense is not None:
        state |= {name: value for name, value in dense.items() if ".model." in name}
    else:
        for name, part in _networks(trainer).items():
            state |= {f"{name}.model.{key}": value.contiguous() for key, value in part.model.state_dict().items()}
    if trainer.bandit:
        state |= {f"clusters.{key}": torch.from_numpy(array) for key, array in trainer.bandit.published().items()}
    return saved(state)


def _networks(trainer: Trainer) -> dict[str, Any]:
    return {"ranker": trainer.learner} | ({"towers": trainer.towers} if trainer.towers else {})
