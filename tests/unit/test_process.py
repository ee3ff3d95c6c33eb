"""What every process does alike."""

from __future__ import annotations

import gc

from services.common.process import settle_heap


def test_a_settled_heap_is_not_looked_at_again_and_what_is_made_later_is_collected() -> None:
    frozen = gc.get_freeze_count()
    kept = [[n] for n in range(1000)]
    try:
        settle_heap()
        assert gc.get_freeze_count() > frozen + len(kept)
        assert not any(each is kept for each in gc.get_objects())
        gc.collect()
        circle: list[object] = []
        circle.append(circle)
        del circle
        assert gc.collect() == 1
    finally:
        gc.unfreeze()
