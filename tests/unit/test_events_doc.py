"""docs/events.md says what the code does: each example is parsed, each schema is the code's."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from recsys.events import messages
from recsys.events.schemas import SCHEMAS
from services.ranking.feedback_intake import NOTES
from tests.events_doc import DOC, blocks, curl_body

PARSE: dict[str, Callable[..., Any]] = {
    "item": messages.parse_item,
    "impression": messages.parse_impression,
    "feedback": messages.parse_feedback,
}


@pytest.mark.parametrize("kind", SCHEMAS)
def test_the_schema_is_a_schema_and_the_document_shows_it(kind: str) -> None:
    Draft202012Validator.check_schema(SCHEMAS[kind])
    [shown] = blocks(f"json {kind}.schema")
    assert json.loads(shown) == SCHEMAS[kind], f"put json.dumps(SCHEMAS[{kind!r}]) into docs/events.md"


@pytest.mark.parametrize("kind", SCHEMAS)
def test_every_example_is_valid(kind: str) -> None:
    examples = blocks(f"json {kind}")
    assert len(examples) == 2
    for example in examples:
        Draft202012Validator(SCHEMAS[kind]).validate(json.loads(example))
        PARSE[kind](example.encode())


def test_the_examples_together_use_every_field() -> None:
    for kind, schema in SCHEMAS.items():
        used = {field for example in blocks(f"json {kind}") for field in json.loads(example)}
        assert used == schema["properties"].keys()


def test_every_note_is_told_of() -> None:
    told = re.findall(r"^\| `(\w+)` \| (.+) \|$", DOC.read_text(encoding="utf-8"), re.M)
    assert dict(told) == NOTES


def test_what_the_curl_examples_send_is_valid() -> None:
    for event in json.loads(curl_body("feedback"))["events"]:
        messages.parse_feedback(event, event_id="made", time_ms=1)
    for item in json.loads(curl_body("item"))["items"]:
        messages.parse_item(item)


def test_what_the_kafka_example_sends_is_valid_and_keyed_right() -> None:
    [program] = blocks("python feedback")
    calls = [n for n in ast.walk(ast.parse(program)) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "send"]
    assert len(calls) == 2
    for call in calls:
        topic, key, message = map(ast.literal_eval, call.args)
        value = PARSE[topic](message)
        assert key == (value.item_id if topic == "item" else value.user_id)
