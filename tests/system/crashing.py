"""Services that die at a named gap: SIGKILL, in the middle of what the gap names, once it is armed.

Nothing in the product knows of it but the trainer's `crash` argument: functions are wrapped from outside, before anything uses
them. A gap is armed by a file with its name; the process that passes the gap next deletes the file and kills itself.

`python -m tests.system.crashing` is a nursery: it has loaded and compiled everything and forks a service for each line of JSON
that it reads, so that a restart takes a second. Each is a process of its own, with the `main` of `recsys`.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import queue
import select
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NoReturn

from tests.system.embedded import ROOT, START_S, environment
from tests.system.gaps import BUILDER, GAPS, OF_KAFKA, Gap

ENVIRONMENT = "CRASH_ARMED"
"""Where a builder, which is no child of the nursery, finds the folder of armed gaps."""
BUILD = "build"


HOOK = "from tests.system import crashing\n\ncrashing.install_in_builder()\n"


class Armed:
    """The folder of armed gaps: one file a process. What is started by a service's own command finds its hook there, too."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "sitecustomize.py").write_text(HOOK, encoding="utf-8")

    def arm(self, gap: Gap) -> None:
        partial = self.folder / f"{gap.process}.partial"
        partial.write_text(gap.name, encoding="utf-8")
        partial.replace(self.folder / gap.process)

    def let_build(self, wanted: bool) -> None:
        """Whether generations are built from now on: each start of ranking would cost seconds of a core."""
        if wanted:
            (self.folder / BUILD).touch()
        else:
            (self.folder / BUILD).unlink(missing_ok=True)

    def holds(self, gap: Gap) -> bool:
        """Whether nobody passed it yet."""
        return (self.folder / gap.process).exists()


_mine = Path("nobody")
"""The armed file of this process."""


def _pass(gap: Gap) -> None:
    try:
        if _mine.read_text(encoding="utf-8") != gap.name:
            return
        _mine.unlink()
    except FileNotFoundError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


def _owner(where: str) -> tuple[Any, str]:
    """What has the function, and its name. AttributeError, ImportError: there is no such place any more."""
    module, _, path = where.partition(":")
    *classes, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for each in classes:
        owner = getattr(owner, each)
    return owner, name


