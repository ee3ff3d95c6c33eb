"""The parameter service: what others may write to its topic, what it keeps on disk, and what it says of itself."""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import grpc
import numpy as np
import orjson
import pytest
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save

from recsys.clock import ManualClock
from recsys.config import Config, parse
from recsys.errors import ParametersUnavailable
from recsys.features.schema import Schema
from recsys.files import Manifests, write_file
from recsys.model.layouts import layouts, parameters_name
from recsys.model.plan import Block
from recsys.parameters import grpc_parameters
from recsys.parameters import parameter_pb2 as pb
from recsys.parameters.deltas import MAX_LEAD, UNFINISHED_BYTES, Delta, RowDelta, Version, encode_delta, metadata
from recsys.streams.memory_log import MemoryLog
from recsys.table import segments
from recsys.training.runner import Runner
from services.parameter.main import IGNORED_S, SOME, TOPIC, ParameterService


def configuration(folder: Path, dim: int = 4) -> Config:
    return parse({"data_dir": str(folder), "model": {"dim": dim}, "table": {"capacity": 5000}})


class World:
    """A service on a log in memory; `publish` writes what a trainer would."""

    def __init__(self, folder: Path, dim: int = 4, log: MemoryLog | None = None) -> None:
        self.config, self.clock = configuration(folder, dim), ManualClock(1_700_000_000_000)
        self.log, self.schema = log or MemoryLog(self.clock), Schema.of(self.config)
        self.name = parameters_name(self.config)
        self.widths = {layout.name: (min(layout.slots), layout.dim) for layout in layouts(self.config, self.schema)}

    def service(self) -> ParameterService:
        service = ParameterService(self.config, self.log, self.clock)
        service.start()
        self.drain(service)
        return service

    @staticmethod
    def drain(service: ParameterService) -> None:
        while service.turn():
            pass

    def delta(self, step: int, *, epoch: int = 1, keys: Sequence[int] = (1, 2, 3), **more: Any) -> Delta:
        """Rows of every layout whose values say the step."""
        return Delta(
            version=Version(epoch=epoch, step=step),
            covers_ms=self.clock.now_ms(),
            schema=self.name,
            rows=tuple(self.rows(name, step, keys) for name in self.widths),
            **more,
        )

    def rows(self, name: str, value: float, keys: Sequence[int]) -> RowDelta:
        slot, dim = self.widths[name]
        none, size = np.zeros(0, np.int32), len(keys)
        return RowDelta(
            layout=name,
            slots=np.full(size, slot, np.int32),
            keys=np.array(keys, np.int64),
            values=np.full((size, dim), value, np.float32),
            last_seen_ms=np.full(size, self.clock.now_ms(), np.int64),
            removed_slots=none,
            removed_keys=none.astype(np.int64),
            default_slots=none,
            default_values=np.zeros((0, dim), np.float32),
        )

    def publish(self, *deltas: Delta) -> None:
        for delta in deltas:
            self.log.append(TOPIC, [("0", chunk) for chunk in encode_delta(delta)])

    def served(self, service: ParameterService, keys: Sequence[int]) -> list[float]:
        """The value of each key's row in `deep`; -1 where there is none."""
        slot, _ = self.widths["deep"]
        table = service.store.tables["deep"]
        values, found = table.lookup(np.full(len(keys), slot, np.int32), np.array(keys, np.int64))
        return np.where(found, values[:, 0], -1).tolist()  # type: ignore[no-any-return]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """One thing of a message is another: bytes, a length, a number, a name, a type, a shape."""
    kind = rng.integers(0, 8)
    if kind == 0:
        at = int(rng.integers(len(data)))
        return data[:at] + bytes([data[at] ^ (1 << int(rng.integers(8)))]) + data[at + 1 :]
    if kind == 1:
        return data[: int(rng.integers(len(data)))]
    if kind == 2:
        return data + rng.bytes(int(rng.integers(1, 64)))
    if kind == 3:
        return struct.pack("<Q", int(rng.integers(2**62))) + data[8:]
    size = int.from_bytes(data[:8], "little")
    header = orjson.loads(data[8 : 8 + size])
    numbers = ["0", "-1", "1", "7", str(2**31), str(2**62), str(2**64), "1e3", "x", "", "9" * 300, None, 3, [1]]
    if kind in (4, 5):
        said = header["__metadata__"]
        name = str(rng.choice([*said, "other"]))
        if rng.random() < 0.2:
            said.pop(name, None)
        else:
            said[name] = numbers[int(rng.integers(len(numbers)))]
    else:
        name = str(rng.choice([n for n in header if n != "__metadata__"]))
        tensor, part = header[name], int(rng.integers(5))
        if part == 0:
            tensor["dtype"] = str(rng.choice(["F16", "F64", "I8", "U8", "BOOL", "BF16", "F8_E4M3", "nonsense"]))
        elif part == 1:
            tensor["shape"] = [[], [0], [2**40], [1, 2, 3], [-1], ["a"], [0, 2**62]][int(rng.integers(7))]
        elif part == 2:
            tensor["data_offsets"] = [[0, 0], [0, 2**40], [5, 1], [], ["a", "b"]][int(rng.integers(5))]
        elif part == 3:
            header[str(rng.choice(["nowhere.keys", "deep.values.more", "x", "", "dense"]))] = header.pop(name)
        else:
            del header[name]
    changed = orjson.dumps(header)
    return struct.pack("<Q", len(changed)) + changed + data[8 + size :]


