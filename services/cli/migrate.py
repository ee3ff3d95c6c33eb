"""`recsys checkpoint migrate`: carry what was learned over to another list of features, tasks and counters."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from recsys import config
from recsys.clock import SystemClock
from recsys.streams.open_log import open_log
from services.cli.checkpoint_command import folder_of
from services.cli.main import DONE, emit
from services.common.process import FolderLock

if TYPE_CHECKING:
    from recsys.training.migration.succession import Migrated


def run(options: argparse.Namespace) -> int:
    """Exit code 2 where it cannot be done, or the trainer runs."""
    from recsys.training.migration.succession import as_json, lines, would  # loads torch

    loaded = config.load(options.config)
    folder = folder_of(loaded)
    done = would(loaded, folder) if options.dry_run else _migrate(loaded)
    if done is None:
        emit(options, {"ok": True, "migrated": False}, "nothing to migrate: the checkpoint fits the configuration")
        return DONE
    verb = "would be migrated, as of its newest checkpoint" if options.dry_run else "migrated: start it"
    text = "\n".join([*lines(done), f"{folder} {verb}"])
    emit(options, {"ok": True, "migrated": not options.dry_run, **as_json(done)}, text)
    return DONE


def _migrate(loaded: config.Config) -> Migrated | None:
    from recsys.training.stepper import Stepper

    clock = SystemClock()
    lock = FolderLock(loaded.data_dir, "trainer")
    try:
        log = open_log(loaded, clock, "trainer")
        try:
            stepper = Stepper(loaded, log, clock)
            stepper.succession.may_lose = True
            stepper.succession.load(stepper.checkpoints)  # what was written is read back, too
            return stepper.succession.done
        finally:
            log.close()
    finally:
        lock.release()
