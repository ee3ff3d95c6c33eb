"""What an operator left in files for a running trainer: looked for now and then, and judged by whether something waits for it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from recsys.clock import Clock
from recsys.training import commands
from recsys.training.breaker import Breaker
from recsys.training.rollback import Rollback, read_rollback

logger = logging.getLogger("recsys")
LOOK_S = 1.0
"""A command that nothing waits for is looked for this often."""


class OperatorCommands:
    """The commands in a trainer's folder. Whoever follows one forgets it, once a restart would not follow it again."""

    def __init__(self, folder: Path, clock: Clock) -> None:
        self._folder, self._clock = folder, clock
        self._looked_s = {commands.RESUME: 0.0, commands.ROLLBACK: 0.0}

    def resume(self, breaker: Breaker, ends: Callable[[], Mapping[str, int]]) -> dict[str, Any] | None:
        """What `recsys trainer resume --learn | --skip` left for the open breaker; `ends`: of the log now, up to which is skipped."""
        waits = breaker.is_open and not breaker.skipping
        if not self._looks(commands.RESUME, waits) or (command := commands.read(self._folder, commands.RESUME)) is None:
            return None
        if not waits or command["name"] == breaker.resumed:
            logger.warning("resume --%s: nothing waits for it, the breaker is closed", command["how"])
            self.resumed()
            return None
        logger.info("resume --%s: learning goes on", command["how"])
        return {**command, "ends": ends()} if command["how"] == commands.SKIP else command

    def resumed(self) -> None:
        """The journal has the command to resume."""
        commands.forget(self._folder, commands.RESUME)

    def rollback(self, followed: str) -> Rollback | None:
        """What `recsys rollback` left, unless it is the one of this name, which was followed."""
        if not self._looks(commands.ROLLBACK):
            return None
        command = read_rollback(self._folder)
        return None if command is None or command.name == followed else command

    def _looks(self, name: str, waits: bool = False) -> bool:
        """Whether it is time to look for one: at once while something waits for it."""
        now_s = self._clock.monotonic_s()
        if not waits and now_s - self._looked_s[name] < LOOK_S:
            return False
        self._looked_s[name] = now_s
        return True
