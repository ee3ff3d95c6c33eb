"""Some hundred wrong messages into every door of a running system; ten thousand each: `python -m tests.system.hostile`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.system.hostile import GROWTH_BYTES, run

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.alone]


def test_wrong_messages_crash_nothing_stall_nothing_and_leave_memory_where_it_was(tmp_path: Path) -> None:
    rows = run(150, 3, tmp_path)
    assert len(rows) >= 12
    for row in rows:
        assert row["crashes"] == 0 and row["stalls"] == 0, row
        assert max(row["grown_bytes"].values()) < GROWTH_BYTES, row
