"""`recsys send`, `log export` and `import`: against a small server that speaks the API, and a real embedded log."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys import config
from recsys.clock import ManualClock
from recsys.errors import BadInput
from recsys.events import messages
from recsys.events.event_files import merged, read_items, write_events
from recsys.streams.open_log import open_log
from recsys.testing.servers import free_port
from recsys.types import Feedback, Impression, Item, ShownItem
from services.cli import client
from services.cli.main import BAD, DONE, MISSED, main
from services.common.process import Stop

SHOWN = ["a", "b"]


class Service:
    """The three routes, without a recommender: every list is SHOWN. `before(path)`: a status to fail with, or 0."""

    def __init__(self) -> None:
        self.items: list[Item] = []
        self.feedback: list[Feedback] = []
        self.asked: list[dict[str, Any]] = []
        self.calls: list[tuple[str, int]] = []
        self.before: Callable[[str], int] = lambda path: 0
        self.max_rows, self.name = 10_000, "one"
        self.lock = threading.Lock()
        service = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "null")
                with service.lock:
                    status, found = service.answer(self.path, body)
                content = json.dumps(found).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_PUT = answer  # noqa: N815

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if status := self.before(path):
            return status, {"detail": "as scripted"}
        if path == "/v1/recommend":
            self.asked.append(body)
            request_id = f"r{len(self.asked)}"
            return 200, {"request_id": request_id, "items": [{"item_id": i} for i in SHOWN]}
        if path == "/v1/system":
            return 200, {"log": {"item": f"items of {self.name}", "feedback": f"feedback of {self.name}"}}
        (rows,) = body.values()
        self.calls.append((path, len(rows)))
        if len(rows) > self.max_rows:
            return 413, {"detail": "too large"}
        outcomes = [self._outcome(path, row) for row in rows]
        return 400 if all(o["status"] == "rejected" for o in outcomes) else 200, {"outcomes": outcomes}

    def _outcome(self, path: str, row: dict[str, Any]) -> dict[str, str]:
        if path == "/v1/items":
            self.items.append(messages.parse_item(row))
            return {"item_id": self.items[-1].item_id, "status": "accepted"}
        event = messages.parse_feedback(row)
        if event.type == "refused":
            return {"event_id": "", "status": "rejected", "reason": "as scripted"}
        if any(event.event_id == old.event_id for old in self.feedback):
            return {"event_id": event.event_id, "status": "duplicate"}
        self.feedback.append(event)
        return {"event_id": event.event_id, "status": "accepted"}

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def service() -> Iterator[Service]:
    service = Service()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield service
    for number, handler in handlers.items():
        signal.signal(number, handler)
    service.close()


@pytest.fixture
def result(capsys: pytest.CaptureFixture[str]) -> Any:
    return lambda: json.loads(capsys.readouterr().out)


def click(user: str, item: str, time_ms: int, kind: str = "click", **more: Any) -> Feedback:
    return Feedback(event_id=f"old{time_ms}", user_id=user, item_id=item, type=kind, time_ms=time_ms, **more)


EVENTS = [
    click("u", "a", 1, request_id="of the file", session_id="s1", context={"tab": 1}),
    click("v", "x", 2, session_id="s2"),
    click("u", "a", 3, "long_view", value=2.0),
    click("u", "x", 4, session_id="s1"),
    click("u", "b", 5, session_id="s3"),
]


def events_folder(folder: Path, feedback: list[Feedback] = EVENTS) -> str:
    shown = Impression(request_id="of the file", user_id="u", time_ms=1, items=(ShownItem(item_id="a", position=1),))
    write_events(folder, [Item(item_id=i) for i in ("a", "b", "x")], [shown], feedback)
    return str(folder)


def send(service: Service, events: str, *more: str) -> int:
    return main(["send", "--json", "--url", service.url, "--events", events, "--rate", "500", *more])


def test_send_puts_items_then_feedback_as_of_now_with_the_request_that_showed_its_item(
    service: Service, tmp_path: Path, result: Any
) -> None:
    assert send(service, events_folder(tmp_path), "--name", "test") == DONE
    report = result()
    assert [item.item_id for item in service.items] == ["a", "b", "x"]
    by_id = {event.event_id: event for event in service.feedback}
    assert sorted(by_id) == [f"test-{n}" for n in range(5)]
    asked = {f"r{n}": (a["user_id"], a["session_id"]) for n, a in enumerate(service.asked, 1)}
    joined = [asked.get(by_id[f"test-{n}"].request_id or "") for n in range(5)]
    assert joined == [("u", "s1"), None, ("u", "s1"), None, ("u", "s3")]
    assert by_id["test-2"].request_id == by_id["test-0"].request_id and by_id["test-2"].value == 2.0
    assert all(a["n"] == 20 for a in service.asked) and {"tab": 1} in [a["context"] for a in service.asked]
    assert all(abs(e.time_ms - time.time() * 1000) < 60_000 for e in service.feedback)
    counts = {name: report[name] for name in ("sent", "accepted", "duplicate", "rejected", "requests", "shown")}
    assert counts == {"sent": 5, "accepted": 5, "duplicate": 0, "rejected": 0, "requests": 4, "shown": 2}
    assert report["items"] == {"sent": 3, "rejected": 0} and report["recommend_ms"]["p99"] > 0
    assert send(service, str(tmp_path), "--name", "test") == DONE and result()["duplicate"] == 5


@pytest.mark.parametrize(("requests", "asked"), [("first", [("u", "s1"), ("u", "s3"), ("v", "s2")]), ("none", [])])
def test_send_asks_once_a_session_or_never(
    service: Service, tmp_path: Path, requests: str, asked: list[tuple[str, str]]
) -> None:
    assert send(service, events_folder(tmp_path), "--requests", requests) == DONE
    assert sorted((a["user_id"], a["session_id"]) for a in service.asked) == asked


def test_send_keeps_the_rate_and_each_users_order(service: Service, tmp_path: Path, result: Any) -> None:
    feedback = [click(f"u{n % 7}", "x", n) for n in range(400)]
    events = events_folder(tmp_path, feedback)
    assert send(service, events, "--requests", "none", "--limit", "300") == DONE
    report = result()
    assert report["sent"] == 300 and report["seconds"] >= 299 / 500
    for user in range(7):
        numbers = [int(e.event_id.rsplit("-", 1)[1]) for e in service.feedback if e.user_id == f"u{user}"]
        assert numbers == list(range(user, 300, 7))


def test_send_tries_again_while_the_service_is_full_and_says_what_was_rejected(
    service: Service, tmp_path: Path, result: Any
) -> None:
    full = [503, 503]
    service.before = lambda path: full.pop() if full else 0
    events = events_folder(tmp_path, [click("u", "a", 1), click("u", "a", 2, "refused")])
    assert send(service, events) == MISSED
    report = result()
    assert (report["ok"], report["accepted"], report["rejected"]) == (False, 1, 1)
    assert report["reasons"] == {"as scripted": 1}


def test_send_names_address_and_remedy_where_nothing_listens(
    tmp_path: Path, service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    service.url = f"http://127.0.0.1:{free_port()}"
    assert send(service, events_folder(tmp_path)) == MISSED
    error = capsys.readouterr().err
    assert service.url in error and "recsys up" in error and "Traceback" not in error


def test_send_goes_on_without_a_list_that_was_refused_and_says_so(
    service: Service, tmp_path: Path, result: Any
) -> None:
    service.before = lambda path: 500 if path == "/v1/recommend" else 0
    assert send(service, events_folder(tmp_path)) == MISSED
    report = result()
    assert (report["ok"], report["accepted"], report["requests"], report["refused_requests"]) == (False, 5, 0, 4)
    assert "500: as scripted" in next(iter(report["reasons"])) and not any(e.request_id for e in service.feedback)


def test_send_ends_with_a_summary_when_feedback_fails(service: Service, tmp_path: Path, result: Any) -> None:
    service.before = lambda path: 500 if path == "/v1/feedback" else 0
    assert send(service, events_folder(tmp_path)) == MISSED
    report = result()
    assert report["items"]["sent"] == 3 and report["sent"] == 0 and "500: as scripted" in report["why"]


def test_send_stops_with_its_summary_at_sigint(service: Service, tmp_path: Path, result: Any) -> None:
    events = events_folder(tmp_path, [click("u", "a", n) for n in range(5000)])
    reached = threading.Event()

    def interrupt() -> None:
        while len(service.feedback) < 10 and not reached.wait(0.005):
            pass
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        assert send(service, events) == DONE
    finally:
        reached.set()
        thread.join()
    report = result()
    assert 10 <= report["sent"] < 5000 and report["accepted"] == report["sent"] == len(service.feedback)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--rate", "0"], "--rate"),
        (["--rate", "nan"], "--rate"),
        (["--limit", "0"], "--limit"),
        (["--to", "kafka"], "log.kind"),
        (["--url", "localhost:8000"], "--url"),
        (["--name", "x" * 250], "--name"),
        (["--events", "absent"], "absent"),
    ],
)
def test_send_refuses_bad_options(
    service: Service, tmp_path: Path, more: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert send(service, events_folder(tmp_path), *more) == BAD
    assert named in capsys.readouterr().err


def write_config(tmp_path: Path) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(f'data_dir = "{tmp_path / "data"}"\n')
    return path


def make_log(path: Path) -> None:
    """Three items (one put twice, one deleted), two impressions, two clicks, a forget message, two bad records."""
    clock = ManualClock(1000)
    log = open_log(config.load(path), clock, "test")

    def append(time_ms: int, topic: str, key: str, value: bytes) -> None:
        clock.set(time_ms)
        log.append(topic, [(key, value)])

    def shown(request_id: str) -> bytes:
        items = (ShownItem(item_id="a", position=1, score=0.5),)
        return messages.dump_impression(Impression(request_id=request_id, user_id="u", time_ms=1, items=items))

    for n, item in enumerate(("a", "b", "gone")):
        append(1000 + n, "item", item, messages.dump_item(Item(item_id=item, title="old")))
    append(2000, "impression", "u", shown("r1"))
    append(3000, "feedback", "u", messages.dump_feedback(click("u", "a", 1, request_id="r1")))
    append(3500, "feedback", "u", b"not JSON")
    append(4000, "item", "a", messages.dump_item(Item(item_id="a", title="new")))
    append(4000, "item", "gone", b"")
    append(5000, "feedback", "u", messages.dump_forget("u", event_id="f", time_ms=1))
    append(6000, "impression", "u", shown("r2"))
    append(7000, "feedback", "u", messages.dump_feedback(click("u", "b", 2)))
    log.close()


def test_export_writes_the_log_as_event_files_at_log_time(tmp_path: Path, result: Any) -> None:
    path = write_config(tmp_path)
    make_log(path)
    assert main(["log", "export", "--json", "--config", str(path), str(tmp_path / "out")]) == DONE
    left_out = {"forget": 1, "undecodable": 1, "deleted_items": 1}
    assert result() == {"items": 4, "impressions": 2, "feedback": 2, **left_out}
    events = [(time_ms, kind) for time_ms, kind, _ in merged(tmp_path / "out") if kind != "item"]
    assert events == [(2000, "impression"), (3000, "feedback"), (6000, "impression"), (7000, "feedback")]
    titles = {item.item_id: item.title for item in read_items(tmp_path / "out")}
    assert titles == {"a": "new", "b": "old", "gone": "old"}
    first = next(m for _, kind, m in merged(tmp_path / "out") if kind == "impression")
    assert isinstance(first, Impression) and first.request_id == "r1" and first.items[0].score == 0.5


def test_export_of_a_time_has_what_was_live_then(tmp_path: Path, result: Any) -> None:
    path = write_config(tmp_path)
    make_log(path)
    times = ["--from", "1970-01-01T00:00:05Z", "--to", "1970-01-01T00:00:07Z"]
    assert main(["log", "export", "--json", "--config", str(path), str(tmp_path / "out"), *times]) == DONE
    assert result() == {"items": 5, "impressions": 1, "feedback": 0, "forget": 1, "undecodable": 0, "deleted_items": 0}
    assert [item.deleted for item in read_items(tmp_path / "out") if item.item_id == "gone"] == [False, True]


def test_export_refuses_a_folder_without_a_log_and_times_the_wrong_way_round(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["log", "export", "--config", str(write_config(tmp_path)), str(tmp_path / "out")]
    assert main(command) == BAD
    assert "no system ran" in capsys.readouterr().err and not (tmp_path / "data").exists()
    assert main([*command, "--from", "2020-01-02", "--to", "2020-01-01"]) == BAD
    assert main([*command, "--from", "yesterday"]) == BAD
    assert "swap" in (err := capsys.readouterr().err) and "ISO" in err


def load(service: Service, kind: str, path: Path) -> int:
    return main(["import", kind, str(path), "--json", "--url", service.url])


def outcomes(path: Path) -> list[tuple[int, str]]:
    lines = path.with_name(path.name + ".outcomes.jsonl").read_text().splitlines()
    return [(outcome["row"], outcome["status"]) for outcome in map(json.loads, lines)]


def test_import_gives_each_row_an_outcome_and_goes_on_where_it_was(
    service: Service, tmp_path: Path, result: Any
) -> None:
    path = tmp_path / "mine.jsonl"
    good = b'{"version":1,"user_id":"u","item_id":"a","type":"click"}\n'
    path.write_bytes(
        good + b"nonsense\n\n" + good + b'{"x":"' + b"y" * 3_000_000 + b'"}\n' + good.replace(b"click", b"refused")
    )
    assert load(service, "events", path) == MISSED
    report = result()
    assert (report["rows"], report["accepted"], report["rejected"], report["rejected_before"]) == (6, 2, 3, 0)
    statuses = [(1, "accepted"), (2, "rejected"), (4, "accepted"), (5, "rejected"), (6, "rejected")]
    assert outcomes(path) == statuses
    with path.open("ab") as more:
        more.write(good)
    assert load(service, "events", path) == MISSED
    again = {"rows": 7, "accepted": 1, "rejected": 0, "rows_before": 6, "rejected_before": 3}
    assert result() == {**report, **again}
    assert outcomes(path) == [*statuses, (7, "accepted")]
    assert len({event.event_id for event in service.feedback}) == 3


def test_import_that_died_between_a_batch_and_its_state_counts_nothing_twice(
    service: Service, tmp_path: Path, result: Any
) -> None:
    path = tmp_path / "e.jsonl"
    path.write_text("".join(f'{{"version":1,"user_id":"u{n}","item_id":"a","type":"click"}}\n' for n in range(1500)))
    states: list[bytes] = []

    def before(_: str) -> int:
        state = path.with_name("e.jsonl.import.json")
        states.append(state.read_bytes() if state.exists() else b"")
        return 0

    service.before = before
    assert load(service, "events", path) == DONE
    assert result()["accepted"] == 1500 and service.calls == [("/v1/feedback", 1000), ("/v1/feedback", 500)]
    path.with_name("e.jsonl.import.json").write_bytes(states[2])  # as it was when the second batch was on its way
    assert load(service, "events", path) == DONE
    report = result()
    assert (report["rows_before"], report["accepted"], report["duplicate"]) == (1000, 0, 500)
    assert [row for row, _ in outcomes(path)] == list(range(1, 1501)) and len(service.feedback) == 1500


def test_import_reads_parquet_row_by_row(service: Service, tmp_path: Path, result: Any) -> None:
    path = tmp_path / "catalogue.parquet"
    attributes = ['{"tags":["x"]}', None, "{", '{"tags":[]}']
    pq.write_table(
        pa.table({"item_id": ["a", "b", "c", ""], "title": ["A", None, "C", "D"], "attributes": attributes}), path
    )
    assert load(service, "items", path) == MISSED
    assert outcomes(path) == [(1, "accepted"), (2, "accepted"), (3, "rejected"), (4, "rejected")]
    assert service.items == [Item(item_id="a", title="A", attributes={"tags": ["x"]}), Item(item_id="b")]
    result()
    assert load(service, "items", path) == MISSED and result()["rows_before"] == 4


def test_batch_over_the_body_limit_is_sent_in_halves(service: Service, tmp_path: Path, result: Any) -> None:
    service.max_rows = 3
    path = tmp_path / "items.jsonl"
    path.write_text("".join(f'{{"version":1,"item_id":"i{n}"}}\n' for n in range(10)))
    assert load(service, "items", path) == DONE
    assert result()["accepted"] == 10 and [i.item_id for i in service.items] == [f"i{n}" for n in range(10)]


def test_import_refuses_what_it_cannot_read(
    service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.csv").write_text("x")
    (tmp_path / "b.parquet").write_text("x")
    pq.write_table(pa.table({"item": ["a"]}), tmp_path / "c.parquet")
    (tmp_path / "d.jsonl").write_text('{"version":1,"item_id":"a"}\n')
    for name, said in (
        ("absent.jsonl", "is no file"),
        ("a.csv", "rename"),
        ("b.parquet", "check"),
        ("c.parquet", "'item'"),
    ):
        assert load(service, "items", tmp_path / name) == BAD
        assert said in capsys.readouterr().err
    assert load(service, "items", tmp_path / "d.jsonl") == DONE
    assert load(service, "events", tmp_path / "d.jsonl") == BAD
    (tmp_path / "d.jsonl").write_text("")
    assert load(service, "items", tmp_path / "d.jsonl") == DONE
    assert "has changed" in capsys.readouterr().err


def rows_of(*fields: dict[str, Any]) -> str:
    about = {"version": 1, "user_id": "u", "item_id": "a", "type": "click"}
    return "".join(json.dumps({**about, **more}) + "\n" for more in fields)


def test_files_of_one_name_do_not_collide_and_equal_rows_of_one_file_are_several(
    service: Service, tmp_path: Path, result: Any
) -> None:
    for number, day in enumerate(("mon", "tue")):
        (tmp_path / day).mkdir()
        path = tmp_path / day / "clicks.jsonl"
        path.write_text(
            rows_of(*[{"time_ms": 2_000_000_000_000 + number}] * 3, {"time_ms": 1_900_000_000_000 + number})
        )
        assert load(service, "events", path) == DONE
        assert (report := result())["accepted"] == 4 and report["duplicate"] == 0
    assert len(service.feedback) == 8


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_corrected_file_is_sent_again_and_only_what_was_corrected_counts(
    service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    path = tmp_path / f"clicks.{kind}"

    def write(*users: str) -> None:
        if kind == "jsonl":
            path.write_text(rows_of(*({"user_id": user} for user in users)))
        else:
            columns = {"user_id": list(users), "item_id": ["a"] * len(users), "type": ["click"] * len(users)}
            pq.write_table(pa.table(columns), path)

    write("a", "b", "b", "c")
    assert load(service, "events", path) == DONE
    assert json.loads(capsys.readouterr().out)["accepted"] == 4
    for users, accepted in ((("a", "x", "b", "b", "y"), 2), (("a", "x"), 0), (("z",), 1)):
        write(*users)
        assert load(service, "events", path) == DONE
        said = capsys.readouterr()
        report = json.loads(said.out)
        assert (report["rows"], report["rows_before"], report["accepted"]) == (len(users), 0, accepted)
        assert report["duplicate"] == len(users) - accepted and "has changed" in said.err
        assert len(outcomes(path)) == len(users)


def test_what_another_system_took_is_sent_again(
    service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "clicks.jsonl"
    path.write_text(rows_of({}, {"user_id": "v"}))
    assert load(service, "events", path) == DONE
    assert load(service, "events", path) == DONE
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["accepted"] == 0
    service.name, service.feedback = "two", []  # another system at this address, and empty
    assert load(service, "events", path) == DONE
    said = capsys.readouterr()
    assert json.loads(said.out)["accepted"] == 2 == len(service.feedback)
    assert "another system" in said.err


def test_where_no_system_answers_nothing_is_called_imported(
    service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "clicks.jsonl"
    path.write_text(rows_of({}))
    assert load(service, "events", path) == DONE
    capsys.readouterr()
    service.url = f"http://127.0.0.1:{free_port()}"
    assert load(service, "events", path) == BAD
    said = capsys.readouterr()
    assert "recsys up" in said.err + said.out and '"ok": true' not in said.out


def test_an_import_that_an_earlier_version_began_goes_on(service: Service, tmp_path: Path, result: Any) -> None:
    path = tmp_path / "clicks.jsonl"
    path.write_text(rows_of({}, {"user_id": "v"}))
    assert load(service, "events", path) == DONE
    state = json.loads((beside := path.with_name("clicks.jsonl.import.json")).read_text())
    beside.write_text(json.dumps({name: state[name] for name in state if name not in ("digest", "system")}))
    with path.open("a") as more:
        more.write(rows_of({"user_id": "w"}))
    result()
    assert load(service, "events", path) == DONE
    assert (report := result())["rows_before"] == 2 and report["accepted"] == 1
    assert json.loads(beside.read_text())["system"] == "feedback of one"


def test_a_byte_order_mark_is_no_part_of_the_first_row(service: Service, tmp_path: Path, result: Any) -> None:
    path = tmp_path / "clicks.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + rows_of({}, {"user_id": "v"}).encode())
    assert load(service, "events", path) == DONE
    assert result()["accepted"] == 2


def test_address_is_the_configurations_on_this_machine() -> None:
    anywhere = config.parse({"ranking": {"host": "0.0.0.0", "port": 81}})
    assert client.url_of(anywhere, None) == "http://127.0.0.1:81"
    assert client.url_of(anywhere, "http://other/") == "http://other"
    with pytest.raises(BadInput, match="--url"):
        client.Client("ftp://x", Stop())


def test_the_command_says_its_version_and_the_package_its_licence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out.startswith("recsys ")
    root = Path(__file__).parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    assert project["license"] == "Apache-2.0" and project["license-files"] == ["LICENSE"]
    assert "Apache License" in (root / "LICENSE").read_text()
