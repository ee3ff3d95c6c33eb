"""`recsys demo`: the real services on a generated catalogue; three clicks, and what they change."""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from rich.console import Console
from rich.table import Table

from recsys import config
from recsys.clock import SystemClock
from recsys.errors import RecsysError
from services.cli.main import DONE, MISSED, emit
from services.cli.up import ORDER, Supervisor
from services.common.process import Stop, setup_logging

KINDS = (
    "boots",
    "tents",
    "lamps",
    "kettles",
    "guitars",
    "novels",
    "bicycles",
    "cameras",
    "sofas",
    "puzzles",
    "telescopes",
    "teapots",
    "rucksacks",
    "paintings",
    "headphones",
    "globes",
    "clocks",
    "kayaks",
    "looms",
    "spices",
)
COLOURS = ("red", "blue", "green", "black", "white", "golden", "grey", "amber")
STYLES = ("classic", "light", "sturdy", "small", "large", "vintage", "modern", "plain")
PER_KIND, TOP, CLICKS, OLD_CLICKS = 40, 10, 3, 100
DAY_MS = 86_400_000
START_S = 120.0
WAIT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How many of the top ten are of the clicked kind, for a user who clicked and a control user who did not."""

    kind: str
    before: int
    after: int
    control_before: int
    control_after: int


class Shop:
    """The generated catalogue and the HTTP client."""

    def __init__(self, url: str, seed: int) -> None:
        self.http = httpx.Client(base_url=url, timeout=10.0)
        self.rng = np.random.default_rng(seed)
        self.kinds: dict[str, str] = {}
        self.by_kind: dict[str, list[str]] = {kind: [] for kind in KINDS}
        self.items: list[dict[str, Any]] = []
        for number in range(PER_KIND * len(KINDS)):
            kind = KINDS[number % len(KINDS)]
            colour, style = (str(self.rng.choice(words)) for words in (COLOURS, STYLES))
            item_id = f"item-{number}"
            title = f"{style.capitalize()} {colour} {kind} no. {number // len(KINDS) + 1}"
            self.items.append(
                {
                    "version": 1,
                    "item_id": item_id,
                    "title": title,
                    "attributes": {"category": kind, "tags": [colour, style]},
                }
            )
            self.kinds[item_id] = kind
            self.by_kind[kind].append(item_id)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = self.http.post(path, json=body)
        if answer.status_code >= 400:
            raise RecsysError(f"POST {path} answered {answer.status_code}: {answer.text[:300]}")
        result: dict[str, Any] = answer.json()
        return result

    def load(self) -> None:
        """Put the catalogue, then clicks of 150 people who like two kinds each; wait until both are known."""
        self.http.put("/v1/items", json={"items": self.items}).raise_for_status()
        last = f"/v1/items/{self.items[-1]['item_id']}"
        self._wait(lambda: self.http.get(last).status_code == 200, "the catalogue")
        now_ms = SystemClock().now_ms()
        events = []
        ranks = 1.0 / np.arange(1, PER_KIND + 1)
        for person in range(150):
            liked = self.rng.choice(KINDS, 2, replace=False)
            for click in range(8):
                item_id = str(self.rng.choice(self.by_kind[str(liked[click % 2])], p=ranks / ranks.sum()))
                when = now_ms - 3_600_000 + person * 20_000 + click * 1000
                events.append(click_event(f"person-{person}", item_id, when, f"visit-{person}"))
        self.click(events)
        self.knows(events[-1]["user_id"], events[-1]["event_id"])

    def click(self, events: Sequence[dict[str, Any]]) -> int:
        """Send feedback; returns the time after which an answer must know it."""
        outcomes = self.post("/v1/feedback", {"events": list(events)})["outcomes"]
        if bad := [o for o in outcomes if o["status"] != "accepted"]:
            raise RecsysError(f"feedback was not accepted: {bad[0]}")
        return SystemClock().now_ms()

    def recommend(self, user_id: str) -> dict[str, Any]:
        return self.post("/v1/recommend", {"user_id": user_id, "n": TOP})

    def knows(self, user_id: str, event_id: str) -> None:
        """Wait until the user's history holds an event."""
        self._wait(
            lambda: any(e["event_id"] == event_id for e in self.http.get(f"/v1/users/{user_id}").json()["history"]),
            "the clicks",
        )

    @staticmethod
    def _wait(done: Any, what: str) -> None:
        deadline = time.monotonic() + WAIT_S
        while not done():
            if time.monotonic() > deadline:
                raise RecsysError(f"{what} did not arrive within {WAIT_S:.0f} s")
            time.sleep(0.01)

    def count(self, answer: dict[str, Any], kind: str) -> int:
        return sum(self.kinds[item["item_id"]] == kind for item in answer["items"])


