"""The knee: the rate of requests at which the p99 of `/v1/recommend` passes 100 ms, beside feedback that comes all the while.

Open loop, Poisson arrivals; each rate is tried for some seconds on the same warm system, of which the first two do not count.
Rates are doubled until one does not hold, then halved between until the two ends are a twentieth apart; one that does not hold
is tried once more, because something else may have kept the machine busy. p99 is that of `load_tests.serve`: the median over
seven windows of each window's percentile; a request that was refused or failed took for ever. No probes are sent beside: each
request counts. Example:

    python -m load_tests.knee --items 2000 --seconds 4 --most-seconds 60 --json
"""

from __future__ import annotations

import argparse
import asyncio
import math
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from load_tests.client import Sample
from load_tests.common import ROOT, Report, Running, run, say, services, windowed
from load_tests.serve import SETTINGS, WARM_S, Serve

LIMIT_MS = 100.0
FIRST, MOST = 10.0, 10_240.0
"""Requests a second: what the first is, and what nobody tries to pass."""
APART = 1.05
LEAD_S = 2.0
"""Before a rate's requests count: queues fill."""
CALM_MS, CALM_S = 50.0, 30.0
"""After a rate that did not hold, until a request alone takes at most so long again; and how long that is waited for."""

Holds = Callable[[float], Awaitable[bool]]


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--events", type=float, default=200.0, help="feedback events per second, in POSTs of 50")
    parser.add_argument("--seconds", type=float, default=15.0, help="that each rate is tried")
    parser.add_argument("--most-seconds", type=float, default=600.0, help="after which no further rate is tried")
    parser.add_argument("--root", type=Path, default=ROOT, help="checkout whose services are run (default: this one)")


def measure(options: argparse.Namespace, report: Report) -> None:
    with services(SETTINGS, root=options.root) as running:
        running.wait_ready()
        asyncio.run(Knee(options, report, running).run())


async def search(holds: Holds, going: Callable[[], bool]) -> tuple[float, float]:
    """The highest rate that held and the lowest that did not, at most `APART`; infinite when all held. `going`: time is left."""
    low, high = 0.0, math.inf
    rate = FIRST
    while going() and high == math.inf and rate <= MOST:
        low, high = (rate, high) if await holds(rate) else (low, rate)
        rate *= 2
    while going() and high < math.inf and high > APART * max(low, FIRST / 16):
        rate = (low + high) / 2
        low, high = (rate, high) if await holds(rate) else (low, rate)
    return low, high


def p99_ms(samples: list[Sample]) -> float:
    """Of those that were due after the lead."""
    counted = [s for s in samples if s.due_s >= LEAD_S] or samples
    times = [s.latency_s * 1000 if s.ok else math.inf for s in counted]
    return windowed([s.due_s for s in counted], times, 99) if counted else math.inf


class Knee:
    """The search on one running system."""

    def __init__(self, options: argparse.Namespace, report: Report, running: Running) -> None:
        self._options, self._report, self._running = options, report, running
        self._serve = Serve(options, report, running)
        self._p99_ms: dict[float, float] = {}

    async def run(self) -> None:
        await self._serve.fill()
        say(f"warming up: {WARM_S:.0f} s")
        await self._serve.load(FIRST, WARM_S, 1, probes=False)
        end = time.monotonic() + self._options.most_seconds
        low, high = await search(self._holds, lambda: time.monotonic() < end)
        self._serve.close()
        self._report.add("knee_one", low or None)
        self._report.add("knee_one_not_held", high, "requests/s", "higher")
        for rate, p99 in sorted(self._p99_ms.items()):
            self._report.add(f"p99_at_{rate:.4g}", p99, "ms as measured")

    async def _holds(self, rate: float) -> bool:
        return await self._tried(rate, 100) or await self._tried(rate, 200)

    async def _tried(self, rate: float, seed: int) -> bool:
        samples = await self._serve.load(rate, self._options.seconds + LEAD_S, seed, probes=False)
        self._p99_ms[rate] = p99 = p99_ms(samples)
        failed, late = sum(not s.ok for s in samples), max((s.late_s for s in samples), default=0.0)
        say(
            f"{rate:.4g} requests/s: p99 {p99:.0f} ms, {failed} of {len(samples)} failed, driver at most {late:.3f} s late"
        )
        if p99 > LIMIT_MS:
            await self._calm()
        return p99 <= LIMIT_MS

    async def _calm(self) -> None:
        """Until what an overload left is gone."""
        end = time.monotonic() + CALM_S
        while time.monotonic() < end:
            sample = await self._serve.one()
            if sample.ok and sample.latency_s * 1000 <= CALM_MS:
                return
            await asyncio.sleep(0.5)


if __name__ == "__main__":
    sys.exit(run("knee", measure, arguments))
