from collections.abc import Iterable as _Iterable
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar

from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from google.protobuf.internal import containers as _containers

DESCRIPTOR: _descriptor.FileDescriptor

class Block(_message.Message):
    __slots__ = ("keys", "layout", "slots")
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    layout: str
    slots: bytes
    keys: bytes
    def __init__(self, layout: str | None = ..., slots: bytes | None = ..., keys: bytes | None = ...) -> None: ...

class LookupRequest(_message.Message):
    __slots__ = ("blocks", "schema")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    SCHEMA_FIELD_NUMBER: _ClassVar[int]
    blocks: _containers.RepeatedCompositeFieldContainer[Block]
    schema: str
    def __init__(self, blocks: _Iterable[Block | _Mapping] | None = ..., schema: str | None = ...) -> None: ...

class LookupReply(_message.Message):
    __slots__ = ("covers_ms", "dense_version", "epoch", "step", "values")
    VALUES_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    COVERS_MS_FIELD_NUMBER: _ClassVar[int]
    DENSE_VERSION_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedScalarFieldContainer[bytes]
    epoch: int
    step: int
    covers_ms: int
    dense_version: int
    def __init__(
        self,
        values: _Iterable[bytes] | None = ...,
        epoch: int | None = ...,
        step: int | None = ...,
        covers_ms: int | None = ...,
        dense_version: int | None = ...,
    ) -> None: ...

class DenseRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DenseChunk(_message.Message):
    __slots__ = ("data", "dense_version")
    DENSE_VERSION_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    dense_version: int
    data: bytes
    def __init__(self, dense_version: int | None = ..., data: bytes | None = ...) -> None: ...
