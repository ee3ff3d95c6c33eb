"""`recsys up`."""

from __future__ import annotations

import argparse
import sys

from recsys import config
from recsys.errors import RecsysError
from services.cli.main import DONE, emit
from services.cli.up import Supervisor
from services.common.process import Stop, setup_logging


def run(options: argparse.Namespace) -> int:
    """Start everything, say where it is, stay until SIGTERM."""
    loaded = config.load(options.config)
    setup_logging("up")
    stop = Stop().install()
    arguments = ["--config", str(options.config)] if options.config else []
    supervisor = Supervisor(loaded, arguments, stop, accept_gap=options.accept_gap)
    try:
        supervisor.start()
        supervisor.wait_ready()
        urls = {name: supervisor.url(name) for name in ("ranking", "parameter", "trainer")}
        text = f"ready: API {urls['ranking']} (try {urls['ranking']}/docs), metrics at " + ", ".join(
            f"{u}/metrics" for u in urls.values()
        )
        emit(options, {"ok": True, **urls}, text)
        sys.stdout.flush()  # a script that reads a pipe waits for this line
        supervisor.watch()
    except RecsysError:
        if not stop:  # told to stop while starting is no failure
            raise
    finally:
        supervisor.stop()
    return DONE
