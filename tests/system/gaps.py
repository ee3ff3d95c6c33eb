"""The gaps of `crashing`: between which two effects each kind of process can die."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

BUILDER = "services.ranking.builder"


@dataclass(frozen=True)
class Gap:
    """A place between two effects. `where`: functions of which each is passed in one mode, or a seam of the runner."""

    name: str
    process: str
    where: tuple[str, ...]
    when: Literal["before", "after", "seam"]
    matching: str = ""
    """A pattern that a path or name among the arguments must have."""
    number: int = 1
    """Of the calls of one call of `inside`."""
    inside: str = ""
    how: Literal["traffic", "start", "stop", "poison"] = "traffic"
    """What brings the process there."""


def _seam(name: str, of: str, how: Literal["traffic", "start"] = "traffic") -> Gap:
    return Gap(f"{of}: {name}", "trainer", (f"seam:{name}",), "seam", how=how)


_LOG = ("recsys.streams.sqlite_log:SqliteLog.append", "recsys.streams.kafka:KafkaLog.append")
_COMMIT = ("recsys.streams.sqlite_log:SqliteLog.commit", "recsys.streams.kafka:KafkaLog.commit")
_STORE = ("recsys.state.sqlite_state:SqliteState.apply", "recsys.state.redis:RedisState.apply")
_REPLACE, _WRITE = ("recsys.files:replace",), ("recsys.files:write_file",)
_STEP = "recsys.training.trainer:Trainer.step"

_TRAINER = (
    Gap("journal: line not written", "trainer", ("recsys.training.journal:Journal.append",), "before"),
    _seam("journaled", "journal"),
    Gap("step: features spilled", "trainer", ("recsys.training.spill:Spill.append",), "after"),
    Gap("step: first label closed", "trainer", ("recsys.training.emitter:Emitter._emission",), "after"),
    Gap(
        "step: between two batches",
        "trainer",
        ("recsys.training.emission_learner:EmissionLearner._learn_batch",),
        "before",
        number=2,
        inside=_STEP,
    ),
    Gap(
        "step: networks moved, rows not",
        "trainer",
        ("recsys.table.cpu:CpuTable.apply_gradients",),
        "before",
        number=1,
        inside="recsys.training.learner:Learner.learn",
    ),
    Gap(
        "step: one of two tables moved",
        "trainer",
        ("recsys.table.cpu:CpuTable.apply_gradients",),
        "before",
        number=2,
        inside="recsys.training.learner:Learner.learn",
    ),
    Gap("step: learned, the bandit not", "trainer", ("recsys.training.bandit_learner:BanditLearner.step",), "before"),
    _seam("stepped", "step"),
    Gap("dead letter: not appended", "trainer", _LOG, "before", matching="dead_letter", how="poison"),
    Gap("dead letter: appended", "trainer", _LOG, "after", matching="dead_letter", how="poison"),
    Gap("publish: not appended", "trainer", _LOG, "before", matching="parameters"),
    Gap("publish: appended, not acknowledged", "trainer", _LOG, "after", matching="parameters"),
    Gap("publish: rows, not yet networks", "trainer", ("recsys.training.publish:Publisher.publish_dense",), "before"),
    _seam("captured", "checkpoint"),
    _seam("journal begun", "checkpoint"),
    _seam("segment written", "checkpoint"),
    _seam("small written", "checkpoint"),
    Gap(
        "checkpoint: manifest of before copied, new one not renamed",
        "trainer",
        _REPLACE,
        "before",
        matching="*/trainer/manifest.json",
    ),
    _seam("manifest renamed", "checkpoint"),
    _seam("acknowledged", "checkpoint"),
    Gap(
        "checkpoint: journal cut, older files there",
        "trainer",
        ("recsys.files:Manifests.sweep",),
        "before",
        matching="segment-*",
    ),
    Gap("checkpoint: position not committed", "trainer", _COMMIT, "before", matching="trainer"),
    Gap("restart: epoch taken", "trainer", ("recsys.training.journal:Journal.trim_torn_tail",), "before", how="start"),
    Gap(
        "restart: amid the journal's steps",
        "trainer",
        (_STEP,),
        "after",
        number=1,
        inside="recsys.training.stepper:Stepper.restore",
        how="start",
    ),
    _seam("replayed", "restart", "start"),
)
_PARAMETER = (
    Gap(
        "snapshot: delta applied, position not moved",
        "parameter",
        ("recsys.parameters.store:ParameterStore.apply",),
        "after",
    ),
    Gap("snapshot: segment written", "parameter", ("recsys.table.segments:extend",), "after"),
    Gap("snapshot: networks written", "parameter", _WRITE, "after", matching="*.dense"),
    Gap("snapshot: manifest not renamed", "parameter", _REPLACE, "before", matching="*/parameter/manifest.json"),
    Gap("snapshot: manifest renamed", "parameter", _REPLACE, "after", matching="*/parameter/manifest.json"),
    Gap("snapshot: position not committed", "parameter", _COMMIT, "before", matching="parameter"),
)
_RANKING = (
    Gap("accept: not appended", "ranking", _LOG, "before", matching="feedback"),
    Gap("accept: appended, not answered", "ranking", _LOG, "after", matching="feedback"),
    Gap("answer: logged, not answered", "ranking", _LOG, "after", matching="impression"),
    Gap("state: read, not stored", "ranking", _STORE, "before"),
    Gap("state: stored, not counted", "ranking", _STORE, "after"),
    Gap("generation: builder begun", "ranking", (f"{BUILDER}:Builder.start",), "after"),
    Gap("generation: amid the build", "builder", ("recsys.ranking.scorer:Scorer.item_vectors",), "after"),
    Gap("generation: index not renamed", "builder", _REPLACE, "before", matching="*items.index"),
    Gap(
        "counters: catalogue written, its manifest not",
        "ranking",
        _REPLACE,
        "before",
        matching="*/ranking/catalogue.json",
        how="stop",
    ),
    Gap(
        "counters: written, manifest not", "ranking", _REPLACE, "before", matching="*/ranking/counters.json", how="stop"
    ),
    Gap("counters: manifest renamed", "ranking", _REPLACE, "after", matching="*/ranking/counters.json", how="stop"),
    Gap("generation: built, not in use", "ranking", ("recsys.candidates.generation:Generations.finish",), "before"),
)
_IMPORT = (
    Gap("import: sent, nothing noted", "import", ("services.cli.import_command:Import._send",), "after"),
    Gap("import: outcomes noted, place not", "import", ("services.cli.import_command:State.write",), "before"),
    Gap("import: place not renamed", "import", ("pathlib:Path.replace",), "before", matching="*.import.json"),
    Gap("import: place noted", "import", ("services.cli.import_command:State.write",), "after"),
)
GAPS = {gap.name: gap for gap in (*_TRAINER, *_PARAMETER, *_RANKING, *_IMPORT)}
OF_KAFKA = {
    gap.name: gap
    for gap in (
        Gap(
            "spool: with the broker, not acknowledged", "ranking", ("recsys.streams.spool:Spool.acknowledge",), "before"
        ),
    )
}
"""Gaps that there are with a broker alone."""
