"""The retrieval generation in use: its successor is built when it is due, and what changes is placed meanwhile."""

from __future__ import annotations

from recsys import metrics
from recsys.candidates.explorer import Bandit
from recsys.candidates.generation import Generations
from recsys.clock import Clock
from services.common.process import logger
from services.ranking.builder import Builder


class Building:
    """Turns of one thread; building itself is the work of another process."""

    def __init__(self, generations: Generations, bandit: Bandit | None, builder: Builder, clock: Clock) -> None:
        self._generations, self._bandit, self._builder, self._clock = generations, bandit, builder, clock

    @property
    def busy(self) -> bool:
        """Whether a generation is being built, or will be at once."""
        return self._builder.pid is not None or self._generations.due(self._clock.monotonic_s())

    def turn(self) -> bool:
        """Begin to build, or use what was built; then `refresh`. There is never more to do at once."""
        generations, now_s = self._generations, self._clock.monotonic_s()
        if self._builder.idle:
            if generations.due(now_s):
                self._builder.start(generations.begin())
        elif built := self._builder.poll():
            generations.finish(*built, now_s)
            logger.info(
                "retrieval generation %s over %d items, recall@100 %.3f",
                generations.name,
                generations.num_items,
                generations.recall,
            )
        self.refresh()
        return False

    def refresh(self) -> None:
        """Place what changed in the generation in use; gauges."""
        generations, now_s = self._generations, self._clock.monotonic_s()
        generations.refresh(now_s)
        if self._bandit is not None:
            self._bandit.refresh()
        metrics.GENERATION_AGE_SECONDS.set(generations.age_s(now_s))
        metrics.GENERATION_ITEMS.set(generations.num_items)
        metrics.GENERATION_RECALL.set(generations.recall)

    def close(self) -> None:
        """Stop what is under way."""
        self._builder.close()
