"""Steps that end the process itself (memory, a crash in native code): known by a file, tried in other processes."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import orjson
import torch

from recsys.clock import SystemClock
from recsys.config import Config, parse
from recsys.errors import LogUnavailable, StepFailed, Stopped
from recsys.streams.open_log import open_log
from recsys.training import learner
from recsys.training.journal import Entry, as_json, of_json

_RAN, _FAILED = 0, 3
_POLL_S = 0.1
TRIAL_S = 900.0
"""A step in a process of its own that takes longer, loading and the journal included, will not end: half may be a large checkpoint."""


class Deaths:
    """Which step a restart is running, in a file: a restart that ended in it finds it there."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "restarting"
        self._step, self._count = 0, 0
        if self._path.exists():
            words = self._path.read_text().split()
            if len(words) == 2 and all(word.isdecimal() for word in words):
                self._step, self._count = int(words[0]), int(words[1])

    def begin(self, step: int, newest: int) -> bool:
        """The step is about to run again. Whether two processes ended in it: two restarts, or one and the process that ran it
        first, which it did last of all if it is the newest."""
        died = self._count if step == self._step else 0
        self._path.write_text(f"{step} {died + 1}")
        return died >= (1 if step == newest else 2)

    def survived(self) -> None:
        """The restart is over, or ends of its own accord."""
        self._path.unlink(missing_ok=True)


class Trials:
    """A process that forks another for each step it is asked to run. Nothing is loaded into it, so that it forks fast."""

    def __init__(self, config: Config, stopped: Callable[[], bool]) -> None:
        self._config, self._stopped = config, stopped
        self._process = _spawned()

    def fails(self, entry: Entry) -> StepFailed | None:
        """What ends a process that runs the step, from the last checkpoint and the journal on. What raises is found without one."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        stdin.write(orjson.dumps({"config": self._config.model_dump(mode="json"), "entry": as_json(entry)}) + b"\n")
        stdin.flush()
        until_s = time.monotonic() + TRIAL_S
        while not select.select([stdout], [], [], _POLL_S)[0]:
            if time.monotonic() > until_s:
                self.close()
                self._process = _spawned()
                return StepFailed(f"the step did not end within {TRIAL_S:.0f} s")
            if self._stopped():
                raise Stopped("the trainer was told to stop: a restart goes on from its last checkpoint and journal")
        code = int(stdout.readline() or _FAILED + 1)
        if code < 0:
            return StepFailed(f"the process was ended by signal {-code}")
        if code not in (_RAN, _FAILED):
            raise LogUnavailable(f"step {entry.step} could not be tried in another process: see its message above")
        return None

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()  # its end tells the process to end, and the one it forked
        self._process.wait()


def _spawned() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "recsys.training.deaths"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )


def _serve() -> None:
    from recsys.training import stepper  # noqa: F401 - imported and compiled before anything is forked

    learner.warm_up()
    while request := sys.stdin.buffer.readline():
        if not (pid := os.fork()):
            _end_with(request)
        while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
            if select.select([sys.stdin], [], [], _POLL_S)[0]:  # nothing is sent before the answer: it is the end
                os.kill(pid, 9)
        os.write(1, b"%d\n" % os.waitstatus_to_exitcode(ended[1]))


def _end_with(request: bytes) -> NoReturn:
    """In a forked process: run the step, and end."""
    from recsys.training.stepper import Stepper

    code = _FAILED + 1
    try:
        raw = orjson.loads(request)
        config = parse(raw["config"])
        torch.set_num_threads(1)  # of all sums in one order a replay is bit-equal
        stepper = Stepper(config, open_log(config, SystemClock(), "trial"), SystemClock())
        code = _FAILED if stepper.fails(of_json(raw["entry"])) else _RAN
    except Exception:
        traceback.print_exc()
        raise
    finally:
        os._exit(code)


if __name__ == "__main__":
    _serve()
