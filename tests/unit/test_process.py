"""What every process does alike."""

from __future__ import annotations

import contextlib
import gc
import io
import logging

from services.common.process import logger, settle_heap, setup_logging


def test_a_settled_heap_is_not_looked_at_again_and_what_is_made_later_is_collected() -> None:
    frozen = gc.get_freeze_count()
    kept = [[n] for n in range(1000)]
    try:
        settle_heap()
        assert gc.get_freeze_count() > frozen + len(kept)
        assert not any(each is kept for each in gc.get_objects())
        gc.collect()
        circle: list[object] = []
        circle.append(circle)
        del circle
        assert gc.collect() == 1
    finally:
        gc.unfreeze()


def test_lines_go_to_what_stderr_is_now_not_to_what_an_earlier_command_closed() -> None:
    kept, level = logging.root.handlers[:], logging.root.level
    first, second = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stderr(first):
            setup_logging("demo")
        first.close()
        with contextlib.redirect_stderr(second):
            logger.error("what is said")
    finally:
        logging.root.handlers[:] = kept
        logging.root.setLevel(level)
    assert second.getvalue().endswith("demo ERROR what is said\n") and "Traceback" not in second.getvalue()
