"""What must have been learned and kept, computed from the log alone: the other side of the services' own counts."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from recsys.config import Config
from recsys.types import Record
from tests.system.embedded import wait_for
from tests.system.services import Services

LEARN_S = 90.0


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """Counts of one log: labels by (label, task), the joiner's outcomes, the history of each user as event ids."""

    labels: dict[tuple[str, ...], int]
    outcomes: Counter[str]
    histories: dict[str, list[str]]
    num_impressions: int


def of(config: Config, impressions: Sequence[Record], feedback: Sequence[Record], bad: Sequence[bytes] = ()) -> Ledger:
    """The ledger of these records, without those whose values are known to be bad."""
    shown = {}
    for record in sorted(impressions, key=lambda record: record.time_ms):
        if record.value not in bad:  # of copies the first counts
            message = json.loads(record.value)
            shown.setdefault(message["request_id"], (record.time_ms, {item["item_id"] for item in message["items"]}))
    windows = {kind: (task.name, task.window_s * 1000) for task in config.tasks for kind in task.types}
    positives: set[tuple[str, str, str]] = set()
    outcomes: Counter[str] = Counter()
    histories: dict[str, dict[str, dict[str, tuple[int, int, int]]]] = defaultdict(lambda: defaultdict(dict))
    for record in feedback:
        if record.value in bad:
            continue
        message = json.loads(record.value)
        kind = message["type"]
        if kind in config.features.history_types:
            # Events of one time lie as they arrived.
            place = min(message["time_ms"], record.time_ms), record.partition, record.offset
            histories[message["user_id"]][kind].setdefault(message["event_id"], place)
        outcome = _outcome(message, record.time_ms, shown, windows)
        outcomes[outcome] += 1
        if outcome == "in_time" and kind in windows:
            positives.add((message["request_id"], message["item_id"], windows[kind][0]))
    num_shown = sum(len(items) for _, items in shown.values())
    learned = Counter(task for _, _, task in positives)
    labels: dict[tuple[str, ...], int] = {}
    for task in config.tasks:
        labels |= {("1", task.name): learned[task.name], ("0", task.name): num_shown - learned[task.name]}
    newest = config.state.history_len
    return Ledger(
        labels=labels,
        outcomes=outcomes,
        histories={user: _newest(kinds, newest) for user, kinds in histories.items()},
        num_impressions=len(shown),
    )


def _newest(kinds: dict[str, dict[str, tuple[int, int, int]]], count: int) -> list[str]:
    """Event ids of the newest of each type, in their order."""
    kept = [event for events in kinds.values() for event in sorted((p, e) for e, p in events.items())[-count:]]
    return [event_id for _, event_id in sorted(kept)]


def _outcome(message: dict[str, Any], time_ms: int, shown: dict[str, Any], windows: dict[str, Any]) -> str:
    if message.get("request_id") is None:
        return "no_request"
    if message["request_id"] not in shown:
        return "unlogged"  # the answer said that its impression was not kept: its clicks are in histories alone
    opened_ms, items = shown[message["request_id"]]
    if message["item_id"] not in items:
        return "unknown_item"
    _, window_ms = windows.get(message["type"], ("", float("inf")))
    return "in_time" if time_ms <= opened_ms + window_ms else "too_late"


def wait_until_learned(system: Services, labels: dict[tuple[str, ...], int]) -> None:
    """Until the trainer has counted as many labels; then they must be exactly these."""

    def learned() -> dict[tuple[str, ...], float]:
        return system.samples("trainer", "recsys_examples_total")

    wait_for(lambda: sum(learned().values()) >= sum(labels.values()), f"{sum(labels.values())} labels", LEARN_S)
    found = learned()
    assert found == labels, f"learned {found}, the log holds {labels}"


def check_outcomes(system: Services, ledger: Ledger) -> None:
    """Each valid record met the joiner once, and was counted. What overtakes its impression is counted when that has come."""
    expected = ledger.outcomes

    def counted() -> dict[str, float]:
        return {outcome: n for (outcome,), n in system.samples("trainer", "recsys_joined_total").items()}

    def met() -> float:
        return sum(n for outcome, n in counted().items() if not outcome.startswith("impression_"))

    wait_for(lambda: met() >= expected.total(), f"{expected.total()} records at the joiner", LEARN_S)
    found = counted()
    assert found["impression_opened"] == ledger.num_impressions
    assert [found.get(outcome, 0) for outcome in ("no_request", "too_late")] == [
        expected["no_request"],
        expected["too_late"],
    ]
    labelled = ("joined", "duplicate", "unknown_item")
    assert sum(found.get(outcome, 0) for outcome in labelled) == expected["in_time"] + expected["unknown_item"]


def check_histories(system: Services, ledger: Ledger) -> None:
    """Every user's history holds the newest events of each type, each once, in order."""

    def behind() -> list[str]:
        return [user for user, events in ledger.histories.items() if system.history(user) != events]

    try:
        wait_for(lambda: not behind(), "every history", LEARN_S)
    except AssertionError:
        user = behind()[0]
        raise AssertionError(f"{user} has {system.history(user)}, the log says {ledger.histories[user]}") from None
