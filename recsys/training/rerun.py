"""Whether the kept state is what log and journal make: the journal's steps run again in a scratch folder, compared bit by bit.

The newest checkpoint is what is proven. The re-run begins with the checkpoint before it, or with nothing where the journal reaches
back to the first step; it goes on to the step of the serving copy's snapshot, where the journal has it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import orjson
import safetensors.torch

from recsys.clock import Clock
from recsys.config import Config
from recsys.errors import SnapshotCorrupt
from recsys.files import Manifests, read_file
from recsys.model.layouts import parameters_name, same_parameters
from recsys.streams.base import EventLog
from recsys.table import segments
from recsys.table.base import Rows
from recsys.table.segments import LayoutDelta
from recsys.training.checkpoint import dense_state
from recsys.training.journal import Journal
from recsys.training.stepper import Stepper
from recsys.training.trainer import Trainer

Progress = Callable[[int, int], None]
"""Told the step that ran and its log time."""
ATTEMPTS = 5
"""A running trainer may replace its files while they are copied."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A checkpoint or snapshot as its files have it."""

    step: int
    tables: Mapping[str, LayoutDelta]
    dense: Mapping[str, Any]
    small: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Rerun:
    """What the steps from `begin` to `end` gave: each difference in a sentence."""

    begin: int
    end: int
    differences: tuple[str, ...]
    served_step: int
    """The serving copy's, compared at that step; -1: the journal does not have it, or there is no snapshot."""


class _Unwritten:
    """A log from which is read; what would be appended is not."""

    def __init__(self, log: EventLog) -> None:
        self._log = log

    def __getattr__(self, name: str) -> Any:
        return getattr(self._log, name)

    def append(self, topic: str, messages: object) -> None:
        """Do nothing."""


def rerun(config: Config, log: EventLog, clock: Clock, scratch: Path, progress: Progress = lambda *_: None) -> Rerun:
    """Run the steps again below `scratch`, an empty folder. SnapshotCorrupt: there is nothing to compare, or to begin with."""
    folder = scratch / "trainer"
    newest = _copied(config.data_dir / "trainer", folder)
    served = _snapshot(config.data_dir / "parameter", parameters_name(config))
    stepper = Stepper(config.model_copy(update={"data_dir": scratch}), cast(EventLog, _Unwritten(log)), clock)
    stepper.succession.may_lose = True  # somebody asked for it when the newest was made
    differences: list[str] = []
    served_step = -1
    begin: int | None = None
    wanted = {newest.step, served.step if served else newest.step}
    for step in stepper.rerun():
        begin = step if begin is None else begin
        progress(step, stepper.trainer.covers_ms)
        if step == newest.step:
            differences += compare(stepper.trainer, newest)
        if served is not None and step == served.step:
            differences += [f"serving copy: {said}" for said in compare_served(stepper.trainer, served)]
            served_step = step
        if step >= max(wanted):
            break
    stepper.trainer.close()
    assert begin is not None
    if step < newest.step:
        differences.append(f"the journal ends at step {step}, the checkpoint is of step {newest.step}")
    return Rerun(begin=begin, end=step, differences=tuple(differences), served_step=served_step)


def _copied(source: Path, target: Path) -> Kept:
    """Copy a trainer's folder as of one instant, without its newest checkpoint; that one, read."""
    for _ in range(ATTEMPTS):
        shutil.rmtree(target, ignore_errors=True)
        manifests = list(Manifests(source).look())
        if not manifests:
            raise SnapshotCorrupt(f"{source} has no checkpoint yet: a trainer writes one every training.checkpoint_s")
        try:
            newest = _checkpoint(source, manifests[0])
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("epoch-*", "resume", "*.tmp"))
        except (shutil.Error, OSError, SnapshotCorrupt):
            continue
        if list(Manifests(source).look())[:1] == manifests[:1]:
            break
    else:
        raise SnapshotCorrupt(f"{source} changed while it was copied, {ATTEMPTS} times: stop the trainer first")
    kept = Manifests(target)
    kept.newest.unlink()
    if kept.previous.exists():
        kept.previous.replace(kept.newest)
    elif not Journal(target).begins_at_first_step():
        raise SnapshotCorrupt(
            f"{source} holds one checkpoint, and its journal not the first step: audit again after the next checkpoint"
        )
    return newest


