"""The `Parameters` seam over gRPC: one client for ranking, one servicer for the parameter service."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
from google.protobuf.message import DecodeError

from recsys import metrics
from recsys.errors import ConfigError, ParametersUnavailable
from recsys.model.layouts import same_parameters
from recsys.model.plan import Block
from recsys.parameters import parameter_pb2 as pb
from recsys.parameters.base import ParameterState, Reply
from recsys.parameters.deltas import CHUNK_BYTES, Version
from recsys.parameters.store import ParameterStore
from recsys.types import Float32

_LOOKUP, _DENSE = "/recsys.v1.Parameters/Lookup", "/recsys.v1.Parameters/Dense"
MAX_FLOATS = 15 * 2**20
"""Of one reply: 60 MiB of the 64 that a message may have."""
_OPTIONS = [("grpc.max_receive_message_length", 64 * 2**20), ("grpc.max_send_message_length", 64 * 2**20)]


class GrpcParameters:
    """Parameters from a parameter service at `address` (host:port or unix:/path). Thread-safe."""

    def __init__(self, address: str, schema: str, timeout_s: float = 0.25) -> None:
        self._schema, self._timeout_s = schema, timeout_s
        options = [*_OPTIONS, ("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 500)]
        self._channel = grpc.insecure_channel(address, options)
        self._lookup = self._channel.unary_unary(
            _LOOKUP,
            request_serializer=pb.LookupRequest.SerializeToString,
            response_deserializer=pb.LookupReply.FromString,
        )
        self._dense = self._channel.unary_stream(
            _DENSE, request_serializer=pb.DenseRequest.SerializeToString, response_deserializer=pb.DenseChunk.FromString
        )

    def lookup(self, blocks: Sequence[Block]) -> Reply:
        request = pb.LookupRequest(
            schema=self._schema,
            blocks=[
                pb.Block(layout=b.layout, slots=b.slots.astype("<i4").tobytes(), keys=b.keys.astype("<i8").tobytes())
                for b in blocks
            ],
        )
        try:
            reply = self._lookup(request, timeout=self._timeout_s)
        except grpc.RpcError as error:
            raise ParametersUnavailable(
                f"parameter service: {_status(error)}; last known rows are used until it is back"
            ) from None
        if len(reply.values) != len(blocks):
            raise _unfit(f"{len(reply.values)} blocks for the {len(blocks)} that were asked for")
        values = tuple(_rows(block, data) for block, data in zip(blocks, reply.values, strict=True))
        version = Version(epoch=reply.epoch, step=reply.step)
        return Reply(
            values=values,
            state=ParameterState(version=version, covers_ms=reply.covers_ms, dense_version=reply.dense_version),
        )

    def dense(self) -> tuple[int, bytes]:
        try:
            chunks = list(self._dense(pb.DenseRequest(), timeout=10.0))
        except grpc.RpcError as error:
            raise ParametersUnavailable(
                f"parameter service: {_status(error)}; the present dense weights stay"
            ) from None
        if not chunks or len({chunk.dense_version for chunk in chunks}) != 1:
            raise _unfit("dense weights of no version, or of several")
        return chunks[0].dense_version, b"".join(chunk.data for chunk in chunks)

    def close(self) -> None:
        self._channel.close()


def _rows(block: Block, data: bytes) -> Float32:
    """A block's rows [N, D]. ParametersUnavailable unless there are as many as were asked for."""
    size = len(block.keys)
    if len(data) % (4 * size or 4) or (size == 0) != (not data):
        raise _unfit(f"{len(data)} bytes of layout {block.layout!r} for {size} keys")
    return np.frombuffer(data, "<f4").reshape(size, -1 if size else 0).copy()


def _unfit(what: str) -> ParametersUnavailable:
    return ParametersUnavailable(f"parameter service: its reply has {what}; run one release of all services")


def _block(block: Any) -> Block:
    """What a request asks for. ValueError unless it is whole, and its answer fits a reply."""
    slots, keys = np.frombuffer(block.slots, "<i4"), np.frombuffer(block.keys, "<i8")
    if len(slots) != len(keys):
        raise ValueError(f"{len(slots)} slots for {len(keys)} keys of layout {block.layout[:80]!r}")
    return Block(layout=block.layout, slots=slots, keys=keys)


def _parsed(kind: Any, data: bytes, context: grpc.ServicerContext) -> Any:
    """A request; INVALID_ARGUMENT when it is none."""
    try:
        return kind.FromString(data)
    except DecodeError as error:
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"{len(data)} bytes are no {kind.__name__} ({error})")


def _status(error: grpc.RpcError) -> str:
    return f"{error.code().name}: {error.details()}" if isinstance(error, grpc.Call) else str(error)


def serve(store: ParameterStore, address: str, schema: str) -> grpc.Server:
    """Start serving `store`; ConfigError naming the address when it cannot be bound."""

    def lookup(data: bytes, context: grpc.ServicerContext) -> Any:
        request = _parsed(pb.LookupRequest, data, context)
        if not same_parameters(request.schema, schema):
            context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"schema {request.schema!r}, this service has {schema!r}: use one configuration",
            )
        with metrics.LOOKUP_SECONDS.time():
            try:
                blocks = [_block(each) for each in request.blocks]
                asked = sum(len(b.keys) * store.tables[b.layout].layout.dim for b in blocks)
                if asked > MAX_FLOATS:
                    raise ValueError(f"{asked} numbers asked for, {MAX_FLOATS} fit a reply: ask for fewer keys at once")
                reply = store.lookup(blocks)
            except (KeyError, ValueError) as error:
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        metrics.LOOKUP_KEYS.inc(sum(len(b.keys) for b in blocks))
        state = reply.state
        return pb.LookupReply(
            values=[np.ascontiguousarray(v, "<f4").tobytes() for v in reply.values],
            epoch=state.version.epoch,
            step=state.version.step,
            covers_ms=state.covers_ms,
            dense_version=state.dense_version,
        )

    def dense(asked: bytes, context: grpc.ServicerContext) -> Iterator[Any]:
        _parsed(pb.DenseRequest, asked, context)
        version, data = store.dense()
        for start in range(0, max(len(data), 1), CHUNK_BYTES):
            yield pb.DenseChunk(dense_version=version, data=data[start : start + CHUNK_BYTES])

    server = grpc.server(
        ThreadPoolExecutor(2, thread_name_prefix="lookup"), options=[*_OPTIONS, ("grpc.so_reuseport", 0)]
    )
    handlers = {
        # Requests are parsed by the methods: of one that cannot be, grpc keeps 14 kB for ever.
        "Lookup": grpc.unary_unary_rpc_method_handler(lookup, None, pb.LookupReply.SerializeToString),
        "Dense": grpc.unary_stream_rpc_method_handler(dense, None, pb.DenseChunk.SerializeToString),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("recsys.v1.Parameters", handlers),))
    try:
        server.add_insecure_port(address)
    except RuntimeError as error:
        raise ConfigError(f"parameter.address {address!r} cannot be used ({error}): set another one") from None
    server.start()
    return server
