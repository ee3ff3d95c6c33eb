"""Replay: the whole loop over event files, offline, in event time, through the same code as the services.

Test, then train. Two drivers feed one loop: of logged impressions (`impression_log.py`), and of a click log (`click_log.py`).
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from recsys.config import Config
from recsys.evaluation.click_log import ClickLog
from recsys.evaluation.impression_log import ImpressionLog
from recsys.evaluation.replayed_loop import Event, Loop, Options
from recsys.types import Impression, Item


class Replay:
    """One run. Feed events in time order, then take the report of `finish`."""

    def __init__(self, config: Config, options: Options, folder: Path) -> None:
        self.loop = Loop(config, options, folder)
        self.driver = ClickLog(self.loop) if options.click_log else ImpressionLog(self.loop)
        self.events = 0
        self._now_ms = 0
        self._started = time.perf_counter()

    def run(self, events: Iterable[Event], on_progress: Callable[[int, int], None] = lambda *_: None) -> dict[str, Any]:
        """Replay all of them; `on_progress(events, event time)` now and then."""
        for event in events:
            if not self.step(*event):
                break
            if self.events % 2000 == 0:
                on_progress(self.events, event[0])
        return self.finish()

    def step(self, now_ms: int, kind: str, message: Any) -> bool:
        """Replay one event; False: it lies beyond the end, and so do all that follow."""
        if now_ms >= self.loop.options.until_ms:
            return False
        self._now_ms = now_ms
        if isinstance(message, Item):
            self.loop.item(message)
        elif isinstance(message, Impression):
            self.driver.impression(message, now_ms)
        else:
            self.driver.feedback(message, now_ms)
        self.events += 1
        return True

    def finish(self) -> dict[str, Any]:
        """Learn what is left, when every label is final; the report's JSON."""
        windows = [task.window_s for task in self.loop.config.tasks]
        self.loop.train(self._now_ms + 1 + int(max(windows) * 1000))
        seconds = time.perf_counter() - self._started
        return {
            "events": self.events,
            "seconds": round(seconds, 3),
            "events_per_second": round(self.events / seconds, 1),
            "examples_per_second": round(self.loop.examples / seconds, 1),
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            **self.driver.report(),
        }
