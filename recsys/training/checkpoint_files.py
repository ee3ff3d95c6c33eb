"""The files of the trainer's checkpoints, written once and read back.

Of one checkpoint: `segment-<step>-…` (rows touched since the last one, or merged ones), `dense-<step>-…` (networks, moments,
frequencies), `small-<step>-….json`; `manifest.json` names those that belong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import safetensors.numpy
import safetensors.torch
import torch

from recsys.config import Config
from recsys.errors import SchemaMismatch, SnapshotCorrupt
from recsys.files import KeptManifests, Manifests, fresh, read_file, write_file
from recsys.table import segments
from recsys.table.segments import LayoutDelta, SegmentFile
from recsys.training.migration.made_of import check

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
    spilled: list[str]
    """Minutes of spilled features that its open impressions need."""
    covers_ms: int
    good: bool
    """Nothing was held back: it may be served."""
    judged: dict[str, int]
    """Labels of each task that the guard had seen."""
    origin: int | None
    """The step of the checkpoint that was gone back to, if it does not follow from the one before it."""
    rolled_back: str
    """Name of the last `recsys rollback` that was followed."""
    made_of: Mapping[str, Any]
    """What gives it its meaning: see `unit`."""


class Opened(NamedTuple):
    """What a checkpoint's files hold."""

    step: int
    rows: list[dict[str, LayoutDelta]]
    small: dict[str, Any]
    dense: dict[str, torch.Tensor]


class CheckpointFiles:
    """Writes and opens checkpoints in one folder. Knows nothing of a trainer; `crash` is told of each step that was done."""

    def __init__(self, folder: Path, config: Config, crash: Callable[[str], None]) -> None:
        self.folder, self._config, self._crash = folder, config, crash
        self.manifests = Manifests(folder)
        """The newest checkpoint, and the one before it."""
        self.kept = KeptManifests(folder)
        """Older ones that one can go back to."""

    def write(self, captured: Captured, older: list[SegmentFile]) -> list[SegmentFile]:
        """Make a checkpoint on top of the segments `older`; its own. It is there once its manifest is renamed, or not at all."""
        step = f"{captured.step:012d}"
        # 3. New files under new names, each fsync'd and read back.
        chain = segments.extend(self.folder, older, f"segment-{step}", captured.rows)
        self._crash("segment written")
        files = {
            "dense": write_file(fresh(self.folder, f"dense-{step}", ".safetensors"), saved(captured.dense)),
            "small": write_file(fresh(self.folder, f"small-{step}", ".json"), captured.small),
        }
        self._crash("small written")
        # 4. The manifest, under a temporary name, fsync'd and read back; 5. renamed, and the folder fsync'd.
        self.manifests.write(
            {
                "version": VERSION,
                "step": captured.step,
                **captured.made_of,
                "positions": captured.positions,
                "spilled": captured.spilled,
                "covers_ms": captured.covers_ms,
                "good": captured.good,
                "judged": captured.judged,
                "rolled_back": captured.rolled_back,
                "segments": chain,
                **files,
            }
        )
        self._crash("manifest renamed")
        return chain

    def open(self, manifest: Mapping[str, Any]) -> Opened:
        """A checkpoint's files, known to be whole. SnapshotCorrupt, SchemaMismatch; nothing is changed."""
        path = self.manifests.newest
        try:
            step = int(manifest["step"])
            if manifest["version"] != VERSION:
                raise SchemaMismatch(
                    f"{path} is of version {manifest['version']}, this release reads {VERSION}: start on an empty data_dir, where the "
                    "log of events is learned anew, or go back to the release that wrote it"
                )
            check(str(path), manifest, self._config)
            return Opened(
                step,
                segments.read_chain(self.folder, manifest["segments"]),
                orjson.loads(self._read(manifest["small"])),
                safetensors.torch.load(self._read(manifest["dense"])),
            )
        except (KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
            raise SnapshotCorrupt(f"{path} is no manifest of a checkpoint ({error}): restore it") from None

    def sweep(self) -> set[str] | None:
        """Delete the files that belong to no checkpoint; the minutes of spilled features that some need, None where not all are known."""
        kept = self.kept.manifests()
        self.manifests.sweep("segment-*", "dense-*", "small-*", kept=kept)
        if (spilled := self.manifests.values("spilled")) is None:
            return None
        return {minute for minutes in spilled + [fields["spilled"] for fields in kept] for minute in minutes}

    def _read(self, entry: Mapping[str, Any]) -> bytes:
        return read_file(self.folder / entry["name"], entry["checksum"])


def saved(state: Mapping[str, torch.Tensor]) -> bytes:
    """The tensors as safetensors. `safetensors.torch.save` keeps a ctypes type for each size it ever saw, and arrays here grow."""
    return safetensors.numpy.save({name: tensor.contiguous().numpy() for name, tensor in state.items()})
