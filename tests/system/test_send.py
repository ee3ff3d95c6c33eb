"""A generated stream, sent to running services, exported from their log and replayed: each event counts once, everywhere."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from recsys import config
from recsys.clock import SystemClock
from recsys.config import Config
from recsys.events.event_files import merged, write_events
from recsys.streams.open_log import open_log
from recsys.testing.servers import free_port, kafka_server, redis_server
from recsys.testing.world import World
from recsys.types import Feedback, Impression

ROOT = Path(__file__).resolve().parents[2]
RECSYS = (sys.executable, "-m", "services.cli.main")
NUM_EVENTS, LIKE_EVERY = 600, 10
START_S, LEARN_S = 120.0, 60.0


def stream(folder: Path) -> None:
    """Clicks of the world's users on what they like; every ninth is followed by a like of the same item."""
    world, rng = World(num_users=60, num_items=80, num_kinds=8), np.random.default_rng(1)
    items, feedback = world.items(), list[Feedback]()
    ids = np.array([item.item_id for item in items])
    chances = np.stack([world.probability(user, ids.tolist()) ** 2 for user in range(len(world.users))])
    for n in range(NUM_EVENTS):
        user = world.any_user()
        click = Feedback(
            event_id=f"original-{n}",
            user_id=world.users[user],
            item_id=str(rng.choice(ids, p=chances[user] / chances[user].sum())),
            type="click",
            time_ms=1000 * n,
        )
        last = feedback[-1] if feedback else click
        is_like = n % LIKE_EVERY == LIKE_EVERY - 1
        feedback.append(replace(click, type="like", user_id=last.user_id, item_id=last.item_id) if is_like else click)
    write_events(folder, items, (), feedback)


def run(*arguments: str | Path) -> dict[str, Any]:
    done = subprocess.run(
        [*RECSYS, *map(str, arguments), "--json"], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


@contextlib.contextmanager
def services(path: Path, loaded: Config) -> Iterator[None]:
    log = path.with_name("up.txt")
    with log.open("wb") as output:
        up = subprocess.Popen([*RECSYS, "up", "--config", str(path)], cwd=ROOT, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + START_S
        while not ready(loaded):
            assert up.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield
    finally:
        up.send_signal(signal.SIGTERM)
        up.wait(60)


def ready(loaded: Config) -> bool:
    ports = loaded.ranking.port, loaded.trainer.metrics_port, loaded.parameter.metrics_port
    try:
        return all(httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=2.0).status_code == 200 for port in ports)
    except httpx.TransportError:
        return False


def labels_learned(loaded: Config, task: str) -> dict[str, int]:
    text = httpx.get(f"http://127.0.0.1:{loaded.trainer.metrics_port}/metrics").text
    found = re.findall(rf'^recsys_examples_total{{label="(\d)",task="{task}"}} (\S+)$', text, re.MULTILINE)
    return {label: int(float(value)) for label, value in found}


@pytest.fixture(params=["embedded", "kafka"])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A configuration file with short label windows, and where the feedback goes."""
    text = f"""
data_dir = "{tmp_path / "data"}"
ranking = {{ port = {free_port()} }}
trainer = {{ metrics_port = {free_port()} }}
parameter = {{ metrics_port = {free_port()} }}
tasks = [
  {{ name = "click", types = ["click"], window_s = 2.0 }},
  {{ name = "like", types = ["like"], window_s = 3.0 }},
]
retrieval = {{ count_types = ["click"] }}
"""
    path = tmp_path / "config.toml"
    with contextlib.ExitStack() as stack:
        if request.param == "kafka":
            folders = tmp_path / "kafka", tmp_path / "redis"
            for folder in folders:
                folder.mkdir()
            kafka, redis = stack.enter_context(kafka_server(folders[0])), stack.enter_context(redis_server(folders[1]))
            text += f'log = {{ kind = "kafka", partitions = 2, bootstrap_servers = "127.0.0.1:{kafka.port}" }}\n'
            text += f'state = {{ kind = "redis", url = "redis://127.0.0.1:{redis.port}/0" }}\n'
        path.write_text(text)
        yield path, "kafka" if request.param == "kafka" else "http"


@pytest.mark.system
def test_what_is_sent_is_learned_once_exported_and_replayed(settings: tuple[Path, str], tmp_path: Path) -> None:
    path, where = settings
    loaded = config.load(path, {})
    stream(tmp_path / "events")
    with services(path, loaded):
        how = ("--rate", "40", "--to", where, "--name", "sent")
        sent = run("send", "--config", path, "--events", tmp_path / "events", *how)
        assert sent["ok"] and sent["accepted"] == sent["sent"] == NUM_EVENTS
        assert sent["requests"] == NUM_EVENTS - NUM_EVENTS // LIKE_EVERY and sent["shown"] > 20, sent
        out = tmp_path / "exported"
        exported = run("log", "export", "--config", path, out)
        assert {name: exported[name] for name in ("items", "feedback", "undecodable")} == {
            "items": 80,
            "feedback": NUM_EVENTS,
            "undecodable": 0,
        }
        messages = [message for _, _, message in merged(out)]
        feedback = [m for m in messages if isinstance(m, Feedback)]
        assert {event.event_id for event in feedback} == {f"sent-{n}" for n in range(NUM_EVENTS)}
        num_shown = sum(len(m.items) for m in messages if isinstance(m, Impression))
        for task in ("click", "like"):
            pairs = {(e.request_id, e.item_id) for e in feedback if e.request_id and e.type == task}
            assert pairs, f"no {task} was joined"
            expected = {"0": num_shown - len(pairs), "1": len(pairs)}
            wait_until_learned(loaded, task, expected)
        with contextlib.closing(open_log(loaded, SystemClock(), "test")) as log:
            letters = log.end("dead_letter", 0) - log.begin("dead_letter", 0)
        assert letters == 0
    replayed = run("replay", "--config", path, "--events", out)
    assert replayed["tasks"]["click"]["examples"] == num_shown


def wait_until_learned(loaded: Config, task: str, expected: dict[str, int]) -> None:
    """Until exactly these labels were learned; what is learned twice overshoots and fails."""
    deadline = time.monotonic() + LEARN_S
    while (learned := labels_learned(loaded, task)) != expected:
        assert time.monotonic() < deadline, f"{task}: learned {learned}, expected {expected}"
        time.sleep(0.2)
