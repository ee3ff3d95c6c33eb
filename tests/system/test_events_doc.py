"""The examples of docs/events.md, given to running services by plain kafka-python and by curl."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from kafka import KafkaProducer

from recsys.testing.servers import Server
from tests.events_doc import blocks
from tests.system.embedded import wait_for
from tests.system.services import Services

KAFKA, HTTP = "127.0.0.1:9092", "http://127.0.0.1:8000"
"""The addresses that the examples name."""
FOREIGN_SCHEMA = "0badc0de0badc0de"
"""An example impression shows what `schema` and `features` look like; nobody's slot list has this hash."""

pytestmark = pytest.mark.system


def events(system: Services) -> list[str]:
    """Event ids in the history of the examples' user."""
    return system.history("u-7")


def dead(system: Services) -> list[dict[str, Any]]:
    return [json.loads(record.value) for record in system.records("dead_letter")]


def exists(system: Services, item_id: str) -> bool:
    return system.http.get(f"/v1/items/{item_id}").status_code == 200


def curl(system: Services, script: str) -> dict[str, Any]:
    """Run a curl example as it stands, at the address of this test."""
    done = subprocess.run(
        ["bash", "-c", script.replace(HTTP, system.url("ranking"))], capture_output=True, check=True, timeout=60
    )
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def send(system: Services, method: str, path: str, body: str) -> dict[str, Any]:
    header = "Content-Type: application/json"
    command = ["curl", "-sS", "-X", method, system.url("ranking") + path, "-H", header, "-d", body]
    answer: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout)
    return answer


def accepted(answer: dict[str, Any]) -> bool:
    return [outcome["status"] for outcome in answer["outcomes"]] == ["accepted"] * len(answer["outcomes"])


def test_curl_examples_run_as_they_stand(deployed: Services) -> None:
    [item], [feedback] = blocks("sh item"), blocks("sh feedback")
    assert accepted(curl(deployed, item))
    wait_for(lambda: exists(deployed, "43"), "the items of the example")
    answer = curl(deployed, feedback)
    assert accepted(answer)
    ids = {outcome["event_id"] for outcome in answer["outcomes"]}
    wait_for(lambda: ids <= set(events(deployed)), "the example's feedback in the history")


def test_message_examples_are_accepted_over_http(deployed: Services) -> None:
    for number, example in enumerate(blocks("json feedback")):
        message = json.loads(example) | {"event_id": f"over-http-{number}"}
        assert accepted(send(deployed, "POST", "/v1/feedback", json.dumps(message)))
    for example in blocks("json item"):
        assert accepted(send(deployed, "PUT", "/v1/items", example.strip()))
    wait_for(lambda: "over-http-0" in events(deployed), "the click in the history")


def test_python_example_runs_as_it_stands(deployed: Services, kafka: Server) -> None:
    [example] = blocks("python feedback")
    prefix = deployed.loaded.log.topic_prefix
    script = example.replace(KAFKA, f"127.0.0.1:{kafka.port}").replace(
        "producer.send(topic", f"producer.send({prefix!r} + topic"
    )
    assert prefix in script
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
    wait_for(lambda: "k-1" in events(deployed) and exists(deployed, "42"), "the example's item and feedback")


def test_message_examples_are_accepted_from_topics(deployed: Services, kafka: Server) -> None:
    """Only the impression with another system's features is refused, with the reason."""
    producer = KafkaProducer(bootstrap_servers=f"127.0.0.1:{kafka.port}", acks="all")
    keys: dict[str, Callable[[dict[str, Any]], str]] = {
        "item": lambda m: str(m["item_id"]),
        "impression": lambda m: m["user_id"],
        "feedback": lambda m: m["user_id"],
    }
    messages = [(topic, example) for topic in keys for example in blocks(f"json {topic}")]
    assert len(messages) >= 6
    for topic, example in messages:
        key = keys[topic](json.loads(example)).encode()
        producer.send(deployed.loaded.log.topic_prefix + topic, key=key, value=example.encode()).get(timeout=30)
        if topic == "item":
            deleted = bool(json.loads(example).get("deleted"))
            wait_for(lambda deleted=deleted: exists(deployed, "42") != deleted, f"the item {example}")
    producer.close()
    wait_for(lambda: "c2f1" in events(deployed), "the click in the history")
    wait_for(lambda: deployed.metric("recsys_consumer_lag_records", "trainer") == 0, "the trainer has read everything")
    [letter] = wait_for(lambda: dead(deployed), "the foreign impression in the dead-letter topic")
    assert letter["topic"] == "impression" and FOREIGN_SCHEMA in letter["reason"]
    assert json.loads(base64.b64decode(letter["value"]))["schema"] == FOREIGN_SCHEMA
