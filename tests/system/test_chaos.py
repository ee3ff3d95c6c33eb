"""The schedule of `python -m tests.system.chaos`."""

from __future__ import annotations

from tests.system.chaos import EACH_WITHIN, HOW, SERVERS, SERVICES, schedule


def test_every_process_is_reached_once_in_ten_by_every_way() -> None:
    for mode, targets in (("embedded", SERVICES), ("kafka", SERVICES + SERVERS)):
        plan = schedule(mode, 200, 3)
        assert plan == schedule(mode, 200, 3)
        for start in range(0, 200, EACH_WITHIN):
            assert {target for target, _, _ in plan[start : start + EACH_WITHIN]} == set(targets)
        assert {(target, how) for target, how, _ in plan} == {(target, how) for target in targets for how in HOW}
