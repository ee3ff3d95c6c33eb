"""What the towers keep of each user: recent items, items last shown and passed over, the last request's context.

Users and items are kept by their keys: nothing here names a row of the catalogue, which is numbered anew after a restart, and a
user takes at most `USER_BYTES`, whatever ids and values are made of.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from recsys.features.schema import Schema
from recsys.keys import joined, key_of, split
from recsys.types import Bool, Int64

SHOWN = 20
"""Items last shown to a user that are kept as hard negatives."""
USER_BYTES = 1300
"""One user with a full history of 50 items and `SHOWN` shown ones."""
_NO_REQUEST = key_of("")


def _int64s(values: Iterable[int] = ()) -> array[int]:
    return array("q", values)


@dataclass(slots=True)
class TowerUser:
    """Items of the history, oldest first, and their types by number; items last shown; the last request and its shared columns."""

    items: array[int] = field(default_factory=_int64s)
    types: bytearray = field(default_factory=bytearray)
    shown: array[int] = field(default_factory=_int64s)
    request: int = _NO_REQUEST
    shared_keys: array[int] = field(default_factory=_int64s)
    shared_mask: bytes = b""

    def shared(self) -> tuple[Int64, Bool]:
        """The shared columns of the last request."""
        return np.array(self.shared_keys, np.int64), np.frombuffer(self.shared_mask, np.bool_).copy()


class TowerUsers:
    """Users by key; beyond `limit` those least recently active leave. Not thread-safe."""

    def __init__(self, schema: Schema, types: Iterable[str], limit: int) -> None:
        self.types, self._limit, self._length = sorted(types), limit, schema.history_len
        self._number = {name: number for number, name in enumerate(self.types)}
        sequences = () if schema.sequences == ((),) else schema.sequences
        members = [[name in kinds for kinds in sequences] for name in self.types]
        self._sequences = np.array(members, np.bool_).reshape(len(members), len(sequences))
        """[types, S]: which events are of which sequence; without sequences all are of one."""
        self._users: OrderedDict[int, TowerUser] = OrderedDict()

    def __len__(self) -> int:
        return len(self._users)

    @property
    def full_ratio(self) -> float:
        """How full it is; at 1 users leave."""
        return len(self._users) / self._limit

    def of(self, key: int) -> TowerUser:
        """The user, who is now the most recently active one."""
        user = self._users.get(key)
        if user is None:
            user = self._users[key] = TowerUser()
            if len(self._users) > self._limit:
                self._users.popitem(last=False)
        else:
            self._users.move_to_end(key)
        return user

    def forget(self, key: int) -> None:
        """Drop what is kept of a user."""
        self._users.pop(key, None)

    def recent(self, user: TowerUser) -> Int64:
        """Items of the newest events of each sequence, newest first: those that `features.build.newest` takes."""
        items = np.array(user.items, np.int64)[::-1]
        if not self._sequences.shape[1]:
            return items[: self._length]
        of_sequences = self._sequences[np.frombuffer(bytes(user.types), np.uint8)[::-1]]
        kept: Bool = of_sequences & (of_sequences.cumsum(0) <= self._length)
        return items[kept.any(1)]

    def happened(self, user: TowerUser, item: int, kind: str) -> None:
        """One more event of the history, of which the newest are kept."""
        user.items.append(item)
        user.types.append(self._number[kind])
        del user.items[: -self._length], user.types[: -self._length]

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Everything, as arrays."""
        users = list(self._users.values())
        sizes = [(len(u.items), len(u.shown), len(u.shared_keys)) for u in users]
        return {
            "keys": np.fromiter(self._users, np.int64, len(users)),
            "sizes": np.array(sizes, np.int64).reshape(-1, 3),
            "names": joined(self.types),
            "items": _joined((u.items for u in users), np.int64),
            "types": _joined((u.types for u in users), np.uint8),
            "shown": _joined((u.shown for u in users), np.int64),
            "requests": np.array([u.request for u in users], np.int64),
            "shared_keys": _joined((u.shared_keys for u in users), np.int64),
            "shared_mask": _joined((u.shared_mask for u in users), np.uint8),
        }

    def restore(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Load what `state` returned; events of types that are not of the history any more are left out."""
        numbers = np.array([self._number.get(name, -1) for name in split(state["names"])] or [-1])
        of_items, of_shown, of_shared = state["sizes"].cumsum(0).T
        events = zip(*(np.split(state[name], of_items[:-1]) for name in ("items", "types")), strict=True)
        shown = np.split(state["shown"], of_shown[:-1])
        shared = zip(*(np.split(state[f"shared_{name}"], of_shared[:-1]) for name in ("keys", "mask")), strict=True)
        columns = zip(state["keys"].tolist(), events, shown, state["requests"].tolist(), shared, strict=False)
        self._users = OrderedDict()
        for key, (items, types), seen, request, (shared_keys, shared_mask) in columns:
            today = numbers[types]
            self._users[key] = TowerUser(
                items=_int64s(items[today >= 0].tolist()),
                types=bytearray(today[today >= 0].tolist()),
                shown=_int64s(seen.tolist()),
                request=request,
                shared_keys=_int64s(shared_keys.tolist()),
                shared_mask=shared_mask.tobytes(),
            )


def _joined(parts: Iterable[array[int] | bytes | bytearray], kind: type[np.generic]) -> npt.NDArray[Any]:
    return np.frombuffer(b"".join(bytes(memoryview(part).cast("B")) for part in parts), kind)
