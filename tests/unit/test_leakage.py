"""Nothing that is only known afterwards changes a score: outcomes of the same impression, imputed times of a click log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from recsys.config import Config, load
from recsys.evaluation.impression_log import ImpressionLog
from recsys.evaluation.replay import Replay
from recsys.evaluation.replayed_loop import Event, Options
from recsys.events.event_files import merged
from recsys.ranking.shown import Shown
from recsys.ranking.stages import Ranked
from recsys.state.memory_state import MemoryState
from recsys.types import Feedback, HistoryEvent, Item, UserUpdate
from services.cli.convert_command import convert_kuairand
from tests.unit.test_convert import OUTCOMES
from tests.unit.test_convert import kuairand as kuairand

CONFIGS = Path(__file__).parents[2] / "deploy" / "configs"


def test_outcomes_of_an_impression_are_no_features_of_it(kuairand: Path, tmp_path: Path) -> None:
    """With every outcome column turned round, what is known at the first instant gives the same scores."""
    convert_kuairand(kuairand, tmp_path / "as_it_was")
    for path in kuairand.glob("kuairand_impressions*.parquet"):
        table = pq.read_table(path)
        for name in OUTCOMES:
            turned = table[name].to_numpy() ^ 1
            table = table.set_column(table.column_names.index(name), name, [turned])
        pq.write_table(table, path)
    convert_kuairand(kuairand, tmp_path / "turned")
    config = load(CONFIGS / "kuairand.toml", {})
    found = []
    for name in ("as_it_was", "turned"):
        replay = Replay(config, Options(sync_interval_s=1e9, freeze_user=True, click_log=False), tmp_path / f"{name}.d")
        report = replay.run(merged(tmp_path / name))
        assert report["tasks"]["click"]["examples"] == 4
        assert isinstance(replay.driver, ImpressionLog)
        rows = map(replay.driver.progressive.rows, replay.loop.schema.tasks)
        found.append([of_task["prediction"].tolist() for of_task in rows])
    assert found[0] == found[1]


class EvenState(MemoryState):
    """User state that sees every event of a session exactly 30,000 ms after the one before."""

    def __init__(self, history_len: int, seen_len: int) -> None:
        super().__init__(history_len, seen_len)
        self._last: dict[str, int] = {}

    def apply(
        self, updates: Sequence[UserUpdate], positions: Mapping[str, int], after: Mapping[str, int] | None = None
    ) -> None:
        super().apply([replace(u, events=tuple(map(self._even, u.events))) for u in updates], positions, after)

    def _even(self, event: HistoryEvent) -> HistoryEvent:
        name = event.session_id or ""
        self._last[name] = self._last[name] + 30_000 if name in self._last else event.time_ms
        return replace(event, time_ms=self._last[name])


def clicks(num_sessions: int) -> list[Event]:
    """Sessions of one to five clicks on forty items, far apart for each user, in time order."""
    rng, events = np.random.default_rng(0), []
    for session in range(num_sessions):
        user, time_ms = f"u{session % 20}", 1_000_000 + (session // 20) * 10_000_000 + session * 1000
        for _ in range(int(rng.integers(1, 6))):
            item = f"i{int(40 * rng.random() ** 2)}"
            feedback = Feedback(
                event_id=f"{session}-{time_ms}",
                user_id=user,
                item_id=item,
                type="click",
                time_ms=time_ms,
                session_id=f"s{session}",
                context={"region": int(rng.integers(0, 3)), "os": int(rng.integers(0, 2))},
            )
            events.append((time_ms, "feedback", feedback))
            time_ms += int(rng.integers(30_001, 100_000))
    events.sort(key=lambda event: event[0])
    return [(0, "item", Item(item_id=f"i{n}")) for n in range(40)] + events


def answers(config: Config, state: type[MemoryState], folder: Path) -> list[list[tuple[str, float]]]:
    """What a replay of the same clicks shows, with its scores."""
    replay = Replay(config, Options(), folder)
    loop = replay.loop
    loop.store = loop.pipeline._store = state(config.state.history_len, config.state.seen_len)
    lists: list[list[tuple[str, float]]] = []
    show = loop.pipeline.show

    def kept(ranked: Ranked) -> Shown:
        made = show(ranked)
        lists.append([(item.item_id, item.score or 0.0) for item in made.items])
        return made

    loop.pipeline.show = kept  # type: ignore[method-assign]
    replay.run(clicks(200))
    return lists


@pytest.mark.parametrize("asked", [{}, {"time_gaps": "true"}, {"time_since": '["last_event"]'}])
def test_gaps_within_a_session_change_no_score_unless_they_are_asked_for(asked: dict[str, str], tmp_path: Path) -> None:
    config = load(CONFIGS / "globo.toml", {f"RECSYS_FEATURES__{name.upper()}": text for name, text in asked.items()})
    first, second = (answers(config, state, tmp_path / state.__name__) for state in (MemoryState, EvenState))
    assert len(first) > 200
    assert (first == second) is not bool(asked)
