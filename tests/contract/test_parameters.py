"""Where ranking gets parameters from: the store itself, gRPC, shared memory. And shared memory beside a writer that stops anywhere."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from recsys.errors import ParametersUnavailable
from recsys.files import seal, unseal
from recsys.model.plan import Block
from recsys.parameters.arena import ANNOUNCEMENT, Arena, Sharing
from recsys.parameters.base import Parameters, ParameterState, Reply
from recsys.parameters.deltas import Version
from recsys.parameters.grpc_parameters import GrpcParameters, serve
from recsys.parameters.shared_rows import SharedParameters, View
from recsys.parameters.store import ParameterStore
from tests.parameter_writer import DIM, LAYOUTS, NAME, PASSING, SLOT, STAYING, delta

Open = Callable[[], tuple[ParameterStore, Parameters]]


class Nobody:
    """No parameter service anywhere: what is read must have come from shared memory."""

    def lookup(self, blocks: object) -> Reply:
        raise ParametersUnavailable("nobody there")

    def dense(self) -> tuple[int, bytes]:
        raise ParametersUnavailable("nobody there")


@pytest.fixture(params=["store", "grpc", "memory", "file"])
def opened(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    with ExitStack() as held:
        if request.param == "file":
            monkeypatch.delattr("os.memfd_create", raising=False)

        def open_one() -> tuple[ParameterStore, Parameters]:
            if request.param == "store":
                store = ParameterStore(LAYOUTS, NAME)
                return store, store
            address = f"unix:{tmp_path}/socket"
            sharing = None if request.param == "grpc" else Sharing(tmp_path, NAME)
            store = ParameterStore(LAYOUTS, NAME, "cpu", sharing)
            server = serve(store, address, NAME)
            held.callback(lambda: server.stop(None).wait())
            remote = GrpcParameters(address, NAME, 20.0)
            held.callback(remote.close)
            if sharing is None:
                return store, remote
            held.callback(sharing.close)
            store.share()
            sharing.beat()
            return store, SharedParameters(tmp_path, NAME, remote)

        yield open_one


def block(*keys: int) -> Block:
    return Block(layout="deep", slots=np.full(len(keys), SLOT, np.int32), keys=np.array(keys, np.int64))


def test_rows_are_those_of_the_newest_delta_and_the_reply_says_which(opened: Open) -> None:
    store, parameters = opened()
    assert parameters.lookup([]).state == ParameterState()
    store.apply(delta(1, [1, 2, 3], []))
    store.apply(delta(2, [2], [3]))
    reply = parameters.lookup([block(1, 2, 3, 9), block(2)])
    assert [rows[:, 0].tolist() for rows in reply.values] == [[1, 2, 2, 2], [2]], "a missing key has the default row, 2"
    assert all(rows.shape[1] == DIM and (rows == rows[:, :1]).all() for rows in reply.values)
    assert reply.state == ParameterState(version=Version(epoch=1, step=2), covers_ms=2) and reply.current


def test_weights_come_whole_and_raise_the_version(opened: Open) -> None:
    store, parameters = opened()
    assert parameters.dense() == (0, b"")
    weights = save({"w": np.ones(4, np.float32)})
    store.apply(replace(delta(1, [1], []), dense=weights, dense_version=7))
    assert parameters.lookup([]).state.dense_version == 7
    assert parameters.dense() == (7, weights)


def test_the_rows_of_a_checkpoint_take_the_place_of_all(opened: Open) -> None:
    store, parameters = opened()
    store.apply(delta(1, [1, 2], []))
    assert parameters.lookup([block(1)]).values[0][0, 0] == 1
    store.replace_all([], b"", 5)
    reply = parameters.lookup([block(1)])
    assert reply.values[0][0, 0] != 1 and reply.state.dense_version == 5
    store.apply(delta(9, [1], []), after_gap=True)
    assert parameters.lookup([block(1)]).values[0][0, 0] == 9


def test_rows_in_shared_memory_are_those_of_one_release_one_configuration_and_one_process(tmp_path: Path) -> None:
    sharing = Sharing(tmp_path, NAME)
    store = ParameterStore(LAYOUTS, NAME, "cpu", sharing)
    assert View.announced(tmp_path, NAME) is None, "nothing is told before `share`"
    store.share()
    path = tmp_path / ANNOUNCEMENT
    content = unseal(path.read_bytes())
    assert View.announced(tmp_path, NAME) is not None
    assert View.announced(tmp_path, "other-model") is None
    for wrong in (
        content | {"version": content["version"] + 1},
        content | {"token": content["token"] + 1},
        content | {"path": str(tmp_path / "gone")},
        content | {"path": str(path)},
        {name: value for name, value in content.items() if name != "tables"},
    ):
        path.write_bytes(seal(wrong))
        assert View.announced(tmp_path, NAME) is None, wrong
    path.write_bytes(seal(content)[:-9])
    assert View.announced(tmp_path, NAME) is None
    sharing.close()
    assert not list(tmp_path.iterdir())


def test_what_a_killed_service_left_is_removed_and_is_for_its_owner_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("os.memfd_create", raising=False)
    first = Arena(tmp_path)
    assert Path(first.path).stat().st_mode & 0o777 == 0o600
    Sharing(tmp_path, NAME)
    assert not list(tmp_path.iterdir()), "nobody finds it any more"


class Writer:
    """`tests.parameter_writer` as a process, and its rows."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-m", "tests.parameter_writer", str(folder)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None and self.process.stdout.readline() == "ready\n"
        self.parameters = SharedParameters(folder, NAME, Nobody())
        rng = np.random.default_rng(1)
        self.asked = [block(*rng.integers(0, STAYING + PASSING, 500), *range(0, STAYING, 3)) for _ in range(20)]

    def read(self, number: int) -> tuple[float, ...]:
        """The steps that a lookup found, lowest and highest of the rows that always are there; fails where a row is torn."""
        reply = self.parameters.lookup([self.asked[number % len(self.asked)]])
        (rows,) = reply.values
        assert (rows == rows[:, :1]).all(), rows[(rows != rows[:, :1]).any(1)]
        staying = rows[500:, 0]
        assert staying.min() >= 1, "a row that is always there was not found"
        return reply.state.version.step, staying.max()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[Writer]:
    writer = Writer(tmp_path)
    yield writer
    writer.close()


