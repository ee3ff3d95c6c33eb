"""What each process of a running system has in its memory."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import psutil
import pytest

from tests.system.embedded import ITEMS, Embedded, cmdline, embedded, wait_for

pytestmark = pytest.mark.system


def libraries(pid: int) -> set[str]:
    """Names of the files that a process has mapped to run; none when it is gone."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8").splitlines()
        return {Path(line.split()[-1]).name for line in lines if re.search(r" r-xp .*/", line)}
    return set()


def built(system: Embedded) -> set[str]:
    """What those had mapped that built the first generation."""
    ranking, found = psutil.Process(system.pids()["ranking"]), set[str]()

    def done() -> bool:
        for child in ranking.children():
            if "services.ranking.builder" in cmdline(child):
                found.update(libraries(child.pid))
        return system.metric("recsys_generation_items") >= len(ITEMS)

    wait_for(done, "a generation", 60.0)
    return found


def test_torch_is_in_the_trainer_alone(tmp_path: Path) -> None:
    """Ranking before and after its calls are compiled, its builder, parameter and the supervisor do without."""
    with embedded(tmp_path) as system:
        system.call("PUT", "/v1/items", {"items": ITEMS})
        system.click({"event_id": "e", "user_id": "u", "item_id": "item-1"})
        assert system.call("POST", "/v1/recommend", {"user_id": "u", "n": 10})["items"]
        builder = built(system)
        wait_for(lambda: system.metric("recsys_scoring_compiled") == 1, "compiled calls", 60.0)
        assert system.call("POST", "/v1/recommend", {"user_id": "u", "n": 10})["items"]
        assert system.process is not None
        found = {name: libraries(pid) for name, pid in system.pids().items()}
        found |= {"up": libraries(system.process.pid), "builder": builder}
    assert any("faiss" in name for name in builder) and found["parameter"] and found["up"]
    with_torch = {name for name, mapped in found.items() if any(one.startswith("libtorch") for one in mapped)}
    assert with_torch == {"trainer"}