def click_event(
    user_id: str, item_id: str, time_ms: int, session_id: str, request_id: str | None = None
) -> dict[str, Any]:
    """One click message."""
    event = {
        "version": 1,
        "event_id": f"{user_id}-{time_ms}-{item_id}",
        "user_id": user_id,
        "item_id": item_id,
        "type": "click",
        "time_ms": time_ms,
        "session_id": session_id,
    }
    return event if request_id is None else event | {"request_id": request_id}


def visit(shop: Shop, kind_of_user: str, show: Console) -> tuple[Outcome, float, Counter[str]]:
    """One user's story beside a control user with the same past; returns outcome, delay in ms, sources shown."""
    user, control = f"{kind_of_user}-user", f"{kind_of_user}-control"
    if kind_of_user == "old":
        _remember_old_clicks(shop, (user, control))
    before, control_before = shop.recommend(user), shop.recommend(control)
    kind = min(KINDS, key=lambda k: (shop.count(before, k) + shop.count(control_before, k), k in _old_kinds(), k))
    now_ms = SystemClock().now_ms()
    chosen = shop.by_kind[kind][-CLICKS:]
    started = time.perf_counter()
    accepted_ms = shop.click([click_event(user, item, now_ms + n, "today") for n, item in enumerate(chosen)])
    after = _changed(shop, user, before, accepted_ms)
    delay_ms = (time.perf_counter() - started) * 1000
    control_after = shop.recommend(control)
    outcome = Outcome(
        kind=kind_of_user,
        before=shop.count(before, kind),
        after=shop.count(after, kind),
        control_before=shop.count(control_before, kind),
        control_after=shop.count(control_after, kind),
    )
    past = f"with {OLD_CLICKS} older clicks on other kinds" if kind_of_user == "old" else "never seen before"
    _print(show, f"A user {past} clicks three {kind}", shop, before, after, kind)
    show.print(f"  {kind} in the top ten: {outcome.before} → [bold]{outcome.after}[/bold]", end="; ")
    show.print(f"a control user who clicked nothing: {outcome.control_before} → {outcome.control_after}", end="; ")
    show.print(f"list changed [bold]{delay_ms:.0f} ms[/bold] after the click\n")
    sources = Counter(source for answer in (before, after) for item in answer["items"] for source in item["sources"])
    return outcome, delay_ms, sources


def _old_kinds() -> tuple[str, ...]:
    return KINDS[:5]


def _remember_old_clicks(shop: Shop, users: Sequence[str]) -> None:
    start_ms = SystemClock().now_ms() - 2 * DAY_MS
    last = ""
    picks = [str(shop.rng.choice(shop.by_kind[_old_kinds()[n % len(_old_kinds())]])) for n in range(OLD_CLICKS)]
    for user in users:
        events = [click_event(user, item, start_ms + n * 60_000, f"past-{n // 10}") for n, item in enumerate(picks)]
        shop.click(events)
        last = events[-1]["event_id"]
        shop.knows(user, last)


def _changed(shop: Shop, user: str, before: dict[str, Any], accepted_ms: int) -> dict[str, Any]:
    """The first answer that contains everything accepted until `accepted_ms` and differs from the list before."""
    shown = [item["item_id"] for item in before["items"]]
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        answer = shop.recommend(user)
        known = answer["as_of"]["user_state"]["time_ms"] >= accepted_ms
        if known and [item["item_id"] for item in answer["items"]] != shown:
            return answer
        time.sleep(0.002)
    raise RecsysError(f"no answer changed within {WAIT_S:.0f} s of the clicks")


