"""`recsys rollback`: a command left in a file for the trainer, which goes back to a checkpoint that is still there.

The rolled-back state gets a step above all there were, so that no journal of before is run after it, and an epoch of its own, under
which everything is published. Whatever ends the process in between: the command is still there, and is followed from its start.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from recsys.errors import SnapshotCorrupt
from recsys.files import KeptManifests, Manifests
from recsys.streams.base import EventLog
from recsys.streams.positions import resume
from recsys.training import commands, ledger
from recsys.training.checkpoint import Checkpoints
from recsys.training.intake import CONSUMER, TOPICS, Intake
from recsys.training.journal import Journal
from recsys.training.trainer import Trainer


class Rollback(NamedTuple):
    """Go back to the checkpoint of a step, and learn again what came after it, or skip it."""

    name: str
    step: int
    skips: bool


def read_rollback(folder: Path) -> Rollback | None:
    """What was left and not followed yet; what was followed, or is no such command, is forgotten."""
    found = commands.read(folder, commands.ROLLBACK)
    if found is None:
        return None
    followed = any(fields.get("rolled_back") == found["name"] for fields in Manifests(folder).look())
    if followed or not isinstance(found.get("step"), int):
        forget_rollback(folder)
        return None
    return Rollback(found["name"], found["step"], found["how"] == commands.SKIP)


def forget_rollback(folder: Path) -> None:
    """The command was followed, or cannot be; its checkpoint stays no longer for its sake."""
    commands.forget(folder, commands.ROLLBACK)
    KeptManifests(folder).unwant()


def find(checkpoints: Checkpoints, log: EventLog, command: Rollback) -> dict[str, Any]:
    """The checkpoint to go back to. Raises SnapshotCorrupt and SchemaMismatch when it cannot be loaded, LogTruncated when what came after
    it is to be learned again and the log no longer has that. Nothing is changed."""
    manifest = next((fields for fields in checkpoints.files.kept.every() if fields["step"] == command.step), None)
    if manifest is None:
        raise SnapshotCorrupt(f"there is no checkpoint {command.step} any more: see `recsys checkpoint list`")
    opened = checkpoints.files.open(manifest)
    if not command.skips:
        resume(log, CONSUMER, TOPICS, opened.small["positions"], opened.small.get("logs", {}), accept_gap=False)
    return manifest


def step_above_all(steps: int, checkpoints: Checkpoints, journal: Journal) -> int:
    """A step that no checkpoint, no line of the journal and no trainer of before has."""
    newest = max(steps, *(fields["step"] for fields in checkpoints.files.kept.every()))
    return max([newest, *(entry.step for entry in journal.entries(newest + 1))]) + 1


def stand(trainer: Trainer, intake: Intake, saved: Mapping[str, int], logs: Mapping[str, str], *, skip: bool) -> None:
    """Let the trainer, which holds a checkpoint's state, go on at its positions; or at the log's ends: what lies between is a gap that
    somebody accepted. Items are never skipped."""
    intake.begin(saved, logs, accept_gap=skip)
    if not skip:
        return
    trainer.breaker.close()
    trainer.ledger.lost(trainer.joiner.emitter.waiting(), ledger.UNLEARNED)
    trainer.joiner.drop_all()
    for key, end in intake.ends().items():
        if not key.startswith("item/"):
            trainer.ledger.passed_gap(key, saved.get(key, 0), end)
            intake.passed({key: end})