def _wrap(where: str, made: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    owner, name = _owner(where)
    real = getattr(owner, name)
    setattr(owner, name, functools.wraps(real)(made(real)))


def _matches(pattern: str, arguments: Sequence[Any]) -> bool:
    return not pattern or any(fnmatch(str(a), pattern) for a in arguments if isinstance(a, str | Path))


_calls: Counter[str] = Counter()


def _dying(gap: Gap, real: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        hit = _matches(gap.matching, args)
        if hit and gap.inside:
            _calls[gap.name] += 1
            hit = _calls[gap.name] == gap.number
        if hit and gap.when == "before":
            _pass(gap)
        result = real(*args, **kwargs)
        if hit and gap.when == "after":
            _pass(gap)
        return result

    return call


def _counting(gap: Gap, real: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        _calls[gap.name] = 0
        try:
            return real(*args, **kwargs)
        finally:
            _calls[gap.name] = gap.number  # outside of it nothing counts

    return call


def _with_seams(real: Callable[..., Any], seams: dict[str, Gap]) -> Callable[..., Any]:
    def crash(name: str) -> None:
        if name in seams:
            _pass(seams[name])

    return lambda *args, **kwargs: real(*args, **{**kwargs, "crash": crash})


def install(gaps: Iterable[Gap]) -> None:
    """Wrap what the gaps name. Functions that others import by name come first."""
    wrapped = [gap for gap in gaps if gap.when != "seam"]
    for gap in sorted(wrapped, key=lambda gap: not gap.where[0].startswith("recsys.files:")):
        for where in gap.where:
            _wrap(where, functools.partial(_dying, gap))
        if gap.inside:
            _calls[gap.name] = gap.number
            _wrap(gap.inside, functools.partial(_counting, gap))
    if seams := {gap.where[0].removeprefix("seam:"): gap for gap in gaps if gap.when == "seam"}:
        _wrap("recsys.training.runner:Runner.__init__", lambda real: _with_seams(real, seams))
        _wrap("recsys.training.journal:Journal.cut", _keeping)
        _wrap("recsys.candidates.generation:Generations.due", _waiting)


def _waiting(real: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: (_mine.parent / BUILD).exists() and real(*args)


def _keeping(real: Callable[..., Any]) -> Callable[..., Any]:
    """Every file of the journal stays elsewhere, so that the whole run can be run again."""

    def cut(journal: Any, *args: Any) -> Any:
        keep_journals(journal._folder, _mine.parent)
        return real(journal, *args)

    return cut


def keep_journals(folder: Path, kept: Path) -> None:
    """Copy those that are complete: all but the newest."""
    for path in sorted(folder.glob("journal-*.jsonl"))[:-1]:
        if not (kept / path.name).exists():
            shutil.copyfile(path, kept / path.name)


def install_in_builder() -> None:
    """For `sitecustomize`: a builder is started by ranking, by its own command."""
    global _mine
    if BUILDER in sys.orig_argv and ENVIRONMENT in os.environ:
        _mine = Path(os.environ[ENVIRONMENT]) / "builder"
        install([gap for gap in GAPS.values() if gap.process == "builder"])


class Forked:
    """A process of the nursery, as `subprocess.Popen` shows one."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._ended = threading.Event()

    def ended(self, code: int) -> None:
        self.returncode = code
        self._ended.set()

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if not self._ended.wait(timeout):
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Nursery:
    """The process that forks services. Thread-safe; what it forked ends with it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.system.crashing"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env=environment(),
        )
        self._born: queue.Queue[Forked] = queue.Queue()
        self._lock = threading.Lock()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        forked: dict[int, Forked] = {}
        assert self._process.stdout is not None
        for line in self._process.stdout:
            said = json.loads(line)
            if "code" in said:
                forked.pop(said["pid"]).ended(said["code"])
            else:
                forked[said["pid"]] = Forked(said["pid"])
                self._born.put(forked[said["pid"]])

    def spawn(self, arguments: Sequence[str], output: Path, armed: Path, *, ahead_ms: int = 0) -> Forked:
        """A process that runs `recsys` with these arguments; `armed`: the file that arms its gaps; `ahead_ms`: its clock's error."""
        request = {"arguments": list(arguments), "output": str(output), "armed": str(armed), "ahead_ms": ahead_ms}
        assert self._process.stdin is not None
        with self._lock:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            return self._born.get(timeout=START_S)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._listener.join(30)


def _say(**fields: int) -> None:
    os.write(1, json.dumps(fields).encode() + b"\n")


def _reap(alive: set[int]) -> None:
    while alive:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        alive.discard(pid)
        _say(pid=pid, code=os.waitstatus_to_exitcode(status))


def _nursery() -> None:
    """Fork a service for each request; the end of stdin ends all."""
    install([*GAPS.values(), *OF_KAFKA.values()])
    for service in ("trainer", "parameter", "ranking"):
        importlib.import_module(f"services.{service}.main")
    from recsys.table import warm
    from recsys.training import learner

    learner.warm_up()
    warm.warm_up()
    alive: set[int] = set()
    with os.fdopen(os.dup(0), "rb", buffering=0) as requests:
        while True:
            _reap(alive)
            if not select.select([requests], [], [], 0.02)[0]:
                continue
            if not (line := requests.readline()):
                break
            pid = os.fork()
            if not pid:
                _become(json.loads(line))
            alive.add(pid)
            _say(pid=pid)
    for pid in alive:
        os.kill(pid, signal.SIGKILL)


def _set_clock(ahead_ms: int) -> None:
    clock = importlib.import_module("recsys.clock").SystemClock
    real = clock.now_ms
    clock.now_ms = lambda self: real(self) + ahead_ms


def _become(request: dict[str, Any]) -> NoReturn:
    """In a forked process: run one command of `recsys`, and end with its code."""
    global _mine
    code = 70
    try:
        _mine = Path(request["armed"])
        out = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for standard, descriptor in ((0, os.open(os.devnull, os.O_RDONLY)), (1, out), (2, out)):
            os.dup2(descriptor, standard)
        os.environ[ENVIRONMENT] = str(_mine.parent)
        os.environ["PYTHONPATH"] = f"{_mine.parent}:{ROOT}"
        if request["ahead_ms"]:
            _set_clock(request["ahead_ms"])
        code = importlib.import_module("services.cli.main").main(request["arguments"])
    except BaseException:
        sys.excepthook(*sys.exc_info())
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _nursery()