def wrong(world: World) -> Iterator[tuple[str, bytes]]:
    """Messages that are well formed, but not of these tables."""
    good = encode_delta(world.delta(1))[0]
    size = int.from_bytes(good[:8], "little")
    tensors = orjson.loads(good[8 : 8 + size])
    said = tensors.pop("__metadata__") | {"step": "1000", "chunks": "1"}
    slot, dim = world.widths["deep"]

    def message(head: Mapping[str, str] = MappingProxyType({}), **changed: Any) -> bytes:
        row = world.rows("deep", 1, [1, 2])
        arrays = {f"deep.{name}": getattr(row, name) for name in RowDelta.__dataclass_fields__ if name != "layout"}
        return save(arrays | {f"deep.{name}": array for name, array in changed.items()}, {**said, **head})

    yield "lengths", message(keys=np.arange(3))
    yield "removed lengths", message(removed_keys=np.arange(3))
    yield "width", message(values=np.zeros((2, dim + 1), np.float32), default_values=np.zeros((0, dim + 1), np.float32))
    yield "slot", message(slots=np.full(2, 9999, np.int32))
    yield "negative slot", message(slots=np.full(2, -1, np.int32))
    yield "removed slot", message(removed_slots=np.full(1, 9999, np.int32), removed_keys=np.zeros(1, np.int64))
    yield (
        "default slot",
        message(default_slots=np.full(1, 9999, np.int32), default_values=np.zeros((1, dim), np.float32)),
    )
    yield "nan", message(values=np.full((2, dim), np.nan, np.float32))
    yield (
        "inf in a default row",
        message(default_slots=np.full(1, slot, np.int32), default_values=np.full((1, dim), np.inf, np.float32)),
    )
    yield "last seen", message(last_seen_ms=np.full(2, 2**62))
    yield "negative last seen", message(last_seen_ms=np.full(2, -5))
    yield "layout", save({"nowhere.keys": np.zeros(1, np.int64)}, said)
    yield "chunks", message({"chunk": "0", "chunks": "0"})
    yield "chunk", message({"chunk": "5", "chunks": "2"})
    yield "huge count", message({"chunk": "0", "chunks": str(2**60)})
    yield "epoch", message({"epoch": str(2**62)})
    yield "step", message({"step": str(10**15)})
    yield "dense", save({"dense": np.frombuffer(b"no weights", np.uint8)}, said | {"dense_version": "3"})
    nan = np.frombuffer(save({"ranker.model.w": np.array([np.nan], np.float32)}), np.uint8)
    yield "dense nan", save({"dense": nan}, said | {"dense_version": "3"})
    yield "nested", struct.pack("<Q", 60_000) + b"[" * 60_000


