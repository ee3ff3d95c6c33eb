"""A restart over a log of items that was compacted behind the checkpoint learns what the run before it learned, bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from recsys.clock import ManualClock
from recsys.events import messages
from recsys.streams.memory_log import MemoryLog
from recsys.testing.crash import Abort, AbortAt
from recsys.training.runner import Runner
from recsys.types import Batch, Item, Record
from tests.unit.test_trainer import END, EVERYTHING, Slowly, answered, configuration, parameters, run, turns


def churning(folder: Path) -> MemoryLog:
    """A log whose items change, go and come again while it is read: three of sixty each second."""
    log = answered(configuration(folder, EVERYTHING))
    records, rng = log._topics["item"], np.random.default_rng(0)
    known = [messages.parse_item(record.value, key=record.key) for record in records[:60]]
    for number in range(180):
        item, kind = known[int(rng.integers(60))], number % 3
        changed = Item(item_id=item.item_id, deleted=True) if kind == 0 else item
        if kind == 1:
            changed = Item(item_id=item.item_id, title="other", attributes={"category": f"c{number}", "tags": ["t"]})
        records.append(
            Record(
                topic="item",
                partition=0,
                offset=len(records),
                key=item.item_id,
                value=messages.dump_item(changed),
                time_ms=1_000_000 + 333 * number,
            )
        )
    return log


class Compacted(Slowly):
    """Of the items before the committed position, only each one's newest version, and no deletions."""

    committed = 0

    def commit(self, group: str, topic: str, partition: int, offset: int) -> None:
        if topic == "item":
            self.committed = offset

    def read(self, topic: str, partition: int, offset: int, limit: int = 1000) -> Batch:
        batch = super().read(topic, partition, offset, limit)
        if topic != "item":
            return batch
        before = self._log._topics["item"][: self.committed]
        newest = {record.key: record.offset for record in before if b'"deleted":true' not in record.value}
        last = {record.key: record.offset for record in before}
        whole = {at for key, at in newest.items() if last[key] == at}
        found = [record for record in batch if record.offset >= self.committed or record.offset in whole]
        return Batch(found, batch.next)


def test_crashes_change_nothing_where_the_log_of_items_was_compacted(tmp_path: Path) -> None:
    crashes = 25, 7, 20
    log = churning(tmp_path / "world")
    straight, _, _ = run(log, tmp_path / "straight", options=EVERYTHING)
    assert straight.trainer.towers is not None and straight.trainer.towers.steps > 0
    clock, config = ManualClock(1_000_000), configuration(tmp_path / "crashed", EVERYTHING)
    view, crashed = Compacted(log, clock), 0
    while True:
        at = crashes[crashed] if crashed < len(crashes) else 0
        crash = AbortAt("stepped" if at else "", max(at, 1))
        runner = Runner(config, view, clock, crash=crash)  # type: ignore[arg-type]
        try:
            runner.start()
            for _ in turns(runner, clock, END):
                pass
        except Abort:
            crashed += 1
            continue
        break
    assert crashed == len(crashes) and view.committed > 100
    assert runner.trainer.catalogue.num_alive == straight.trainer.catalogue.num_alive
    found = parameters(runner)
    for name, expected in parameters(straight).items():
        np.testing.assert_array_equal(found[name], expected, err_msg=name)
