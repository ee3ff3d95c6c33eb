"""Where the real data lies that some tests use when it is there."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def shared(name: str) -> Path:
    """The path of a file of real data; the test is skipped, visibly, where it is absent."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{name} is not there: real data is optional")
    return path