def test_each_kind_of_wrong_delta_is_a_dead_letter_and_the_next_is_applied(world: World) -> None:
    world.publish(world.delta(1))
    service = world.service()
    for step, (kind, data) in enumerate(wrong(world), 2):
        before = world.log.end("dead_letter", 0)
        world.log.append(TOPIC, [("0", data)])
        world.publish(world.delta(step))
        world.drain(service)
        assert world.log.end("dead_letter", 0) == before + 1, kind
        assert world.served(service, [1, 2, 3]) == [step] * 3, kind
    letters = [orjson.loads(record.value) for record in world.log.read("dead_letter", 0, 0, 100)]
    assert all(one["topic"] == TOPIC and one["reason"] for one in letters)
    assert service.not_ready() == ""


def test_a_whole_state_takes_the_place_of_what_was_there(world: World) -> None:
    """Under a newer epoch and an older step; a snapshot amid it, and a kill, change nothing."""
    service = world.service()
    world.publish(world.delta(50, keys=range(10)))
    service.turn()
    world.clock.advance(60)
    covered = service.store.state.covers_ms
    world.publish(
        replace(world.delta(20, epoch=2, keys=[]), whole="begin", covers_ms=covered - 5000),
        replace(world.delta(20, epoch=2, keys=range(3, 6)), covers_ms=covered - 5000),
    )
    service.turn()
    assert world.served(service, range(10)) == [50, 50, 50, 20, 20, 20, 50, 50, 50, 50]
    assert service.store.state.covers_ms == covered - 5000, "the older of both, as long as they are mixed"
    service.maintain(force=True)
    service = world.service()
    world.publish(replace(world.delta(20, epoch=2, keys=[]), whole="end", covers_ms=covered - 5000))
    service.turn()
    assert world.served(service, range(10)) == [-1, -1, -1, 20, 20, 20, -1, -1, -1, -1]
    assert service.store.state.version == Version(epoch=2, step=20) and service.store.state.covers_ms == covered - 5000


def test_a_whole_state_whose_trainer_died_removes_nothing(world: World) -> None:
    service = world.service()
    world.publish(world.delta(50, keys=range(4)), replace(world.delta(20, epoch=2, keys=[0]), whole="begin"))
    world.publish(replace(world.delta(60, epoch=3, keys=[1]), whole="end"), world.delta(61, epoch=3, keys=[2]))
    service.turn()
    assert world.served(service, range(4)) == [20, 60, 61, 50]


def test_two_thousand_mutations_crash_nothing_and_valid_deltas_are_applied(world: World) -> None:
    """Half of the mutated messages are chunks amid a delta that goes on, so that it must survive them."""
    rng, service = np.random.default_rng(12), world.service()
    dense = save({"ranker.model.w": np.ones(3, np.float32)})
    for round_number in range(1, 21):
        size = 8_000 if round_number == 1 else 100
        good = encode_delta(
            world.delta(round_number, keys=range(min(size, 4000)), dense=dense, dense_version=round_number)
        )
        messages = [mutated(good[int(rng.integers(len(good)))], rng) for _ in range(100)]
        world.log.append(TOPIC, [("0", data) for data in messages])
        world.log.append(TOPIC, [("0", data) for data in good])
        world.drain(service)
        newest = service.store.state.version
        if newest == Version(epoch=1, step=round_number):
            assert world.served(service, [0, 99]) == [round_number] * 2
        else:  # a mutation made a legal delta of a later version
            assert newest > Version(epoch=1, step=round_number)
            service = ParameterService(world.config, world.log, world.clock)
            service._position, service._goal = world.log.end(TOPIC, 0), 0
    assert world.log.end("dead_letter", 0) > 1000
    assert np.isfinite(service.store.tables["deep"].defaults().values).all()


