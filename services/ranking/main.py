"""The ranking process: parts, threads, HTTP."""

from __future__ import annotations

import asyncio
import socket
import threading

import torch
import uvicorn

from recsys.clock import SystemClock
from recsys.config import Config
from recsys.errors import ConfigError
from recsys.streams.open import open_log
from services.common.process import FolderLock, Stop, logger
from services.ranking.app import create_app
from services.ranking.service import RankingService


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; ConfigError when the port is taken."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise ConfigError(
            f"port {port} on {host} cannot be used ({error.strerror}): stop what uses it, or set ranking.port"
        ) from None
    return sock


def run(config: Config, stop: Stop) -> None:
    """Serve until SIGTERM."""
    torch.set_num_threads(1)
    lock = FolderLock(config.data_dir, "ranking")
    sock = bind(config.ranking.host, config.ranking.port)
    log = open_log(config, SystemClock(), "ranking")
    service = RankingService(config, log, SystemClock(), stop)
    app = create_app(service)
    server = uvicorn.Server(
        uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=5, lifespan="off")
    )
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    starting = threading.Thread(target=service.start, name="start", daemon=True)
    starting.start()

    async def serve() -> None:
        async def watch() -> None:
            while not stop:
                await asyncio.sleep(0.05)
            server.should_exit = True

        watching = asyncio.create_task(watch())
        await server.serve(sockets=[sock])
        stop.set()
        await watching

    logger.info("ranking on http://%s:%d", config.ranking.host, sock.getsockname()[1])
    try:
        asyncio.run(serve())
    finally:
        service.close()
        lock.release()
