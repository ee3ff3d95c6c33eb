"""The ranking process: parts, threads, HTTP."""

from __future__ import annotations

import asyncio
import sys
import threading

import uvicorn

from recsys.clock import SystemClock
from recsys.config import Config
from recsys.errors import RecsysError
from recsys.streams.open_log import open_log
from services.common.process import FolderLock, Stop, bind, logger, settle_heap
from services.ranking.app import create_app
from services.ranking.connections import Guard, Limits, affordable
from services.ranking.service import RankingService

WATCH_S = 0.25
"""How soon a signal or a thread that died is noticed: half wakes the process twice as often for nothing."""
SWITCH_S = 0.0005
"""For so long a thread that wants the interpreter waits for one that holds it. With Python's 5 ms, p90 and p99 of requests beside 200
events/s were 30 and 117 ms instead of 19 and 34."""


def run(config: Config, stop: Stop, *, accept_gap: bool = False) -> None:
    """Serve until SIGTERM. `accept_gap`: go on although the log lost records that positions point at."""
    sys.setswitchinterval(SWITCH_S)
    lock = FolderLock(config.data_dir, "ranking")
    sock = bind(config.ranking.host, config.ranking.port, "ranking.port")
    log = open_log(config, SystemClock(), "ranking")
    service = RankingService(config, log, SystemClock(), stop, accept_gap=accept_gap)
    service.on_caught_up = settle_heap
    app = create_app(service)
    guard = Guard(affordable(Limits()))
    settings = uvicorn.Config(
        app,
        http=guard.protocol,  # type: ignore[arg-type]
        ws="none",
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=5,
        lifespan="off",
    )
    server = uvicorn.Server(settings)
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    died: list[str] = []

    def on_death(what: threading.ExceptHookArgs) -> None:
        name = what.thread.name if what.thread else "?"
        logger.critical("thread %s died", name, exc_info=what.exc_value)
        died.append(name)
        stop.set()

    threading.excepthook = on_death
    starting = threading.Thread(target=service.start, name="start", daemon=True)
    starting.start()

    async def serve() -> None:
        async def watch() -> None:
            while not stop and not server.should_exit:
                guard.sweep(asyncio.get_running_loop().time())
                await asyncio.sleep(WATCH_S)
            server.should_exit = True
            stop.set()  # the server takes the signals while it runs; the threads stop beside its last answers

        watching = asyncio.create_task(watch())
        await server.serve(sockets=[sock])
        stop.set()
        await watching

    logger.info("ranking on http://%s:%d", config.ranking.host, sock.getsockname()[1])
    try:
        with asyncio.Runner(loop_factory=settings.get_loop_factory()) as runner:
            runner.run(serve())
    finally:
        service.close()
        lock.release()
    if died:
        raise RecsysError(
            f"thread {died[0]} died: its traceback is in the log; nothing accepted is lost, start it again"
        )
