"""How many steps the trainer makes of what comes."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from recsys import metrics
from recsys.clock import SystemClock
from recsys.config import parse
from recsys.streams.sqlite_log import SqliteLog
from services.common.process import Stop
from services.common.trouble import Troubles
from services.trainer.main import CATCHING_UP, Loop
from services.trainer.pace import STEP_RECORDS, STEP_S, Pace


def steps() -> float:
    return next(s.value for m in metrics.JOURNAL_STEPS.collect() for s in m.samples if s.name.endswith("_total"))


def joined() -> float:
    return sum(s.value for m in metrics.JOINED.collect() for s in m.samples if s.name.endswith("_total"))


def feedback(number: int) -> tuple[str, bytes]:
    now_ms = time.time_ns() // 1_000_000
    text = f'{{"version":1,"event_id":"e{number}","user_id":"u","item_id":"i","type":"click","time_ms":{now_ms}}}'
    return "u", text.encode()


def test_what_trickles_in_is_learned_in_few_steps_and_the_first_of_it_at_once(tmp_path: Path) -> None:
    config = parse(
        {
            "data_dir": str(tmp_path),
            "model": {"dim": 4},
            "table": {"capacity": 1000},
        }
    )
    before_all = joined()
    log, stop = SqliteLog(tmp_path / "log", clock=SystemClock()), Stop()
    log.append("feedback", [feedback(n) for n in range(5)])
    loop = Loop(config, log, stop)
    loop.start(accept_gap=False)
    thread = threading.Thread(target=loop.run)
    thread.start()

    def learned(count: int) -> None:
        deadline_s = time.monotonic() + 60.0
        while joined() - before_all < count:
            assert time.monotonic() < deadline_s
            time.sleep(0.002)

    learned(5)
    before, began_s = steps(), time.monotonic()
    for number in range(5, 105):
        log.append("feedback", [feedback(number)])
        time.sleep(0.01)
    learned(105)
    took_s = time.monotonic() - began_s
    made = steps() - before
    stop.set()
    thread.join()
    log.close()
    assert made <= took_s / STEP_S + 2, "not one for each event"


def test_after_a_pause_it_is_ready_once_what_came_meanwhile_is_learned(tmp_path: Path) -> None:
    """Frozen by the system: the first turn says that it lives, not that it has read everything."""
    config = parse({"data_dir": str(tmp_path), "model": {"dim": 4}, "table": {"capacity": 1000}})
    log, stop = SqliteLog(tmp_path / "log", clock=SystemClock()), Stop()
    loop, passed_s = Loop(config, log, stop), 0.0
    loop._troubles = Troubles(lambda: time.monotonic() + passed_s)
    loop.start(accept_gap=False)
    loop._turn(), loop._turn()
    assert loop.not_ready() == ""
    passed_s = 10.0
    assert "nothing of it was finished" in loop.not_ready()
    loop._turn()
    assert loop.not_ready() == CATCHING_UP
    loop._turn()
    assert loop.not_ready() == ""
    log.close()


def test_a_large_step_and_a_stop_are_not_held_back() -> None:
    stop = Stop()
    pace = Pace(stop)
    pace.begin(1000)
    began_s = time.monotonic()
    pace.hold(1000 + STEP_RECORDS)
    assert time.monotonic() - began_s < STEP_S / 2, "there may be more"
    pace.begin(0)
    pace.hold(1)
    assert time.monotonic() - began_s >= STEP_S - 0.01
    stop.set()
    pace.begin(0)
    began_s = time.monotonic()
    pace.hold(1)
    assert time.monotonic() - began_s < STEP_S / 2
