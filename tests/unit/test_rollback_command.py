"""The command `recsys rollback`: the checkpoint that it names stays until the trainer went back to it."""

from __future__ import annotations

from pathlib import Path

import pytest

from recsys.clock import ManualClock
from recsys.files import KeptManifests
from recsys.streams.memory_log import MemoryLog
from recsys.training import commands
from recsys.training.rollback import read_rollback
from recsys.training.runner import Runner
from services.cli.main import main
from tests.unit.test_trainer import END, Slowly, answered, configuration


def test_checkpoint_asked_for_outlives_those_taken_before_the_trainer_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, loaded = ManualClock(1_000_000), configuration(tmp_path / "asked")
    log = Slowly(answered(configuration(tmp_path / "world")), clock)
    runner = Runner(loaded, log, clock)  # type: ignore[arg-type]
    runner.start()

    def checkpoint() -> int:
        step = runner.trainer.steps
        while runner.trainer.steps == step and clock.now_ms() < END:
            clock.advance(700)
            runner.turn()
        runner.checkpoint(wait=True)
        return runner.trainer.steps

    file, folder = tmp_path / "recsys.toml", loaded.data_dir / "trainer"
    file.write_text(f'data_dir = "{loaded.data_dir}"\n')
    monkeypatch.setattr("recsys.training.operator_commands.LOOK_S", 1e9)  # a trainer that is busy
    asked = [checkpoint() for _ in range(3)][-1]  # the first stays anyhow
    assert main(["rollback", "--config", str(file), "--to", str(asked), "--learn"]) == 0
    for _ in range(4):
        checkpoint()
    assert asked in [manifest["step"] for manifest in KeptManifests(folder).every()]
    monkeypatch.setattr("recsys.training.operator_commands.LOOK_S", 0.0)
    runner.turn()
    assert runner.checkpoints.rolled_back and not read_rollback(folder)
    assert not (folder / commands.ROLLBACK).exists()
    for _ in range(2):
        checkpoint()
    assert asked not in [manifest["step"] for manifest in KeptManifests(folder).every()]


def test_checkpoint_whose_files_are_gone_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clock, loaded = ManualClock(1_000_000), configuration(tmp_path / "asked")
    runner = Runner(loaded, MemoryLog(clock), clock)
    runner.start()
    runner.checkpoint(wait=True)
    file, folder = tmp_path / "recsys.toml", loaded.data_dir / "trainer"
    file.write_text(f'data_dir = "{loaded.data_dir}"\n')
    next(folder.glob("small-*")).unlink()
    asked = next(KeptManifests(folder).every())["step"]
    assert main(["rollback", "--config", str(file), "--to", str(asked), "--skip"]) == 2
    assert "recsys checkpoint list" in capsys.readouterr().err
    assert read_rollback(folder) is None and not KeptManifests(folder).manifests()
