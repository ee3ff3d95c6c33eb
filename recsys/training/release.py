"""Which state serving gets, and when: all that changed, at once; while the model is held back, the last good checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from recsys import metrics
from recsys.errors import Fenced, SchemaMismatch, SnapshotCorrupt
from recsys.streams.base import EventLog
from recsys.table import segments
from recsys.training.checkpoint import Checkpoints
from recsys.training.epochs import newest_taken, take_epoch
from recsys.training.publish import NotFinite, Publisher

logger = logging.getLogger("recsys")


class Release:
    """Publishes what a trainer learned, under the newest epoch of its folder. Not thread-safe."""

    def __init__(self, folder: Path, log: EventLog, checkpoints: Checkpoints) -> None:
        self._folder, self._log, self._checkpoints = folder, log, checkpoints
        self.publisher = Publisher(log, checkpoints)
        self.held = ""
        """Why nothing that is learned is served; empty: it is."""
        self._unsound = ""
        """What of the last publish was not finite."""

    def begin(self) -> None:
        """Publish what a restored trainer has; where serving may have more than that, all of it."""
        served = self._checkpoints.good and self._checkpoints.found and not self._checkpoints.unpublished
        self.held = self._worse()
        if self.held:
            self._go_back()
        elif served:
            self._publish(dense=True)  # what changed since the checkpoint: that was published before
        else:
            self.publish_whole()

    def publish(self, *, dense: bool) -> None:
        """Publish what changed, and the dense weights, or nothing while it is held back. Raises Fenced."""
        if (newest := newest_taken(self._folder)) > self.publisher.epoch:
            raise Fenced(
                f"epoch {newest} took over from epoch {self.publisher.epoch}: this trainer stops; run one trainer a folder"
            )
        if self._unsound and dense:
            self._unsound = self.publisher.unsound()
        before, self.held = self.held, self._worse() or self._unsound
        if self.held and not before:
            self._go_back()
        elif before and not self.held:
            logger.warning("the model is good again: it is served from step %d on", self.publisher.trainer.steps)
            self.publish_whole()
        elif not self.held:
            self._publish(dense=dense)

    def publish_whole(self) -> None:
        """Publish all that the trainer has: serving then has that and nothing else."""
        self.held = self._unsound = ""
        if self._sent(self.publisher.publish_whole):
            self._checkpoints.good = True
            self._checkpoints.files.kept.unpin()

    def _publish(self, *, dense: bool) -> None:
        # Rows before the dense weights, whose version says that rows are as new.
        with metrics.PUBLISH_SECONDS.time():
            sent = self._sent(self.publisher.publish_rows)
        if dense and sent:
            self._sent(self.publisher.publish_dense)

    def _sent(self, publish: Callable[[], object]) -> bool:
        try:
            publish()
        except NotFinite as error:
            self.held = self._unsound = str(error)
            self._go_back()
            return False
        return True

    def _worse(self) -> str:
        tasks = ", ".join(sorted(self.publisher.trainer.guard.worse))
        return f"predictions of {tasks} are worse than always predicting the rate, or not finite" if tasks else ""

    def _go_back(self) -> None:
        """Let serving have the last good checkpoint, under an epoch of its own: its step is older."""
        self._checkpoints.good = False
        began = {task: worse.labels for task, worse in self.publisher.trainer.guard.worse.items()}
        for good in self._checkpoints.files.kept.good_before(began):
            try:
                opened = self._checkpoints.files.open(good)
                self.take_epoch()
                covers_ms = opened.small["trainer"]["covers_ms"]
                self.publisher.publish_older(opened.step, covers_ms, segments.merged(opened.rows), opened.dense)
            except (NotFinite, SnapshotCorrupt, SchemaMismatch) as error:
                logger.error("checkpoint %d is not served: %s", good["step"], error)
                continue
            self._checkpoints.files.kept.pin(good)
            logger.error("the model is held back (%s): step %d is served, learning goes on", self.held, opened.step)
            return
        logger.error("the model is held back (%s); there is no good checkpoint: what was published stays", self.held)

    def take_epoch(self, served: int = 0) -> None:
        """The next epoch of this folder: what other trainers of it publish is no longer believed."""
        self.publisher.begin(take_epoch(self._folder, self._log, max(served, self.publisher.epoch)))