def test_a_dead_letter_fits_however_large_the_message_was(world: World) -> None:
    service = world.service()
    world.log.append(TOPIC, [("k" * 100_000 + "\ud800", b"\xff" * 2**20)])
    world.drain(service)
    (record,) = world.log.read("dead_letter", 0, 0)
    assert len(record.value) < 800_000 and orjson.loads(record.value)["value_bytes"] == 2**20


def test_memory_for_unfinished_deltas_is_bounded(world: World) -> None:
    service = world.service()
    big = encode_delta(world.delta(1, keys=range(100_000)))
    assert len(big) > 10
    first = metadata(big[0])
    assert int(first["chunks"]) == len(big)
    for step in range(2, 40):  # none of them ever ends
        other = [chunk.replace(b'"step":"1"', b'"step":"%d"' % (step % 10)) for chunk in big[:-1]]
        world.log.append(TOPIC, [("0", chunk) for chunk in other])
    world.drain(service)
    held = sum(one.size for one in service._reader._unfinished.values())
    assert held <= UNFINISHED_BYTES and len(service._reader._unfinished) <= 4
    world.publish(world.delta(50))
    world.drain(service)
    assert world.served(service, [1]) == [50]


def test_an_epoch_far_ahead_is_not_believed(world: World) -> None:
    world.publish(world.delta(1, epoch=3), world.delta(2, epoch=3 + MAX_LEAD + 1), world.delta(3, epoch=3))
    service = world.service()
    assert world.served(service, [1]) == [3] and service.store.state.version == Version(epoch=3, step=3)
    world.publish(world.delta(4, epoch=4))
    world.drain(service)
    assert world.served(service, [1]) == [4]


