"""What every process does alike."""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import subprocess
import sys

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


SWALLOWING = """
import ctypes, os, signal, threading, time
from services.common.process import Interrupted, Stop

def compare(a, b):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.1)
    return 0

stop = Stop().install(60.0)
try:
    with stop.interrupts():
        callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(compare)
        ctypes.CDLL(None).qsort((ctypes.c_int * 2)(), 2, 4, callback)
        print("swallowed", flush=True)
        time.sleep(50)
except Interrupted:
    print("interrupted", flush=True)
    os._exit(0)
"""


def test_what_a_signal_raises_where_nobody_hears_it_is_raised_again() -> None:
    """A compiler calls Python back, and ignores what is raised there."""
    done = subprocess.run([sys.executable, "-c", SWALLOWING], capture_output=True, text=True, timeout=55, check=True)
    assert done.stdout.split() == ["swallowed", "interrupted"], done
