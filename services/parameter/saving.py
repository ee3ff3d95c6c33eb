"""When the parameter service saves a snapshot, and what the log need not keep once it is there."""

from __future__ import annotations

from recsys import metrics
from recsys.errors import SnapshotCorrupt
from recsys.parameters.parameter_files import Place, Snapshots
from recsys.parameters.store import ParameterStore
from services.common.process import logger


class Saving:
    """Snapshots at an interval, one for each place in the log."""

    def __init__(self, snapshots: Snapshots, every_s: float, now_s: float) -> None:
        self._snapshots, self._every_s = snapshots, every_s
        self._began_s = now_s
        self._saved_at = -1

    def due(self, now_s: float, *, force: bool) -> bool:
        """Whether one should be saved now; the interval to the next begins here."""
        if not force and now_s - self._began_s < self._every_s:
            return False
        self._began_s = now_s
        return True

    def save(self, store: ParameterStore, place: Place) -> Place | None:
        """Save what the store holds, unless that is there; the place from which the log is needed, None where nothing was saved."""
        if place.position == self._saved_at:
            return None
        try:
            with metrics.SNAPSHOT_SECONDS.time():
                self._snapshots.save(store, place)
        except (OSError, SnapshotCorrupt) as error:
            logger.error("no snapshot (%s): the previous one stays, and more of the log is read after a restart", error)
            return None
        self._saved_at = place.position
        return self._snapshots.kept
