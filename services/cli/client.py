"""The ranking service's HTTP API, as the commands use it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import httpx
import orjson

from recsys.config import Config
from recsys.errors import BadInput, RecsysError
from services.common.process import Stop

RETRY_S = 30.0
"""A service that answered once may be away for this long (a restart takes 10 s) before a command gives up."""
_PAUSE_S = 0.25
_CONNECTIONS = 32


def url_of(config: Config, given: str | None) -> str:
    """The given address, or the configuration's: a service that listens everywhere is asked on this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(config.ranking.host, config.ranking.host)
    return (given or f"http://{host}:{config.ranking.port}").rstrip("/")


class Client:
    """Thread-safe. A service that was never reached is an error at once; one that goes away or is full (503) is retried.

    Raises RecsysError that names the address and the remedy. `stop` ends waiting.
    """

    def __init__(self, url: str, stop: Stop) -> None:
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL:
            parsed = httpx.URL()
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise BadInput(f"--url {url!r} is not an address: write it like http://127.0.0.1:8000", field="url")
        self.url = url
        self._stop = stop
        self._reached = False
        limits = httpx.Limits(max_connections=_CONNECTIONS, max_keepalive_connections=_CONNECTIONS)
        self._http = httpx.Client(
            base_url=url,
            timeout=30.0,
            limits=limits,
            headers={"Content-Type": "application/json"},
            verify=parsed.scheme
            == "https",  # else 25 ms go for certificates that nobody asks for; redirects are not followed
        )

    def call(self, method: str, path: str, body: bytes) -> dict[str, Any]:
        """The answer's JSON object; one with outcomes may have any status. Raises TooLarge for 413, Refused for others."""
        answer = self._request(method, path, body)
        if answer.status_code == 413:
            raise TooLarge(
                f"{len(body)} bytes are more than {self.url} takes: raise ranking.max_body_bytes", field="body"
            )
        try:
            found = orjson.loads(answer.content)
        except orjson.JSONDecodeError:
            found = {}
        if isinstance(found, dict) and (answer.status_code == 200 or "outcomes" in found):
            return found
        detail = found.get("detail") if isinstance(found, dict) else None
        what = detail or ("see its log" if answer.status_code >= 500 else "not this project's API: check --url")
        raise Refused(f"{method} {self.url}{path} answered {answer.status_code}: {what}")

    def system(self, topic: str) -> str:
        """Which log of `topic` the services have: another system's, or one that was made anew, is another one."""
        return str(self.call("GET", "/v1/system", b"")["log"][topic])

    def outcomes(self, method: str, path: str, name: str, rows: Sequence[bytes]) -> list[dict[str, str]]:
        """Send JSON rows as {name: [...]}; one outcome a row. A body that is too large is sent in halves."""
        try:
            return list(self.call(method, path, b'{"%s":[%s]}' % (name.encode(), b",".join(rows)))["outcomes"])
        except TooLarge as error:
            if len(rows) == 1:
                return [{"status": "rejected", "reason": str(error)}]
            half = len(rows) // 2
            return [*self.outcomes(method, path, name, rows[:half]), *self.outcomes(method, path, name, rows[half:])]

    def _request(self, method: str, path: str, body: bytes) -> httpx.Response:
        deadline = time.monotonic() + RETRY_S
        while True:
            try:
                answer = self._http.request(method, path, content=body)
                self._reached = True
                if answer.status_code != 503:
                    return answer
                why = f"answers 503 {answer.text[:200]}"
            except httpx.TransportError as error:
                why = f"does not answer ({error})"
                if not self._reached:
                    deadline = 0.0
            if time.monotonic() > deadline or self._stop.wait(_PAUSE_S):
                raise Away(f"{self.url} {why}: start the services with `recsys up`, or name their address with --url")

    def close(self) -> None:
        self._http.close()


class Away(RecsysError):
    """The service does not answer, or is full for too long."""


class Refused(RecsysError):
    """The service answered, but not what was asked for."""


class TooLarge(BadInput):
    """A body over the service's limit."""
