"""From one configuration to another, in numbered steps; a crash before the last changes nothing.

1. The old configuration's trainer loads its checkpoint and runs its journal to the end. 2. Its state is laid out as the new
configuration has it. 3. A checkpoint of that is written, under new names; its manifest takes the place of the old one, which stays as
the one before. What is published under the old configuration means nothing under the new one: all is published anew.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import orjson
import torch

from recsys.config import Config
from recsys.errors import SchemaMismatch
from recsys.files import Manifests
from recsys.table import segments
from recsys.table.segments import TablesDelta
from recsys.training.checkpoint import Checkpoints, dense_state
from recsys.training.checkpoint_files import Captured
from recsys.training.intake import Intake
from recsys.training.journal import Journal
from recsys.training.migration.changes import Change, changes
from recsys.training.migration.made_of import REMEDY, Outgrown, check, unit
from recsys.training.migration.moved_rows import Moved, moved
from recsys.training.migration.moved_state import moved_state
from recsys.training.migration.moved_weights import moved_weights
from recsys.training.trainer import Trainer

logger = logging.getLogger("recsys")


class Predecessor(Protocol):
    """A stepper of the old configuration."""

    trainer: Trainer
    intake: Intake
    checkpoints: Checkpoints
    journal: Journal
    accept_gap: bool

    def restore(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Migrated:
    """What a migration did, or would do."""

    changes: tuple[Change, ...]
    kept: Mapping[str, int]
    """Rows by table and slot."""
    dropped: Mapping[str, int]
    begun: tuple[str, ...]
    """What begins anew."""


class Succession:
    """How a stepper comes to its checkpoint: what another configuration made is carried over first, said aloud."""

    def __init__(self, predecessor: Callable[[Config], Predecessor], config: Config) -> None:
        self._predecessor, self._config = predecessor, config
        self.may_lose = False
        """Whether features, tasks and counters that the configuration has no more may be dropped, with what was learned of them."""
        self.done: Migrated | None = None

    def load(self, checkpoints: Checkpoints, *, accept_gap: bool = False) -> dict[str, int]:
        """As `Checkpoints.load`; SchemaMismatch if something would be lost that may not."""
        try:
            return checkpoints.load()
        except Outgrown as outgrown:
            before = outgrown.before
        if not self.may_lose:
            refuse_losses(before, self._config)
        changes(before, self._config)  # or what cannot be
        old = self._predecessor(before)
        old.accept_gap = accept_gap
        state = _state_of(old)
        del old
        gc.collect()  # its tables, whose memory the next ones need
        self.done = _succeed(state, checkpoints, before, self._config)
        return checkpoints.load()


def refuse_losses(before: Config, after: Config) -> None:
    """SchemaMismatch, naming what would be lost, unless the change consists of additions."""
    found = changes(before, after)
    if lost := [change.text for change in found if change.loses]:
        raise SchemaMismatch(f"what was learned would be lost; {REMEDY}: {'; '.join(lost)}")


class _State(NamedTuple):
    """What the old trainer hands over."""

    rows: TablesDelta
    dense: dict[str, torch.Tensor]
    small: dict[str, Any]
    positions: dict[str, int]
    logs: dict[str, str]
    good: bool
    rolled_back: str


def _state_of(old: Predecessor) -> _State:
    """The state after its journal's last step; it is not used again."""
    try:
        old.restore()
        rows, _ = segments.take(old.trainer.tables, "migration")
        return _State(
            rows,
            dense_state(old.trainer),
            old.trainer.small_state(),
            dict(old.intake.positions),
            dict(old.intake.logs),
            old.checkpoints.good,
            old.checkpoints.rolled_back,
        )
    finally:
        old.trainer.close()
        old.checkpoints.close()
        old.journal.close()


def _succeed(state: _State, checkpoints: Checkpoints, before: Config, after: Config) -> Migrated:
    """Write the state under the new configuration; `checkpoints` then hold that, what it came from as the checkpoint before it."""
    found, tables = changes(before, after), moved(state.rows, before, after)
    small = moved_state(state.small, before, after, checkpoints.folder / "open")
    said = {"positions": state.positions, "logs": state.logs, "trainer": small}
    checkpoints.files.write(
        Captured(
            step=small["steps"],
            rows=tables.tables,
            versions={},
            dense=moved_weights(state.dense, before, after),
            small=orjson.dumps(said, option=orjson.OPT_SERIALIZE_NUMPY),
            positions=state.positions,
            spilled=sorted(small["joiner"]["spill"]),
            covers_ms=small["covers_ms"],
            good=state.good,
            judged=small["guard"]["judged"],
            origin=None,
            rolled_back=state.rolled_back,
            made_of={**unit(after), "unpublished": True},
        ),
        [],
    )
    done = _said(found, tables)
    for line in lines(done):
        logger.warning("%s", line)
    return done


def would(config: Config, folder: Path) -> Migrated | None:
    """What migrating the newest checkpoint in a trainer's folder would do; None where it fits as it is, or there is none.

    Of the steps since that checkpoint nothing is known. SchemaMismatch, SnapshotCorrupt: it cannot be migrated.
    """
    for manifest in Manifests(folder).look():
        try:
            check(str(folder), manifest, config)
        except Outgrown as outgrown:
            rows = segments.merged(segments.read_chain(folder, manifest["segments"]))
            return _said(changes(outgrown.before, config), moved(rows, outgrown.before, config))
        return None
    return None


def _said(found: Sequence[Change], tables: Moved) -> Migrated:
    begun = tuple(f"counts of keys without a row in table {name}: a filter counts otherwise" for name in tables.begun)
    return Migrated(changes=tuple(found), kept=tables.kept, dropped=tables.dropped, begun=begun)


def lines(migrated: Migrated) -> Iterator[str]:
    """What to say of it."""
    yield from (change.text for change in migrated.changes)
    for verb, rows in (("kept", migrated.kept), ("dropped", migrated.dropped)):
        if rows:
            each = ", ".join(f"{name} {count:,}" for name, count in rows.items())
            yield f"{sum(rows.values()):,} rows {verb} ({each})"
    yield from (f"begun anew: {text}" for text in migrated.begun)


def as_json(migrated: Migrated) -> dict[str, Any]:
    """For the command's answer."""
    return {
        "changes": [{"what": change.text, "loses": change.loses} for change in migrated.changes],
        "kept": dict(migrated.kept),
        "dropped": dict(migrated.dropped),
        "begun": list(migrated.begun),
    }
