"""Another list of features on a system that learned: additions at the start, removals by the command that the refusal names."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.system.embedded import Embedded, recsys, wait_for
from tests.system.test_golden import by_label

pytestmark = pytest.mark.system

QUICK = "training.checkpoint_s = 2\nparameter.snapshot_s = 2\n"
CLICK = '{ name = "click", types = ["click"], window_s = 600, labels = "early_positive" }'
LIKE = '{ name = "like", types = ["like"], window_s = 600, labels = "early_positive", prior = 0.02 }'
BEFORE = f'{QUICK}tasks = [{CLICK}]\ncatalogue.attributes = ["category", "tags"]\n'
AFTER = (
    f'{QUICK}tasks = [{CLICK}, {LIKE}]\ncatalogue.attributes = ["brand", "category", "tags"]\nmodel.dim = 24\n'
    'features.context = ["device"]\nfeatures.counters = [{ of = ["user"] }, { of = ["item"] }, { of = ["category"] }]\n'
)
WITHOUT = AFTER.replace('"brand", "category"', '"category"').replace(f", {LIKE}", "")
SHOWN, USERS = 6, 12


def configured(system: Embedded, options: str) -> None:
    """The same folder and ports, with these options."""
    own = [line for line in system.config.read_text().splitlines() if line.startswith(("data_dir", "ranking.port"))]
    ports = [f"{name}.metrics_port = {system.ports[name]}" for name in ("parameter", "trainer")]
    system.config.write_text("\n".join([*own, *ports, options]), encoding="utf-8")


def shown(system: Embedded, user: int) -> dict[str, Any]:
    return system.call("POST", "/v1/recommend", {"user_id": f"user-{user}", "n": SHOWN, "context": {"device": "phone"}})


def act(system: Embedded, user: int, answer: dict[str, Any], kind: str = "click") -> None:
    """A user acts upon the first item of an answer."""
    said = {"user_id": f"user-{user}", "item_id": answer["items"][0]["item_id"], "request_id": answer["request_id"]}
    assert system.click({**said, "type": kind})[0]["status"] == "accepted"


def positives(system: Embedded, task: str) -> float:
    found = by_label(system, "trainer", "recsys_examples_total")
    return sum(count for label, count in found.items() if f'task="{task}"' in label and 'label="1"' in label)


def audit(system: Embedded) -> dict[str, Any]:
    done = recsys("audit", "--json", "--config", system.config)
    found: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == 0 and found["closes"], found
    return found


def test_what_was_learned_outlives_other_features_tasks_and_sizes(tmp_path: Path) -> None:
    system = Embedded(tmp_path / "changing", BEFORE)
    try:
        system.start()
        items = [{"item_id": f"i{n}", "attributes": {"category": f"c{n % 5}", "brand": f"b{n % 3}"}} for n in range(60)]
        system.call("PUT", "/v1/items", {"items": items})
        wait_for(lambda: shown(system, 0)["items"], "answers")
        for user in range(USERS):
            act(system, user, shown(system, user))
        wait_for(lambda: positives(system, "click") == USERS, "clicks are learned")
        waiting = [shown(system, user) for user in range(USERS)]
        rows = by_label(system, "trainer", "recsys_table_rows")
        assert system.stop() == 0

        # Additions: said aloud, nothing lost.
        configured(system, AFTER)
        system.start()
        said = (system.data / "trainer.log").read_text()
        for text in ("attribute 'brand'", "context field 'device'", "task 'like'", "counter 'category'"):
            assert f"added {text}" in said, said
        assert "model.dim was 16 and is 24" in said
        for label, count in by_label(system, "trainer", "recsys_table_rows").items():
            assert count >= rows[label], label
        assert len(system.history("user-1")) == 1
        for user, answer in enumerate(waiting):
            act(system, user, answer)
        wait_for(lambda: positives(system, "click") == USERS, "clicks on what was shown before the change are learned")
        answer = wait_for(lambda: not (found := shown(system, 1))["degraded"] and found, "answers are whole")
        assert set(answer["items"][0]["predictions"]) == {"click", "like"}
        act(system, 1, answer, "like")
        wait_for(lambda: positives(system, "like") == 1, "the new task learns")
        branded = system.call("POST", "/v1/recommend", {"user_id": "user-1", "n": 5, "filters": {"brand": ["b1"]}})
        assert {int(item["item_id"][1:]) % 3 for item in branded["items"]} == {1}
        assert system.stop() == 0

        # Removals: refused with a remedy, which works when it is typed.
        configured(system, WITHOUT)
        refused = recsys("up", "--config", system.config)
        assert refused.returncode == 2, refused.stderr
        assert "removed attribute 'brand'" in refused.stderr and "removed task 'like'" in refused.stderr
        remedy = shlex.split(refused.stderr.split("with `recsys ")[1].split("`")[0])
        would = json.loads(recsys(*remedy, "--json", "--config", system.config).stdout)
        assert not would["migrated"] and {"deep: brand", "tower: brand"} & would["dropped"].keys(), would
        done = recsys(*(word for word in remedy if word != "--dry-run"), "--config", system.config)
        assert done.returncode == 0 and "migrated: start it" in done.stdout, done.stdout + done.stderr
        system.start()
        answer = wait_for(lambda: not (found := shown(system, 2))["degraded"] and found, "answers are whole again")
        assert set(answer["items"][0]["predictions"]) == {"click"}
        act(system, 2, answer)
        wait_for(lambda: positives(system, "click") == 1, "learning goes on")
        assert system.stop() == 0
        assert audit(system)["labels"]["click"]["positive"] == 2 * USERS + 1
    finally:
        system.close()
