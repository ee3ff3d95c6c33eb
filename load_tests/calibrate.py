"""How fast this machine is just now: `python -m load_tests.calibrate` prints seconds per round, alone in a process, one thread."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

ROUNDS = 9
_SIZE, _ROWS, _PICKED = 768, 1_000_000, 400_000
"""About 15 ms a round each; the gathered table (128 MB) is larger than a cache."""
_ONE_THREAD = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


def rounds() -> dict[str, list[float]]:
    """Seconds of each round of a fixed matmul and a fixed gather."""
    import numpy as np

    rng = np.random.default_rng(0)
    left, right = (rng.standard_normal((_SIZE, _SIZE), np.float32) for _ in range(2))
    product = np.empty((_SIZE, _SIZE), np.float32)
    table = np.ones((_ROWS, 32), np.float32)
    picked = rng.integers(0, _ROWS, _PICKED)
    gathered = np.empty((_PICKED, 32), np.float32)
    return {
        "matmul": _timed(lambda: np.matmul(left, right, out=product)),
        "gather": _timed(lambda: np.take(table, picked, axis=0, out=gathered, mode="clip")),
    }


def _timed(work: Callable[[], object]) -> list[float]:
    work()
    seconds = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return seconds


def measure() -> dict[str, list[float]]:
    """`rounds`, in a process of its own: threads of numerical libraries are chosen when they are loaded."""
    environment = psutil.Process().environ() | dict.fromkeys(_ONE_THREAD, "1")
    done = subprocess.run(
        [sys.executable, "-m", "load_tests.calibrate"],
        cwd=Path(__file__).resolve().parents[1],
        env=environment,
        capture_output=True,
        check=True,
    )
    measured: dict[str, list[float]] = json.loads(done.stdout)
    return measured


if __name__ == "__main__":
    print(json.dumps(rounds()))
