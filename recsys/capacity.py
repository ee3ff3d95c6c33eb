"""How many bytes each bounded thing may hold: shares of one budget, by default half of the machine's memory.

A thing that reaches its bound makes room or refuses, as `docs/reliability.md` says of each; `recsys_*_full_ratio` says how full
it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import psutil

SHARES: Mapping[str, float] = {
    "deep": 0.14,
    "wide": 0.10,
    "tower": 0.06,
    "edge": 0.04,
    "catalogue": 0.10,
    "counters": 0.10,
    "contexts": 0.04,
    "digests": 0.04,
    "open": 0.06,
    "held": 0.02,
    "users": 0.02,
}
"""Of the budget, by what is bounded. Tables count twice: the trainer's and the serving copy. Together with ranking's known rows and
what processes need before they hold anything, they stay below 1."""


def machine_bytes(limit: Path = Path("/sys/fs/cgroup/memory.max")) -> int:
    """Memory that this process may use: the machine's, or its control group's where that is less."""
    total: int = psutil.virtual_memory().total
    try:
        return min(total, int(limit.read_text()))
    except (OSError, ValueError):  # no control group, or "max"
        return total


def budget_bytes(configured: int) -> int:
    """`capacity.memory_bytes`; 0 means half of the machine's memory."""
    return configured or machine_bytes() // 2


def bound_bytes(configured: int, name: str) -> int:
    """Bytes that what is called `name` in `SHARES` may hold."""
    return int(budget_bytes(configured) * SHARES[name])


def entries(configured: int, name: str, bytes_each: int) -> int:
    """How many entries of `bytes_each` bytes fit into the bound of `name`; at least 1,000."""
    return max(1000, bound_bytes(configured, name) // bytes_each)
