"""The log is lost or made anew under saved positions: every service says so, and one remedy goes on without skipping anything."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from tests.system.embedded import ITEMS, Embedded, wait_for
from tests.system.services import ORDER, Services, now_ms

pytestmark = pytest.mark.system
REMEDY = "recsys up --accept-gap"
USERS = [f"new-{n}" for n in range(70)]


def click(system: Embedded, name: str) -> dict[str, object]:
    return {"event_id": name, "user_id": name, "item_id": "item-3", "time_ms": now_ms()}


def reason(system: Embedded, name: str) -> str:
    """Why a service is not ready; empty while it does not answer."""
    try:
        answer = httpx.get(f"{system.url(name)}/readyz", timeout=5.0)
    except httpx.HTTPError:
        return ""
    return "" if answer.status_code == 200 else str(answer.json()["reason"])


def test_a_log_made_anew_is_said_by_every_service_and_accepted_once(tmp_path: Path) -> None:
    extra = "training.checkpoint_s = 1\nparameter.snapshot_s = 1\n"
    system = Embedded(tmp_path, extra)
    try:
        system.start()
        system.call("PUT", "/v1/items", {"items": ITEMS})
        system.click(*(click(system, f"old-{n}") for n in range(60)))
        wait_for(lambda: system.history("old-59"), "the clicks")
        wait_for(lambda: system.metric("recsys_checkpoint_seconds_count", "trainer") > 0, "a checkpoint")
        wait_for(lambda: system.metric("recsys_snapshot_seconds_count", "parameter") > 0, "a snapshot")
        system.stop()
        readable = [path for path in (system.data, *system.data.rglob("*")) if path.stat().st_mode & 0o077]
        assert not readable, "what a service makes is for its owner alone"
        for path in (system.data / "log").iterdir():
            path.unlink()

        alone = Services(tmp_path, extra)
        try:
            for name in ORDER:
                alone.spawn(name)
            for name in ("ranking", "trainer"):
                wait_for(lambda name=name: REMEDY in reason(alone, name), f"{name} names the remedy", 60.0)
            alone.wait_ready("parameter")  # the trainer's checkpoint makes up for what it lost
            assert {o["status"] for o in alone.click(*(click(alone, user) for user in USERS))} == {"accepted"}
            assert "another log" in reason(alone, "ranking"), "grown past the old position, it is still another log"
            assert alone.metric("recsys_log_gaps_total") > 0
        finally:
            alone.close()

        system = Embedded(tmp_path, extra)
        system.start("--accept-gap")
        wait_for(lambda: all(system.history(user) for user in USERS), "every click that was accepted meanwhile")
        assert system.history("old-59") == ["old-59"], "what was known stays"
        assert system.ready("trainer") and system.ready("parameter")
    finally:
        system.close()