def test_no_row_is_torn_and_nobody_waits_beside_a_writer_that_is_stopped_anywhere(writer: Writer) -> None:
    """Stopped 300 times, wherever it was: a reader that waited for it would never end."""
    steps, refused, read = set(), 0, 0
    for stop in range(300):
        time.sleep(0.002)
        writer.process.send_signal(signal.SIGSTOP)
        for number in range(5):
            try:
                told, seen = writer.read(5 * stop + number)
                assert told <= seen + 1, "the state that is told is in the rows"
                steps.add(told)
                read += 1
            except ParametersUnavailable:
                refused += 1
        writer.process.send_signal(signal.SIGCONT)
        for number in range(3):
            with suppress(ParametersUnavailable):  # it lost its core amid a change
                writer.read(stop + number)
    assert len(steps) > 50 and read > 1000, (len(steps), read, refused)


def test_rows_of_a_dead_writer_stay_and_are_said_to_be_old_until_the_next_one_is_there(
    writer: Writer, tmp_path: Path
) -> None:
    _until_current(writer.parameters, writer.asked[0])
    writer.close()
    for number in range(10):
        with suppress(ParametersUnavailable):  # it died amid moving entries
            assert not writer.parameters.lookup([writer.asked[number]]).current
    following = Writer(tmp_path)
    try:
        _until_current(writer.parameters, block(1))
    finally:
        following.close()


def _until_current(parameters: Parameters, asked: Block) -> None:
    """A writer may lose its core amid a change, for longer than a reader waits."""
    deadline = time.monotonic() + 60
    while True:
        with suppress(ParametersUnavailable):
            if parameters.lookup([asked]).current:
                return
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_writer_that_stands_still_is_told_of(writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recsys.parameters.shared_rows.STUCK_S", 0.05)
    writer.process.send_signal(signal.SIGSTOP)
    time.sleep(0.1)
    try:
        assert not writer.parameters.lookup([block(1)]).current
    except ParametersUnavailable as error:
        assert "stands still amid a change" in str(error)
    writer.process.send_signal(signal.SIGCONT)
    _until_current(writer.parameters, block(1))
