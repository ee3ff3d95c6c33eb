"""Where the CPU milliseconds of a request go: per process, thread and room of the code, as a table and a flame graph.

The system is loaded as `load_tests.serve` loads it, without probes: first requests and feedback, then feedback alone. Meanwhile
py-spy samples the stacks of every process from outside, two hundred times a second. The kernel says what each thread used; the
samples only share that out, so a thread that waits weighs nothing, however often it is seen, and calls that have released the
interpreter's lock (NumPy, FAISS, our compiled kernels) count where they were called. A figure is what one request adds: with
requests, less without; below 0 is noise. Threads without Python (gRPC's, FAISS's own) have a row of their own;
what builds generations, by the clock and not by requests, is left out (`builders_…`). py-spy reads beside the running
process and does not stop it: only so does it know who waits; a look that finds a stack half changed is dropped. Example:

    python -m load_tests.profile --items 2000 --seconds 5 --json

`--save` keeps the figures, and the flame graph as docs/performance_flame.svg; then `python -m tests.documents` makes docs/performance.md.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path

import psutil

from load_tests.common import ROOT, Report, Running, run, say, services
from load_tests.flame import flame_graph
from load_tests.serve import SETTINGS, WARM_S, Serve

SAMPLES_A_SECOND = 200
FLAME = ROOT / "docs" / "performance_flame.svg"
SMALL = 0.01
"""Of the whole: what adds less is one row for all."""
REST, NATIVE, ENDED = "all else", "threads without Python", "processes that it started and that ended"
UNIT = "cpu ms a request"
OURS = re.compile(r"\((recsys|services)/([^:)]+?)(?:\.py)?\)$")
THREAD = re.compile(r"^thread \((\d+)\): (.*)$")

Stack = tuple[str, ...]
Used = dict[Stack, float]
"""CPU seconds by stack; its first two frames are the process and the thread."""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--rate", type=float, default=20.0, help="requests per second")
    parser.add_argument("--events", type=float, default=200.0, help="feedback events per second, in POSTs of 50")
    parser.add_argument("--seconds", type=float, default=30.0, help="with requests, and as many without")
    parser.add_argument("--root", type=Path, default=ROOT, help="checkout whose services are run (default: this one)")


def measure(options: argparse.Namespace, report: Report) -> None:
    with services(SETTINGS, root=options.root) as running:
        running.wait_ready()
        asyncio.run(profile(options, report, running))


async def profile(options: argparse.Namespace, report: Report, running: Running) -> None:
    serve = Serve(options, report, running)
    await serve.fill()
    say(f"warming up: {WARM_S:.0f} s")
    await serve.load(options.rate, WARM_S, 1, probes=False)
    found: list[Used] = []
    for number, rate in enumerate((options.rate, 0.0), 2):
        say(f"{rate:g} requests/s and {options.events:g} events/s for {options.seconds:g} s")
        with tempfile.TemporaryDirectory() as folder:
            spies = Spies(running, Path(folder), options.seconds)
            await serve.load(rate, options.seconds, number, probes=False)
            found.append(await asyncio.to_thread(spies.result))
    serve.close()
    told(report, *found, requests=options.rate * options.seconds)
    if options.save:
        title = f"CPU of all processes at {options.rate:g} requests/s and {options.events:g} events/s, {options.items:,} items"
        stacks = {stack: seconds * 1000 / options.seconds for stack, seconds in found[0].items()}
        FLAME.write_text(flame_graph(title, "CPU ms a second", stacks), encoding="utf-8")


class Spies:
    """One py-spy a process, from now on for so long, and what the kernel counts meanwhile."""

    def __init__(self, running: Running, folder: Path, seconds: float) -> None:
        spy = shutil.which("py-spy", path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin")
        if spy is None:
            raise SystemExit("py-spy is not installed: pip install py-spy")
        self._running, self._seconds = running, seconds
        # The services themselves: a builder may end before py-spy has looked.
        self._members = {found[0]: kind for kind, found in running.family.members().items()}
        self._before = {process: threads_s(process) for process in self._members}
        self._whole = {process: whole_s(process) for process in self._members}
        self._files = {process: folder / f"{process.pid}.txt" for process in self._members}
        form = ["--format", "raw", "--threads", "--nolineno", "--nonblocking", "--rate", str(SAMPLES_A_SECOND)]
        self._spies = [
            subprocess.Popen(
                [
                    spy,
                    "record",
                    "--pid",
                    str(process.pid),
                    "--duration",
                    f"{max(1, round(seconds))}",
                    *form,
                    "-o",
                    str(file),
                ],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for process, file in self._files.items()
        ]

    def result(self) -> Used:
        """After the load: CPU seconds by stack. RuntimeError says why py-spy could not look."""
        used: Used = {}
        taken = {process: (threads_s(process), whole_s(process)) for process in self._members if process.is_running()}
        for spy in self._spies:
            _, said = spy.communicate(timeout=self._seconds + 60)
            if spy.returncode:
                raise RuntimeError(f"py-spy ended with {spy.returncode}: {said[-300:]}: run as root, or allow ptrace")
        for process, (threads, whole) in taken.items():
            gained = {tid: s - self._before[process].get(tid, 0.0) for tid, s in threads.items()}
            samples = self._files[process].read_text(encoding="utf-8").splitlines()
            own, ended = (after - before for after, before in zip(whole, self._whole[process], strict=True))
            for stack, seconds in shared_out(self._members[process], samples, gained, own).items():
                used[stack] = used.get(stack, 0.0) + seconds
            if ended:
                used[(self._members[process], ENDED)] = used.get((self._members[process], ENDED), 0.0) + ended
        return used


def threads_s(process: psutil.Process) -> dict[int, float]:
    """CPU seconds of each thread by its number in the kernel."""
    return {thread.id: thread.user_time + thread.system_time for thread in process.threads()}


def whole_s(process: psutil.Process) -> tuple[float, float]:
    """Of the process with its threads that ended, and of its children that ended."""
    user, system, children_user, children_system = process.cpu_times()[:4]
    return user + system, children_user + children_system


def shared_out(process: str, samples: list[str], gained: Mapping[int, float], whole: float) -> Used:
    """What each thread used, by its samples; what no sampled thread used is that of threads without Python."""
    counts: dict[int, Counter[Stack]] = defaultdict(Counter)
    for line in samples:
        stack, _, count = line.rpartition(" ")
        thread, *frames = stack.split(";")
        if match := THREAD.match(thread):
            counts[int(match[1])][(process, re.sub(r"[-_]\d+$", "", match[2]), *frames)] += int(count)
    used: Used = defaultdict(float)
    for tid, stacks in counts.items():
        for seen, times in stacks.items():
            used[seen] += gained.get(tid, 0.0) * times / stacks.total()
    if (rest := whole - sum(used.values())) > 0:
        used[(process, NATIVE)] += rest
    return dict(used)


def room(stack: Stack) -> str:
    """Process, thread and, of the innermost frame of ours, the module; a library's name where no frame is ours."""
    process, thread, *frames = stack
    for frame in reversed(frames):
        if match := OURS.search(frame):
            return f"{process} | {thread} | {match[1]}/{match[2]}"
    library = frames[-1].rpartition("(")[2].rstrip(")").split("/")[0] if frames else ""
    return f"{process} | {thread} | {library or '-'}"


def told(report: Report, both: Used, quiet: Used, *, requests: float) -> None:
    """What a request adds: in all, by process, by thread, by module; of the last two the most first."""
    added: dict[str, float] = defaultdict(float)
    for used, sign in ((both, 1.0), (quiet, -1.0)):
        for stack, seconds in used.items():
            if stack[1] != ENDED:
                for name in ("request", f"request_{stack[0]}", f"{stack[0]} | {stack[1]}", room(stack)):
                    added[name] += sign * seconds * 1000 / requests
    least = SMALL * max(added["request"], 0.0)
    for depth in (0, 1, 2):
        found = sorted(((ms, name) for name, ms in added.items() if name.count(" | ") == depth), reverse=True)
        for ms, name in found:
            if not depth or abs(ms) >= least:
                report.add(name, ms, UNIT)
    shown = sum(ms for name, ms in added.items() if name.count(" | ") == 2 and abs(ms) >= least)
    report.add(REST, added["request"] - shown, UNIT)
    for name, used in (("builders_with_requests", both), ("builders_without", quiet)):
        report.add(name, sum(s for stack, s in used.items() if stack[1] == ENDED), "cpu s")


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(run("profile", measure, arguments))
