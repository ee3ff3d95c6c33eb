"""Generations built by a process of their own: swapped whole, and a builder that dies changes nothing."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch

from recsys import config as configuration
from recsys.candidates.generation import Generations
from recsys.config import Config
from recsys.features.build import user_features
from recsys.features.catalogue import Catalogue
from recsys.features.schema import Schema
from recsys.model import networks
from recsys.model.layouts import layouts
from recsys.parameters.deltas import Delta, Version
from recsys.parameters.grpc_parameters import GrpcParameters, serve
from recsys.parameters.store import ParameterStore
from recsys.ranking.scorer import Scorer
from recsys.testing.world import World
from recsys.types import HistoryEvent, Item
from services.ranking import builder
from services.ranking.builder import Builder


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return configuration.parse({"data_dir": str(tmp_path)})


@pytest.fixture
def scorer(config: Config) -> Iterator[Scorer]:
    """Untrained weights of version 1, served over a socket."""
    schema = Schema.of(config)
    store = ParameterStore(layouts(config, schema), schema.hash)
    weights = {f"ranker.model.{k}": v for k, v in networks.ranker(config, schema).state_dict().items()}
    weights |= {f"towers.model.{k}": v for k, v in networks.two_tower(config, schema).state_dict().items()}
    dense = safetensors.torch.save(weights)
    store.apply(
        Delta(version=Version(epoch=1, step=1), covers_ms=0, schema=schema.hash, rows=(), dense=dense, dense_version=1)
    )
    server = serve(store, config.parameter_address, schema.hash)
    scorer = Scorer(config, schema, GrpcParameters(config.parameter_address, schema.hash, 10.0))
    scorer.poll()
    scorer.refresh()
    yield scorer
    server.stop(None)


def catalogue_of(config: Config, num_items: int) -> Catalogue:
    catalogue = Catalogue(Schema.of(config))
    for item in World(num_items=num_items).items():
        catalogue.apply(item)
    return catalogue


def ended(worker: Builder) -> None:
    """Until the process has ended; what it left is not looked at yet."""
    assert worker.pid is not None
    os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)


def test_built_beside_is_what_would_be_built_here_with_what_changed_meanwhile(config: Config, scorer: Scorer) -> None:
    catalogue = catalogue_of(config, 300)
    generations, here = (Generations(config, catalogue, scorer, prefix) for prefix in ("g1-", "g2-"))
    worker = Builder(config, config.data_dir / "generations")
    assert generations.due(0.0) and worker.idle
    worker.start(generations.begin())
    assert not worker.idle
    for item in (Item(item_id="item-7", deleted=True), Item(item_id="new", attributes={"category": "kind-3"})):
        generations.changed(catalogue.apply(item))
    ended(worker)
    built = worker.poll()
    assert built is not None
    generations.finish(*built, 0.0)
    assert generations.name == "g1-1" and generations.num_items == 300 and generations.recall == 1.0
    here.build(0.0)
    schema = Schema.of(config)
    past = [HistoryEvent(time_ms=1, event_id="e", item_id="item-3", type="click")]
    user = user_features(schema, catalogue, "user-1", past, {}, 10)
    located, expected_at = generations.locate(user), here.locate(user)
    assert located is not None and expected_at is not None
    found, expected = located.search(400), expected_at.search(400)
    assert found[0].tolist() == expected[0].tolist() and len(found[0]) == 300
    np.testing.assert_allclose(found[1], expected[1], atol=1e-6)
    assert catalogue.row("new") in found[0].tolist() and catalogue.row("item-7") not in found[0].tolist()
    worker.close()
    assert not list(config.data_dir.glob("generations/*"))


def test_a_builder_that_is_killed_leaves_the_generation_in_use(config: Config, scorer: Scorer) -> None:
    catalogue = catalogue_of(config, 50)
    generations = Generations(config, catalogue, scorer)
    generations.build(0.0)
    worker = Builder(config, config.data_dir / "generations")
    worker.start(generations.begin())
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    failures = builder.metrics.GENERATION_FAILURES._value.get()
    ended(worker)
    assert worker.poll() is None
    assert generations.name == "g1"
    assert builder.metrics.GENERATION_FAILURES._value.get() == failures + 1
    assert not worker.idle  # for AGAIN_S
    worker.close()


def test_a_disk_that_refuses_a_job_is_a_build_that_failed(
    config: Config, scorer: Scorer, caplog: pytest.LogCaptureFixture
) -> None:
    generations = Generations(config, catalogue_of(config, 50), scorer)
    worker = Builder(config, config.data_dir / "generations")
    (config.data_dir / "generations").write_text("where the folder should be")
    worker.start(generations.begin())
    assert "not built" in caplog.text and worker.poll() is None and not worker.idle
    worker.close()


def test_an_index_file_cut_short_is_not_used(config: Config, scorer: Scorer, caplog: pytest.LogCaptureFixture) -> None:
    generations = Generations(config, catalogue_of(config, 50), scorer)
    worker = Builder(config, config.data_dir / "generations")
    worker.start(generations.begin())
    ended(worker)
    path = config.data_dir / "generations" / "g1" / "items.index"
    path.write_bytes(path.read_bytes()[:-100])
    assert worker.poll() is None
    assert "not a complete index file" in caplog.text and generations.name == ""
    worker.close()


def test_items_acted_upon_are_placed_anew_within_the_bound(config: Config, scorer: Scorer) -> None:
    small = config.model_copy(update={"retrieval": config.retrieval.model_copy(update={"exact_buffer": 8})})
    generations = Generations(small, catalogue_of(config, 40), scorer)
    generations.build(0.0)
    for row in range(20):
        generations.touched(row)
    generations.refresh(100.0)
    assert generations.num_buffered == 4
    generations.changed(30)
    generations.refresh(100.1)
    assert generations.num_buffered == 5


def test_searches_go_on_while_generations_are_swapped(config: Config, scorer: Scorer) -> None:
    catalogue = catalogue_of(config, 200)
    generations = Generations(config, catalogue, scorer)
    generations.build(0.0)
    past = [HistoryEvent(time_ms=1, event_id="e", item_id="item-3", type="click")]
    user = user_features(Schema.of(config), catalogue, "user-1", past, {}, 10)
    sizes: list[int] = []

    def search() -> None:
        while generations.name != "g6":
            located = generations.locate(user)
            sizes.append(0 if located is None else len(located.search(50)[0]))

    threads = [threading.Thread(target=search) for _ in range(2)]
    for thread in threads:
        thread.start()
    for number in range(5):
        generations.changed(catalogue.apply(Item(item_id=f"more-{number}")))
        generations.build(0.0)
    for thread in threads:
        thread.join()
    assert sizes and set(sizes) == {50}