def test_deltas_of_an_older_epoch_that_keep_coming_are_said_not_swallowed(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.publish(world.delta(1, epoch=9))
    service = world.service()
    for step in range(SOME):
        world.publish(world.delta(100 + step, epoch=2))
    world.drain(service)
    assert service.not_ready() == "", "a few of them follow a restart"
    world.clock.advance(int(IGNORED_S * 1000) + 1000)
    world.publish(world.delta(200, epoch=2))
    world.drain(service)
    assert "restart the trainer" in service.not_ready() and "restart the trainer" in caplog.text
    world.publish(world.delta(1, epoch=10))
    world.drain(service)
    assert service.not_ready() == ""


def test_after_a_pause_it_is_ready_once_what_came_meanwhile_is_read(world: World) -> None:
    """Frozen by the system, or its log was away: one turn that reads a part of it is not enough."""
    service = world.service()
    world.publish(world.delta(1))
    world.drain(service)
    assert service.not_ready() == ""
    world.publish(*(world.delta(step) for step in range(2, 300)))
    world.clock.advance(4000)
    assert "could not be read" in service.not_ready()
    service.turn()
    assert service.not_ready() == "reading the log"
    world.drain(service)
    assert service.not_ready() == ""


@pytest.mark.parametrize("served", [0, 12])
def test_a_trainer_whose_folder_is_new_begins_after_every_epoch_that_is_believed(world: World, served: int) -> None:
    """Those of the topic but for one far ahead, and what the parameter service says where that came long ago."""
    world.publish(world.delta(5, epoch=9), world.delta(6, epoch=2**50), *(world.delta(n, epoch=1) for n in range(3)))
    service = world.service()
    runner = Runner(world.config, world.log, world.clock)
    runner.served_epoch = served
    runner.start()
    world.drain(service)
    assert service.store.state.version.epoch == runner.epoch == max(9, served) + 1
    assert service.not_ready() == "" and service.store.dense()[1]


def test_ready_once_what_was_there_at_the_start_is_read_however_much_comes(world: World) -> None:
    world.publish(*(world.delta(step) for step in range(1, 500)))
    service = ParameterService(world.config, world.log, world.clock)
    assert service.not_ready() == "reading the snapshot"
    service.start()
    for turn in range(100):
        assert service.turn(), "more comes than is read"
        if not service.not_ready():
            break
        world.publish(*(world.delta(1000 + 60 * turn + n) for n in range(60)))
    assert service.not_ready() == "" and service.store.state.version >= Version(epoch=1, step=499)


def test_restarts_without_new_deltas_keep_the_rows(world: World) -> None:
    world.publish(world.delta(1))
    service = world.service()
    service.maintain(force=True)
    for _ in range(3):
        service = world.service()
        assert world.served(service, [1, 2, 3]) == [1, 1, 1]
        service.maintain(force=True)


def test_no_name_of_a_snapshot_is_written_twice(world: World) -> None:
    folder = world.config.data_dir / "parameter"
    written: dict[str, bytes] = {}
    for step in (1, 1, 2, 3, 3):
        world.publish(world.delta(step))
        service = world.service()
        service.maintain(force=True)
        for path in folder.glob("snapshot-*"):
            data = path.read_bytes()
            assert written.setdefault(path.name, data) == data


PLACES = (0.0, 0.5, 1.0)


@pytest.mark.parametrize("kind", ["manifest.json", "*.safetensors", "*.copy", "*.dense"])
@pytest.mark.parametrize("how", ["flip", "cut"])
def test_a_damaged_file_of_a_snapshot_loses_no_row(
    kind: str, how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world = World(tmp_path)
    folder = world.config.data_dir / "parameter"
    dense = save({"ranker.model.w": np.ones(300, np.float32)})
    world.publish(world.delta(1, keys=range(50), dense=dense, dense_version=1))
    service = world.service()
    for step in range(2, 12):
        service.maintain(force=True)
        world.publish(world.delta(step, keys=range(step, 50 + step), dense=dense, dense_version=step))
        world.drain(service)
    service.maintain(force=True)
    expected = world.served(service, range(70))
    assert min(expected[:60]) > 0 and len(list(folder.glob("*-base-*"))) > 0
    for place in PLACES:
        newest = (folder / "manifest.json").read_text()
        for path in sorted(folder.glob(kind)):
            if not path.exists() or (kind[0] == "*" and path.name.removesuffix(".copy") not in newest):
                continue  # of the snapshot before it
            data = path.read_bytes()
            at = min(int(place * len(data)), len(data) - 1)
            changed = data[:at] if how == "cut" else data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]
            path.write_bytes(changed)
            caplog.clear()
            again = ParameterService(world.config, world.log, world.clock)
            with caplog.at_level(logging.ERROR):
                again.start()
            used = again._position
            world.drain(again)
            assert world.served(again, range(70)) == expected
            assert again.store.dense() == (11, dense)
            assert kind == "*.copy" or "torn or flipped" in caplog.text, (path, place)
            assert used > 0, "the snapshot before it is used, not the whole log"
            again.maintain(force=True)
            world.publish(world.delta(11, keys=range(11, 61), dense=dense, dense_version=11))
            world.drain(again)
            again.maintain(force=True)


def test_deltas_that_retention_dropped_are_made_up_for_by_the_trainers_checkpoint(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """A checkpoint as the trainer writes it; of the topic only the last delta is left."""
    world.publish(world.delta(1, keys=range(10)))
    trained = world.service().store
    folder = world.config.data_dir / "trainer"
    folder.mkdir(parents=True)
    rows, _ = segments.take(trained.tables, "checkpoint")
    chain = segments.extend(folder, [], "segment", rows)
    dense = {"ranker.model.w": np.ones(3, np.float32), "ranker.moments.w": np.ones(3, np.float32)}
    Manifests(folder).write(
        {
            "version": 2,
            "step": 1,
            "schema": world.schema.hash,
            "segments": chain,
            "dense": write_file(folder / "dense-1.safetensors", save(dense)),
        }
    )
    world.publish(world.delta(2, keys=[50]))

    class Shortened(MemoryLog):
        def begin(self, topic: str, partition: int) -> int:
            return world.log.end(topic, partition) - len(world.widths) if topic == TOPIC else 0

    world.log.__class__ = Shortened
    service = world.service()
    assert world.served(service, [*range(10), 50]) == [1] * 10 + [2] and "trainer's checkpoint, step 1" in caplog.text
    assert list(load_arrays(service.store.dense()[1])) == ["ranker.model.w"]


def test_rows_of_another_configuration_are_not_served_and_the_trainers_are_waited_for(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    service = world.service()
    world.publish(world.delta(7, epoch=2, dense=save({"w": np.ones(3, np.float32)}), dense_version=7))
    world.drain(service)
    service.maintain(force=True)
    world.publish(*(world.delta(step, epoch=2) for step in range(8, 8 + 2 * SOME)))
    wider = World(world.config.data_dir, 6, world.log)
    assert wider.schema.hash == world.schema.hash and wider.name != world.name
    caplog.clear()
    service = wider.service()
    wider.clock.advance(int(2000 * IGNORED_S))
    assert "the trainer publishes all of them" in service.not_ready()
    assert wider.served(service, [1, 2, 3]) == [-1, -1, -1]
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]
    assert world.log.end("dead_letter", 0) == 0
    wider.publish(wider.delta(50, epoch=3, keys=[1, 2]))
    wider.drain(service)
    assert service.not_ready(), "dense weights come behind all rows"
    wider.publish(wider.delta(50, epoch=3, keys=[3], dense=save({"w": np.ones(4, np.float32)}), dense_version=50))
    wider.drain(service)
    assert service.not_ready() == "" and wider.served(service, [1, 2, 3]) == [50, 50, 50]
    service.maintain(force=True)
    assert wider.served(wider.service(), [1, 2, 3]) == [50, 50, 50]


def test_requests_and_replies_of_wrong_lengths_end_neither_side(world: World) -> None:
    world.publish(world.delta(1))
    service = world.service()
    address = f"unix:{world.config.data_dir}/socket"
    server = grpc_parameters.serve(service.store, address, world.schema.hash)
    slot, dim = world.widths["deep"]
    good = Block(layout="deep", slots=np.full(2, slot, np.int32), keys=np.array([1, 2]))
    try:
        client = grpc_parameters.GrpcParameters(address, world.schema.hash, 10.0)
        for layout, slots, keys in (
            ("deep", b"123", b"12345678"),
            ("deep", b"1234", b"1"),
            ("deep", bytes(4), bytes(16)),
            ("nowhere", bytes(4), bytes(8)),
            ("deep", b"\xff" * 4, bytes(8)),
            ("deep", bytes(4 * 3_000_000), bytes(8 * 3_000_000)),
        ):
            request = pb.LookupRequest(
                schema=world.schema.hash, blocks=[pb.Block(layout=layout, slots=slots, keys=keys)]
            )
            with pytest.raises(grpc.RpcError) as failed:
                client._lookup(request, timeout=10.0)
            assert failed.value.code() == grpc.StatusCode.INVALID_ARGUMENT, failed.value.details()
        with grpc.insecure_channel(address) as channel:
            lookup = channel.unary_unary("/recsys.v1.Parameters/Lookup")
            dense = channel.unary_stream("/recsys.v1.Parameters/Dense")
            for call in (lookup, lambda data, timeout: list(dense(data, timeout))):
                with pytest.raises(grpc.RpcError) as failed:
                    call(b"\xff no message", timeout=10.0)
                # Not INTERNAL: the library's own parsing leaks what it could not parse.
                assert failed.value.code() == grpc.StatusCode.INVALID_ARGUMENT, failed.value.details()
        assert client.lookup([good]).values[0].tolist() == [[1.0] * dim] * 2
        for values in ([], [bytes(4), bytes(4)], [b"123"], [bytes(4 * dim - 4)], [b""]):
            client._lookup = lambda *_, values=values, **__: pb.LookupReply(values=values)
            with pytest.raises(ParametersUnavailable, match="its reply has"):
                client.lookup([good])
        client._dense = lambda *_, **__: iter([])
        with pytest.raises(ParametersUnavailable, match="no version"):
            client.dense()
    finally:
        server.stop(None).wait()