def _checkpoint(folder: Path, manifest: Mapping[str, Any]) -> Kept:
    small = orjson.loads(read_file(folder / manifest["small"]["name"], manifest["small"]["checksum"]))
    dense = read_file(folder / manifest["dense"]["name"], manifest["dense"]["checksum"])
    return Kept(
        step=manifest["step"],
        tables=segments.merged(segments.read_chain(folder, manifest["segments"])),
        dense=safetensors.torch.load(dense),
        small=_plain(small["trainer"]),
    )


def _snapshot(folder: Path, parameters: str) -> Kept | None:
    """The serving copy's newest snapshot, if it is of this configuration."""
    for _ in range(ATTEMPTS):
        manifest = next(iter(Manifests(folder).look()), None)
        if manifest is None or not same_parameters(manifest.get("schema", ""), parameters):
            return None
        try:
            tables = segments.merged(segments.read_chain(folder, manifest["segments"]))
        except SnapshotCorrupt:  # replaced meanwhile
            continue
        return Kept(step=manifest["step"], tables=tables, dense={}, small=b"")
    return None


def compare(trainer: Trainer, kept: Kept) -> Iterator[str]:
    """Rows with optimiser state and last-seen, default rows, counts, networks, bandit and small state that are not equal."""
    made, _ = segments.take(trainer.tables, "rerun")
    for name, part in kept.tables.items():
        yield from _rows_differ(f"table {name}", made[name].rows, part.rows, [f.name for f in fields(Rows)])
        yield from _rows_differ(f"table {name}: default", made[name].defaults, part.defaults, ["values", "state"])
        for counted in ("slots", "keys", "counts", "last_seen_ms", "sketch"):
            mine, theirs = (np.sort(getattr(p.pending, counted)) for p in (made[name], part))
            if not np.array_equal(mine, theirs):
                yield f"table {name}: counts of keys that are not admitted yet differ in {counted}"
    dense = dense_state(trainer)
    if dense.keys() != kept.dense.keys():
        yield f"dense weights have other names: {sorted(dense.keys() ^ kept.dense.keys())[:3]}"
    unequal = [name for name in dense.keys() & kept.dense.keys() if not _same(dense[name], kept.dense[name])]
    if unequal:
        yield f"dense weights or moments differ: {', '.join(sorted(unequal)[:3])}"
    if (small := _plain(trainer.small_state())) != kept.small:
        mine, theirs = orjson.loads(small), orjson.loads(kept.small)
        yield f"small state differs: {', '.join(sorted(n for n in mine if mine[n] != theirs.get(n)))}"


def compare_served(trainer: Trainer, served: Kept) -> Iterator[str]:
    """Rows that serving has otherwise than the trainer."""
    made, _ = segments.take(trainer.tables, "rerun-served")
    for name, part in served.tables.items():
        yield from _rows_differ(f"table {name}", made[name].rows, part.rows, ["values"])


def _rows_differ(what: str, made: Rows, kept: Rows, names: list[str]) -> Iterator[str]:
    (a, mine), (b, theirs) = _sorted(made), _sorted(kept)
    if len(a) != len(b) or not np.array_equal(mine, theirs):
        only = {(s, k) for s, k in mine.tolist()} ^ {(s, k) for s, k in theirs.tolist()}
        first = next(iter(sorted(only)), None)
        yield f"{what}: {len(a)} rows by log and journal, {len(b)} kept; in one alone: {len(only)}, first (slot, key) {first}"
        return
    for name in names:
        x, y = getattr(made, name)[a], getattr(kept, name)[b]
        wrong = np.flatnonzero((_bits(x) != _bits(y)).any(1)) if x.size else np.zeros(0, np.intp)
        if len(wrong):
            slot, key = mine[wrong[0]].tolist()
            yield f"{what}: {name} of {len(wrong)} rows differ, such as slot {slot}, key {key}"


def _sorted(rows: Rows) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.int64]]:
    order = np.lexsort((rows.keys, rows.slots))
    return order, np.stack([rows.slots[order].astype(np.int64), rows.keys[order]], 1)


def _bits(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Bytes [N, ...] of its rows: 0.0 and -0.0 are not the same."""
    return np.ascontiguousarray(array).view(np.uint8).reshape(len(array), -1)


def _same(mine: Any, theirs: Any) -> bool:
    return mine.dtype == theirs.dtype and mine.numpy().tobytes() == theirs.numpy().tobytes()


def _plain(small: Mapping[str, Any]) -> bytes:
    return orjson.dumps(small, option=orjson.OPT_SORT_KEYS | orjson.OPT_SERIALIZE_NUMPY)
