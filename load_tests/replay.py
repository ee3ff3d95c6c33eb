"""What a replay costs: CPU of a click that is answered and learned, and of an event that is counted alone; default configuration.

A made-up log of clicks is replayed twice, with every position answered and with none, in a process of its own each; those that are
compared take turns. What CPU the process used is counted from the end of the first tenth on: until then kernels are loaded. Example:

    python -m load_tests.replay --clicks 2000 --json
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch

from load_tests.common import Report, run, say
from recsys.config import parse
from recsys.evaluation.replay import Replay
from recsys.evaluation.replayed_loop import Options
from recsys.events.event_files import merged, write_events
from recsys.testing.world import World
from recsys.types import Feedback

LEAST = 1e-9
"""Of the positions are answered: none."""
START_MS, EACH_MS, USERS, ITEMS = 1_767_225_600_000, 2000, 500, 10_000


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--clicks", type=int, default=6000, help="of the log")
    parser.add_argument("--rounds", type=int, default=3)


def measure(options: argparse.Namespace, report: Report) -> None:
    with tempfile.TemporaryDirectory() as folder:
        log = write(Path(folder) / "log", options.clicks, options.seed)
        found: dict[float, list[float]] = {share: [] for share in (LEAST, 1.0)}
        for number in range(options.rounds):
            for share, each in found.items():
                each.append(click_ms(log, options.clicks, share))
            say(f"round {number + 1}: { ({share: round(each[-1], 4) for share, each in found.items()}) }")
    counted, answered = median(found[LEAST]), median(found[1.0])
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


def click_ms(log: Path, clicks: int, share: float) -> float:
    """CPU of a click of a replay that answers this share of the positions."""
    command = [sys.executable, "-c", "from load_tests.replay import child; child()", str(log), str(clicks), str(share)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
    return float(done.stdout.split()[-1])


def child() -> None:
    """Replay a log; print what CPU a click used: its reading, and its replay after the first tenth."""
    log, clicks, share = sys.argv[1:]
    torch.set_num_threads(1)
    before = time.process_time()
    events = list(merged([Path(log)]))
    reading_s, first = time.process_time() - before, ITEMS + int(clicks) // 10
    with tempfile.TemporaryDirectory() as folder:
        replay = Replay(parse({}), Options(sample=float(share)), Path(folder))
        for event in events[:first]:
            replay.step(*event)
        before = time.process_time()
        for event in events[first:]:
            replay.step(*event)
        replay.finish()
        spent_s = time.process_time() - before
    print(1000 * (reading_s / len(events) + spent_s / (len(events) - first)))


if __name__ == "__main__":
    sys.exit(run("replay", measure, arguments))