def _print(show: Console, title: str, shop: Shop, before: dict[str, Any], after: dict[str, Any], kind: str) -> None:
    places = {item["item_id"]: item["position"] for item in before["items"]}
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    for column in ("before", "", "after", "because"):
        table.add_column(column, no_wrap=True, overflow="ellipsis")
    for old, new in zip(before["items"], after["items"], strict=False):
        was = places.get(new["item_id"])
        arrow = (
            "[green]★ new[/green]"
            if was is None
            else "="
            if was == new["position"]
            else f"{'↑' if was > new['position'] else '↓'} {abs(was - new['position'])}"
        )
        style = "bold green" if shop.kinds[new["item_id"]] == kind else ""
        table.add_row(
            old["title"], arrow, f"[{style}]{new['title']}[/{style}]" if style else new["title"], new["reason"]
        )
    show.print(table)


@contextlib.contextmanager
def services(folder: Path, show: Console) -> Iterator[Supervisor]:
    """The three real services, in embedded mode, on free ports, in `folder`."""
    ports = free_ports(3)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "demo.toml"
    path.write_text(
        f"data_dir = {json.dumps(str(folder / 'data'))}\n[ranking]\nport = {ports[0]}\n"
        f"[parameter]\nmetrics_port = {ports[1]}\n[trainer]\nmetrics_port = {ports[2]}\n"
    )
    supervisor = Supervisor(config.load(path), ["--config", str(path)], Stop().install())
    try:
        supervisor.start()
        with show.status("starting ranking, trainer and parameter …"):
            supervisor.wait_ready(timeout_s=START_S)
        yield supervisor
    finally:
        supervisor.stop()


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in sockets]


def run(options: argparse.Namespace) -> int:
    """The demo; 0 only if both users' lists followed their clicks and the control users' did not."""
    setup_logging("demo", level=40)
    show = Console(stderr=options.json, width=None if Console().is_terminal else 120)
    with contextlib.ExitStack() as stack:
        folder = options.data_dir or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="recsys-demo-")))
        supervisor = stack.enter_context(services(folder, show))
        shop = Shop(supervisor.url("ranking"), options.seed)
        shop.load()
        outcomes, delays, sources = [], [], Counter[str]()
        for kind_of_user in ("new", "old"):
            outcome, delay_ms, shown = visit(shop, kind_of_user, show)
            outcomes.append(outcome)
            delays.append(delay_ms)
            sources += shown
        why = verdict(outcomes)
        total = sum(sources.values())
        show.print(
            "where the shown items came from: "
            + ", ".join(f"{name} {count / total:.0%}" for name, count in sources.most_common())
        )
        result = {
            "ok": not why,
            "why": why or "both lists followed the clicks, the control users' did not",
            "delay_ms": round(max(delays), 1),
            "users": [asdict(o) for o in outcomes],
        }
        if options.json:
            emit(options, result)
        if why:
            show.print(f"[red]not as it should be: {why}[/red]")
        if not options.exit:
            stay(supervisor, show)
    return MISSED if why else DONE


def verdict(outcomes: Sequence[Outcome]) -> str:
    """What is wrong; empty when all is well."""
    for outcome in outcomes:
        if outcome.after - outcome.before < 3:
            return f"{outcome.kind} user: {outcome.before} → {outcome.after} of the clicked kind, at least 3 more were expected"
        if abs(outcome.control_after - outcome.control_before) > 1:
            return f"{outcome.kind} control user moved from {outcome.control_before} to {outcome.control_after}"
    return ""


def stay(supervisor: Supervisor, show: Console) -> None:
    """Leave the services running until Ctrl-C."""
    api = supervisor.url("ranking")
    show.print(
        f'\nThe services are still running. Try:\n  curl -s {api}/v1/recommend -d \'{{"user_id":"you","n":5}}\'\n  API docs   {api}/docs'
    )
    show.print("  metrics    " + "  ".join(f"{supervisor.url(name)}/metrics" for name in ORDER))
    show.print("  read next  README.md, docs/architecture.md, docs/events.md\nCtrl-C stops them.")
    supervisor.watch()
