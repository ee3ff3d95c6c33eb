"""Checkpoints of the trainer, in numbered steps with one crash test each.

Files of one checkpoint in the trainer's folder: `segment-<step>` (rows touched since the last one, or merged ones),
`dense-<step>` (networks, moments, frequencies), `small-<step>.json`; `manifest.json` names those that belong.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import safetensors.torch
import torch

from recsys.errors import SchemaMismatch, SnapshotCorrupt
from recsys.files import read_file, write_file
from recsys.table import segments
from recsys.table.segments import SegmentFile
from recsys.training.journal import Journal
from recsys.training.trainer import Trainer

logger = logging.getLogger("recsys")
CURSOR = "checkpoint"
VERSION = 2
"""Of what a checkpoint holds: raised with every change that an older one cannot be read with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Captured:
    """A consistent copy, taken between two steps."""

    step: int
    rows: Any
    versions: Any
    dense: dict[str, torch.Tensor]
    small: bytes
    positions: dict[str, int]
    dropped: list[Path]


class Checkpoints:
    """Takes and loads checkpoints. `save` is called between steps by the trainer's thread; files are written by another."""

    def __init__(
        self, folder: Path, trainer: Trainer, journal: Journal, crash: Callable[[str], None] = lambda _: None
    ) -> None:
        self._folder, self._trainer, self._journal, self._crash = folder, trainer, journal, crash
        self._segments: list[SegmentFile] = []
        self._saved_step = -1
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: tuple[Captured, Future[list[SegmentFile]]] | None = None

    def save(self, positions: Mapping[str, int], *, wait: bool = False) -> bool:
        """Begin a checkpoint; False when the last one is still being written. `wait`: finish it; False when it failed."""
        self.poll(wait=wait)
        if self._pending is not None:
            return False
        if self._trainer.steps == self._saved_step:
            return True  # No step since: what is on disk is the checkpoint of now, and its files must not be written again.
        # 1. Copy what changed, the networks and the small state: a consistent cut between two steps.
        captured = self._capture(positions)
        self._crash("captured")
        # 2. From here on, steps go to a new journal file; both are needed until the manifest is renamed.
        self._journal.begin(captured.step + 1)
        self._saved_step = captured.step
        self._crash("journal begun")
        self._pending = (captured, self._worker.submit(self._write, captured, list(self._segments)))
        return not wait or self.poll(wait=True) is not None

    def poll(self, *, wait: bool = False) -> dict[str, int] | None:
        """Finish a checkpoint whose files are written; returns the positions it contains, once."""
        if self._pending is None or not (wait or self._pending[1].done()):
            return None
        captured, future = self._pending
        self._pending = None
        try:
            self._segments = future.result()
        except OSError as error:
            logger.error("no checkpoint (%s): the previous one stays, with its journal; free space", error)
            self._saved_step = -1
            return None
        # 6. Only now is anything forgotten: touched rows, journal, spilled features, older files.
        segments.acknowledge(self._trainer.tables, CURSOR, captured.versions)
        self._crash("acknowledged")
        self._journal.cut(captured.step + 1)
        for path in captured.dropped:
            path.unlink(missing_ok=True)
        self._sweep(captured.step)
        return captured.positions

    def close(self) -> None:
        self._worker.shutdown(wait=True)

    def _capture(self, positions: Mapping[str, int]) -> Captured:
        trainer = self._trainer
        rows, versions = segments.take(trainer.tables, CURSOR)
        small = {"positions": dict(positions), "trainer": trainer.small_state()}
        return Captured(
            step=trainer.steps,
            rows=rows,
            versions=versions,
            dense=_dense_state(trainer),
            small=orjson.dumps(small, option=orjson.OPT_SERIALIZE_NUMPY),
            positions=dict(positions),
            dropped=trainer.joiner.take_dropped(),
        )

    def _write(self, captured: Captured, older: list[SegmentFile]) -> list[SegmentFile]:
        step = f"{captured.step:012d}"
        # 3. New files, each fsync'd.
        chain = segments.extend(self._folder, older, f"segment-{step}", captured.rows)
        self._crash("segment written")
        files = {
            "dense": write_file(self._folder / f"dense-{step}.safetensors", safetensors.torch.save(captured.dense)),
            "small": write_file(self._folder / f"small-{step}.json", captured.small),
        }
        self._crash("small written")
        # 4. The manifest, under a temporary name, fsync'd; 5. renamed, and the folder fsync'd.
        manifest = {
            "version": VERSION,
            "step": captured.step,
            "schema": self._trainer.schema.hash,
            "segments": chain,
            **files,
        }
        write_file(self._folder / "manifest.json", orjson.dumps(manifest))
        self._crash("manifest renamed")
        return chain

    def load(self) -> dict[str, int]:
        """Load the newest checkpoint into the trainer; returns its log positions, empty when there is none.

        Raises SnapshotCorrupt naming the file, SchemaMismatch when the configuration changed its slots.
        """
        path = self._folder / "manifest.json"
        if not path.exists():
            return {}
        try:
            manifest = orjson.loads(path.read_bytes())
        except orjson.JSONDecodeError:
            raise SnapshotCorrupt(f"{path} is not JSON: restore it, or delete the folder to start anew") from None
        trainer = self._trainer
        if manifest["version"] != VERSION:
            raise SchemaMismatch(
                f"{path} is of version {manifest['version']}, this release reads {VERSION}: start on an empty data_dir, where the "
                "log of events is learned anew, or go back to the release that wrote it"
            )
        if manifest["schema"] != trainer.schema.hash:
            raise SchemaMismatch(
                f"{path} was written with schema {manifest['schema']}, the configuration makes {trainer.schema.hash}: restore the old "
                "catalogue and features sections, or choose another data_dir"
            )
        segments.load(trainer.tables, segments.read_chain(self._folder, manifest["segments"]))
        for cursor in (CURSOR, "publish"):
            segments.skip(trainer.tables, cursor)
        small = orjson.loads(self._read(manifest["small"]))
        trainer.restore_small(small["trainer"])
        _restore_dense(trainer, safetensors.torch.load(self._read(manifest["dense"])))
        self._segments = manifest["segments"]
        self._saved_step = manifest["step"]
        self._sweep(manifest["step"])
        positions: dict[str, int] = small["positions"]
        return positions

    def _read(self, entry: Mapping[str, Any]) -> bytes:
        return read_file(self._folder / entry["name"], entry["checksum"])

    def _sweep(self, step: int) -> None:
        """Delete files of older checkpoints and of ones that never got their manifest."""
        kept = {s["name"] for s in self._segments} | {f"dense-{step:012d}.safetensors", f"small-{step:012d}.json"}
        for pattern in ("segment-*", "dense-*", "small-*"):
            for path in self._folder.glob(pattern):
                if path.name not in kept:
                    path.unlink(missing_ok=True)


def _dense_state(trainer: Trainer) -> dict[str, torch.Tensor]:
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


def network_bytes(trainer: Trainer) -> bytes:
    """What serving needs beside rows: safetensors with names `ranker.model.…`, `towers.model.…` and `clusters.…`."""
    state: dict[str, torch.Tensor] = {}
    for name, part in _networks(trainer).items():
        state |= {f"{name}.model.{key}": value.contiguous() for key, value in part.model.state_dict().items()}
    if trainer.bandit:
        state |= {f"clusters.{key}": torch.from_numpy(array) for key, array in trainer.bandit.published().items()}
    return safetensors.torch.save(state)


def _networks(trainer: Trainer) -> dict[str, Any]:
    return {"ranker": trainer.learner} | ({"towers": trainer.towers} if trainer.towers else {})
