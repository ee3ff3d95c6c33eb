"""`recsys checkpoint list`: what `recsys rollback` can go back to."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from recsys import config
from recsys.clock import SystemClock
from recsys.config import Config
from recsys.errors import ConfigError, LogError, SnapshotCorrupt
from recsys.files import KeptManifests
from recsys.streams.base import EventLog
from recsys.streams.open_log import open_log
from recsys.streams.positions import split
from services.cli.main import DONE, emit


def folder_of(loaded: Config) -> Path:
    """The trainer's folder. ConfigError where no trainer ever ran."""
    folder = loaded.data_dir / "trainer"
    if not folder.is_dir():
        raise ConfigError(f"{folder} does not exist: no trainer ever ran with this data_dir; check --config")
    return folder


def run(options: argparse.Namespace) -> int:
    """List them, the newest first."""
    loaded = config.load(options.config)
    folder = folder_of(loaded)
    try:
        log = open_log(loaded, SystemClock(), "checkpoint")
    except LogError:
        log = None
    try:
        found = [told(folder, manifest, log) for manifest in KeptManifests(folder).every()]
    finally:
        if log is not None:
            log.close()
    emit(options, {"ok": True, "checkpoints": found}, _table(found))
    return DONE


def told(folder: Path, manifest: Mapping[str, Any], log: EventLog | None) -> dict[str, Any]:
    """One checkpoint: its id is its step. `learnable`: records that the log has after it; null: it lost some of them, or is away, or
    the manifest, of an earlier release, does not say. SnapshotCorrupt where it is none."""
    try:
        return _told(folder, manifest, log)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise SnapshotCorrupt(f"{folder} has a manifest that is none of a checkpoint ({error!r}): restore it") from None


def _told(folder: Path, manifest: Mapping[str, Any], log: EventLog | None) -> dict[str, Any]:
    names = [*(part["name"] for part in manifest["segments"]), manifest["dense"]["name"], manifest["small"]["name"]]
    sizes = [(folder / name).stat().st_size for name in names if (folder / name).exists()]
    covers_ms = manifest.get("covers_ms")
    return {
        "id": int(manifest["step"]),
        "as_of": None
        if covers_ms is None
        else datetime.fromtimestamp(covers_ms / 1000, UTC).isoformat(timespec="seconds"),
        "good": manifest.get("good", True),
        "whole": len(sizes) == len(names),
        "bytes": sum(sizes),
        "learnable": None if log is None or "positions" not in manifest else _after(log, manifest["positions"]),
    }


def _after(log: EventLog, positions: Mapping[str, int]) -> int | None:
    count = 0
    try:
        for key, position in positions.items():
            if not key.startswith("item/"):
                if log.begin(*split(key)) > position:
                    return None
                count += max(0, log.end(*split(key)) - position)
    except LogError:
        return None
    return count


def _table(found: list[dict[str, Any]]) -> str:
    if not found:
        return "no checkpoint yet: a trainer writes one every training.checkpoint_s"
    lines = [f"{'id':>12}  {'as of':25}  {'size':>9}  {'records after it':>16}  state"]
    for one in found:
        after = "not in the log" if one["learnable"] is None else f"{one['learnable']:,}"
        state = ("good" if one["good"] else "held back") + ("" if one["whole"] else ", files missing")
        lines.append(
            f"{one['id']:>12}  {(one['as_of'] or '?')[:25]:25}  {one['bytes'] / 1e6:>6.1f} MB  {after:>16}  {state}"
        )
    return "\n".join(lines)
