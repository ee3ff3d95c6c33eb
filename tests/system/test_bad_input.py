"""What strangers send and operators get wrong, and what `kill -9` leaves: clear messages, nothing lost, no traceback."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.system.embedded import ITEMS, Embedded, cmdline, embedded, free_ports, recsys, wait_for

pytestmark = pytest.mark.system
RECOMMEND, FEEDBACK, PUT = "POST /v1/recommend", "POST /v1/feedback", "PUT /v1/items"
DEEP = b"[" * 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Broken:
    """A system that may be broken, and what it answered before anything was in it."""

    system: Embedded
    before_items: dict[str, Any]
    before_events: dict[str, Any]


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broken]:
    with embedded(tmp_path_factory.mktemp("broken")) as system:
        before_items = system.call("POST", "/v1/recommend", {"user_id": "nobody"})
        system.call("PUT", "/v1/items", {"items": ITEMS})
        system.call("GET", "/v1/items/item-199")
        before_events = system.call("POST", "/v1/recommend", {"user_id": "nobody", "n": 100})
        yield Broken(system=system, before_items=before_items, before_events=before_events)


def test_an_empty_catalogue_is_an_empty_list_and_no_events_are_no_excuse(broken: Broken) -> None:
    assert broken.before_items["items"] == []
    shown = {item["item_id"] for item in broken.before_events["items"]}
    assert len(shown) == 100
    asked = {"user_id": "nobody", "n": 100, "exclude": sorted(shown)}
    others = {item["item_id"] for item in broken.system.call("POST", "/v1/recommend", asked)["items"]}
    assert len(others) == 100
    assert not others & shown


def body(**fields: object) -> bytes:
    return json.dumps(fields).encode()


@pytest.mark.parametrize(
    ("route", "content", "field"),
    [
        (RECOMMEND, b"", "body"),
        (RECOMMEND, b"{", "body"),
        (RECOMMEND, b"[]", "body"),
        (RECOMMEND, b"\xff\xfe", "body"),
        (RECOMMEND, b'{"user_id": NaN}', "body"),
        (RECOMMEND, b'{"user_id": "a", "context": {"x": Infinity}}', "body"),
        (RECOMMEND, b'{"user_id": "a", "context": {"x": 1e400}}', "body"),
        (RECOMMEND, b'{"user_id": "\\ud800"}', "body"),
        (RECOMMEND, DEEP, "body"),
        (FEEDBACK, b'{"events":' + DEEP, "body"),
        (PUT, b'{"item_id":' * 100_000, "body"),
        *((RECOMMEND, body(user_id="a", n=n), "n") for n in (0, -1, 101, 10**9, 10**30, "5", True, 1.5, None, [])),
        *(
            (RECOMMEND, body(user_id=u), "user_id")
            for u in (None, "", True, 1.5, [], {}, 2**64, "x" * 10_000, "a\0b", "a\nb", "\x85")
        ),
        (RECOMMEND, b"{}", "user_id"),
        (RECOMMEND, body(user_id="a", candidate=[]), "candidate"),
        (RECOMMEND, body(user_id="a", candidates=["x"] * 1001), "candidates"),
        (RECOMMEND, body(user_id="a", candidates=[{}]), "candidates[0]"),
        (RECOMMEND, body(user_id="a", exclude="item-1"), "exclude"),
        (RECOMMEND, body(user_id="a", activation="later"), "activation"),
        (RECOMMEND, body(user_id="a", filters="news"), "filters"),
        (RECOMMEND, body(user_id="a", filters={"categry": "news"}), "filters.categry"),
        (RECOMMEND, body(user_id="a", filters={"category": {"not": "news"}}), "filters.category"),
        (RECOMMEND, body(user_id="a", filters={"category": [{}]}), "filters.category"),
        (RECOMMEND, body(user_id="a", boosts=[{"times": 2}]), "boosts[0]"),
        (RECOMMEND, body(user_id="a", boosts=[{"sources": ["x"]}]), "boosts[0].sources"),
        (RECOMMEND, body(user_id="a", pins=[{"position": 0, "item_id": "b"}]), "pins[0].position"),
        (RECOMMEND, body(user_id="a", pins={"1": "b"}), "pins"),
        (RECOMMEND, body(user_id="a", context={"x": {}}), "context.x"),
        (FEEDBACK, body(events={}), "events"),
        (FEEDBACK, body(events=[], more=1), "events"),
        (FEEDBACK, body(events=[{}] * 10_001), "events"),
        (FEEDBACK, b"{}", "type"),
        (FEEDBACK, body(events=[None]), "event_id"),
        (FEEDBACK, body(version=1, user_id="a", item_id="b", type="$forget"), "type"),
        (FEEDBACK, body(version=1, user_id="a", item_id="b", type="click", time_ms=-1), "time_ms"),
        (FEEDBACK, body(version=1, user_id="a", item_id="b", type="click", value=True), "value"),
        (PUT, body(items=5), "items"),
        (PUT, body(version=2, item_id="a"), "version"),
        (PUT, body(version=1, item_id="a", attributes={"x": {"y": 1}}), "attributes.x"),
        (PUT, body(version=1, item_id="a", attributes={f"a{n}": ["x" * 999] * 60 for n in range(60)}), "attributes"),
        ("PATCH /v1/items", body(version=1, item_id="absent", title="x"), "item_id"),
        ("PATCH /v1/items", body(version=1, item_id="item-1", attributes=[]), "attributes"),
        ("DELETE /v1/items", b"{}", "item_ids"),
        ("GET /v1/items?limit=x", b"", "limit"),
        ("GET /v1/items?cursor=-1", b"", "limit"),
        ("GET /v1/items/a%00b", b"", "item_id"),
        ("GET /v1/users/" + "x" * 10_000, b"", "user_id"),
        ("DELETE /v1/users/", b"", "user_id"),
    ],
)
def test_bad_input_is_a_problem_that_names_field_value_and_remedy(
    running: Embedded, route: str, content: bytes, field: str
) -> None:
    method, path = route.split(" ", 1)
    answer = running.http.request(method, path, content=content)
    assert (answer.status_code, answer.headers["content-type"]) == (400, "application/problem+json")
    problem = answer.json()
    assert (problem["status"], problem["field"]) == (400, field)
    assert problem["detail"].startswith(("the body is", f"{field}", "cursor", repr(field), "nothing is", "'"))
    assert 20 < len(problem["detail"]) < 400


@pytest.mark.parametrize(
    ("route", "status", "says"),
    [
        ("GET /nowhere", 404, "/docs"),
        ("GET /", 404, "/docs"),
        ("GET /v1/items/nowhere", 404, "PUT"),
        ("GET /v1/recommend", 405, "POST"),
        ("PUT /v1/feedback", 405, "POST"),
        ("OPTIONS /v1/recommend", 405, "POST"),
        ("OPTIONS /nowhere", 404, "/docs"),
        ("TRACE /v1/feedback", 405, "POST"),
    ],
)
def test_wrong_routes_say_what_to_use(running: Embedded, route: str, status: int, says: str) -> None:
    answer = running.http.request(*route.split(" ", 1))
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")
    assert says in answer.json()["detail"]
    assert running.http.head("/v1/recommend").status_code == 405


def test_a_body_over_the_limit_is_413_whatever_its_header_says(running: Embedded) -> None:
    chunks = (b"x" * 65_536 for _ in range(150))
    for content in (b"x" * (9 * 2**20), chunks):
        answer = running.http.post("/v1/feedback", content=content)
        assert (answer.status_code, answer.headers["content-type"]) == (413, "application/problem+json")
        assert "max_body_bytes" in answer.json()["detail"]
    said = b"POST /v1/feedback HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n{}"
    assert b" 413 " in raw(running, said)


def raw(system: Embedded, data: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", system.ports["ranking"]), timeout=10.0) as connection:
        connection.sendall(data)
        return connection.recv(4096)


def test_half_requests_hold_nobody_up_and_leave_no_traceback(running: Embedded) -> None:
    half = b"POST /v1/recommend HTTP/1.1\r\nHost: x\r\nContent-Length: 200\r\n\r\n{"
    held = [socket.create_connection(("127.0.0.1", running.ports["ranking"])) for _ in range(100)]
    for connection in held:
        connection.sendall(half)
    assert len(running.call("POST", "/v1/recommend", {"user_id": "other", "n": 3})["items"]) == 3
    for connection in held:
        connection.close()
    assert b" 400 " in raw(running, b"POST /v1/feedback HTTP/1.1\r\nHost: x\r\nContent-Length: -2\r\n\r\n{}")
    assert b" 400 " in raw(running, b"\x00\x01\x02\r\n\r\n")
    wait_for(
        lambda: running.metric('recsys_http_requests_total{route="/v1/recommend",status="499"}') >= 100, "the ends"
    )
    for name in running.ports:
        assert "Traceback" not in (running.data / f"{name}.log").read_text()


def test_ten_thousand_events_of_which_three_are_bad(running: Embedded) -> None:
    before = running.metric('recsys_dead_letters_total{topic="feedback",reason="malformed"}')
    events: list[dict[str, Any]] = [
        {"event_id": f"many-{n}", "user_id": f"many-{n % 500}", "item_id": f"item-{n % 200}"} for n in range(10_000)
    ]
    events[5]["time_ms"] = "soon"
    events[500]["item_id"] = "x" * 10_000
    events[9_999]["user_id"] = "a\0b"
    outcomes = running.click(*events)
    refused = [n for n, outcome in enumerate(outcomes) if outcome["status"] != "accepted"]
    assert refused == [5, 500, 9_999]
    assert [outcomes[n]["event_id"] for n in refused] == ["many-5", "many-500", "many-9999"]
    assert [outcomes[n]["reason"].split(" ")[0] for n in refused] == ["time_ms", "item_id", "user_id"]
    wait_for(lambda: "many-9998" in running.history("many-498"), "the last good event")
    assert len(running.history("many-0")) == 19  # without number 500
    assert "many-5" not in running.history("many-5")
    assert running.metric('recsys_dead_letters_total{topic="feedback",reason="malformed"}') == before


def test_out_of_order_and_repeated_events_make_one_history(running: Embedded) -> None:
    now_ms = time.time_ns() // 1_000_000
    events = [
        {"event_id": f"mixed-{n}", "user_id": "mixed", "item_id": f"item-{n}", "time_ms": now_ms - 9000 + 1000 * n}
        for n in range(9)
    ]
    for order in ((4, 2, 7), (0, 8, 2, 4), (1, 3, 5, 6), range(9)):
        running.click(*(events[n] for n in order))
    wait_for(lambda: running.history("mixed") == [f"mixed-{n}" for n in range(9)], "nine events in time order")


def test_a_wrong_start_is_one_line_with_a_remedy(running: Embedded, tmp_path: Path) -> None:
    a_file = tmp_path / "file"
    a_file.touch()
    ports = free_ports(3)
    cases: list[tuple[str, Path | str, dict[str, int], str, str]] = [
        ("data_dir", a_file, {}, "is not a folder", "name one"),
        ("data_dir", a_file / "below", {}, "is not a folder", "name one"),
        ("data_dir", "/proc/nothing", {}, "cannot be written", "set data_dir"),
        ("data_dir", running.data, {}, "is used by another running up", "stop it"),
        ("data_dirr", tmp_path, {}, "data_dirr is not a known key", "'data_dir'"),
        *(
            ("data_dir", tmp_path / "new", {name: running.ports[name]}, f"port {running.ports[name]} ", "set " + name)
            for name in running.ports
        ),
        (
            "data_dir",
            tmp_path / "new",
            {"ranking": ports[1]},
            f"= {ports[1]} is parameter.metrics_port already",
            "set another",
        ),
        ("data_dir", tmp_path / "new", {"trainer": 0}, "trainer.metrics_port = 0", "set another"),
    ]
    for number, (key, folder, changed, says, remedy) in enumerate(cases):
        used = dict(zip(("ranking", "parameter", "trainer"), ports, strict=True)) | changed
        config = tmp_path / f"{number}.toml"
        config.write_text(
            f"{key} = {json.dumps(str(folder))}\nranking.port = {used['ranking']}\n"
            f"parameter.metrics_port = {used['parameter']}\ntrainer.metrics_port = {used['trainer']}\n"
        )
        refused(recsys("up", "--config", config), says, remedy)
    refused(recsys("up", "--config", tmp_path / "missing.toml"), "does not exist", "check its name")
    refused(recsys("serve", "ranking", "--config", running.config), "is used by another running ranking", "stop it", 1)
    assert running.ready()
    mine = [
        p.cmdline() for p in psutil.process_iter() if p.pid != os.getpid() and str(tmp_path) in " ".join(cmdline(p))
    ]
    assert mine == []


def refused(done: Any, says: str, remedy: str, code: int = 2) -> None:
    """1: a supervisor tries again, for the one that holds the folder may be ending."""
    assert done.returncode == code, done
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if line.startswith("recsys: ")]
    assert len(lines) == 1, done.stderr
    assert says in lines[0] and remedy in lines[0], lines
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["ranking", "parameter", "trainer"])
def test_a_killed_service_comes_back_with_everything_accepted(broken: Broken, name: str) -> None:
    system = broken.system
    steps = system.metric("recsys_journal_steps_total", "trainer")
    accepted = system.click({"event_id": f"kill-{name}", "user_id": f"kill-{name}", "item_id": "item-1"})
    system.call("PUT", "/v1/items", {"version": 1, "item_id": f"kept-{name}", "title": "kept"})
    assert accepted[0]["status"] == "accepted"
    old = system.pids()[name]
    os.kill(old, signal.SIGKILL)
    wait_for(lambda: system.pids().get(name, old) != old and system.ready(name), f"{name} again", 60.0)
    assert system.history(f"kill-{name}") == [f"kill-{name}"]
    assert system.call("GET", f"/v1/items/kept-{name}")["title"] == "kept"
    again = system.click({"event_id": f"kill-{name}", "user_id": f"kill-{name}", "item_id": "item-1"})
    assert again[0]["status"] == "duplicate"
    system.click({"event_id": f"after-{name}", "user_id": f"kill-{name}", "item_id": "item-2"})
    wait_for(lambda: len(system.history(f"kill-{name}")) == 2, "the event after the kill")
    base = 0.0 if name == "trainer" else steps
    wait_for(lambda: system.metric("recsys_journal_steps_total", "trainer") > base, "a step of the trainer")


def test_forgotten_and_accepted_survive_a_restart(broken: Broken) -> None:
    system = broken.system
    system.click({"event_id": "gone-1", "user_id": "gone", "item_id": "item-1"})
    system.click({"event_id": "stays-1", "user_id": "stays", "item_id": "item-1"})
    system.call("DELETE", "/v1/users/gone", status=202)
    children = system.pids().values()
    started = time.monotonic()
    assert system.stop() == 0
    assert time.monotonic() - started < 15.0
    assert not any(psutil.pid_exists(pid) for pid in children)
    system.start()
    assert system.history("gone") == []
    assert system.history("stays") == ["stays-1"]
    assert system.click({"event_id": "stays-1", "user_id": "stays", "item_id": "item-1"})[0]["status"] == "duplicate"


def test_services_end_with_a_killed_supervisor(broken: Broken) -> None:
    children = list(broken.system.pids().values())
    assert broken.system.stop(signal.SIGKILL) == -signal.SIGKILL
    wait_for(lambda: not any(psutil.pid_exists(pid) for pid in children), "the end of the services")
