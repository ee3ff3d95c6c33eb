"""What is compiled is kept for the CPU that it was compiled for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from recsys.compiled import compiled

ASK = "from tests.unit.test_compiled import twice; twice(1.0); print(len(twice.stats.cache_hits))"


@compiled
def twice(x: float) -> float:
    """A kernel as all are."""
    return 2.0 * x


def hits(cache: Path, cpu: str) -> int:
    """How many kernels a process on such a CPU reads from the cache instead of compiling them."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache), "NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": ""}
    done = subprocess.run([sys.executable, "-c", ASK], env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_another_cpu_never_loads_foreign_code(tmp_path: Path) -> None:
    assert hits(tmp_path, "generic") == 0
    assert hits(tmp_path, "generic") == 1, "the same one does"
    assert hits(tmp_path, "nehalem") == 0, "code of a machine that copied the folder"
