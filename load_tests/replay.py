"""What a replay costs: CPU of a click that is answered and learned, and of an event that is counted alone; default configuration.

A made-up log of clicks is replayed twice, with every position answered and with none, and a short one takes off what any replay costs
at its start. Each replay is a process of its own, whose CPU is counted; those that are compared take turns. Example:

    python -m load_tests.replay --clicks 2000 --json
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import numpy as np

from load_tests.common import Report, run, say
from recsys.events.event_files import write_events
from recsys.testing.world import World
from recsys.types import Feedback

LEAST = 1e-9
"""Of the positions are answered: none."""
START_MS, EACH_MS, USERS, ITEMS = 1_767_225_600_000, 2000, 500, 10_000


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--clicks", type=int, default=6000, help="of the long log")
    parser.add_argument("--rounds", type=int, default=3)


def measure(options: argparse.Namespace, report: Report) -> None:
    short = options.clicks // 10
    with tempfile.TemporaryDirectory() as folder:
        logs = {clicks: write(Path(folder) / str(clicks), clicks, options.seed) for clicks in (short, options.clicks)}
        seconds: dict[tuple[int, float], list[float]] = {(n, share): [] for n in logs for share in (LEAST, 1.0)}
        for number in range(options.rounds):
            for (clicks, share), found in seconds.items():
                found.append(replayed_s(logs[clicks], share))
            say(f"round {number + 1}: { ({key: round(found[-1], 2) for key, found in seconds.items()}) }")
    between = options.clicks - short
    counted, answered = (
        1000 * (median(seconds[options.clicks, share]) - median(seconds[short, share])) / between
        for share in (LEAST, 1.0)
    )
    report.add("replay_event_cpu", counted, "ms")
    report.add("replay_position_cpu", answered - counted, "ms")


def write(folder: Path, clicks: int, seed: int) -> Path:
    """A log of clicks by users who like some kinds of items, one each two seconds."""
    world, rng = World(seed, num_users=USERS, num_items=ITEMS), np.random.default_rng(seed)
    items = world.items()
    ids = [item.item_id for item in items]

    def click(number: int) -> Feedback:
        user = world.any_user()
        some = [ids[n] for n in rng.integers(0, len(ids), 20)]
        chosen = some[int(np.argmax(world.probability(user, some)))]
        return Feedback(
            event_id=f"e{number}",
            user_id=world.users[user],
            item_id=chosen,
            type="click",
            time_ms=START_MS + EACH_MS * number,
        )

    write_events(folder, items, [], [click(number) for number in range(clicks)])
    return folder


def replayed_s(log: Path, share: float) -> float:
    """CPU seconds of one replay that answers this share of the positions."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    words = ["replay", "--events", str(log), "--sample", str(share), "--threads", "1", "--json"]
    command = [sys.executable, "-m", "services.cli.main", *words]
    subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    sys.exit(run("replay", measure, arguments))
