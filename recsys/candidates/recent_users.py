"""Users of the last requests, kept across a restart: by them clusters find their place in another generation."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from recsys.errors import SnapshotCorrupt
from recsys.features.build import UserFeatures
from recsys.features.schema import Schema
from recsys.files import Manifests, fresh, read_file, write_file
from recsys.parameters.deltas import metadata

NAME = "recent_users"
logger = logging.getLogger("recsys")


class Recent(NamedTuple):
    """A request of late: its user, and the cluster nearest to them."""

    user: UserFeatures
    cluster: int


class RecentUsers:
    """The users of the latest requests. Thread-safe: requests add to them while others read, forget and save."""

    def __init__(self, limit: int) -> None:
        self._users: deque[Recent] = deque(maxlen=limit)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._users)

    def __iter__(self) -> Iterator[Recent]:
        """As they are now, the oldest first."""
        with self._lock:
            users = list(self._users)
        return iter(users)

    def extend(self, users: Iterable[Recent]) -> None:
        """These are the latest."""
        with self._lock:
            self._users.extend(users)

    def forget(self, user_key: int) -> None:
        """Drop what is kept of a user."""
        with self._lock:
            kept = [one for one in self._users if one.user.shared_keys[0] != user_key]
            self._users.clear()
            self._users.extend(kept)


def save(folder: Path, recent: Iterable[Recent], schema: Schema) -> None:
    """Write them; whole, or not at all. Nothing of before stays: a user who is forgotten is in no file."""
    folder.mkdir(parents=True, exist_ok=True)
    users = list(recent)
    arrays: dict[str, Any] = {
        "clusters": np.array([one.cluster for one in users], np.int64),
        "lengths": np.array([len(one.user.history_keys) for one in users], np.int64),
    }
    for name, width, kind in _arrays(schema):
        rows = [np.atleast_2d(getattr(one.user, name)) for one in users if getattr(one.user, name).size]
        arrays[name] = np.concatenate([np.zeros((0, width), kind), *rows])
    entry = write_file(fresh(folder, NAME, ".safetensors"), safetensors.numpy.save(arrays, {"schema": schema.hash}))
    manifests = Manifests(folder, NAME)
    manifests.write(entry)
    manifests.forget_previous()
    manifests.sweep(f"{NAME}*.safetensors*")


def load(folder: Path, schema: Schema) -> list[Recent]:
    """Read them back; none, loudly, where the file is of another schema or torn."""
    try:
        data = _read(folder)
        if metadata(data).get("schema") != schema.hash:
            raise ValueError("another schema")
        arrays = safetensors.numpy.load(data)
    except FileNotFoundError:
        return []
    except (SnapshotCorrupt, OSError, ValueError, KeyError, SafetensorError) as error:
        logger.error("%s not used (%s): clusters of users will be found anew", folder / NAME, error)
        return []
    ends = np.cumsum(arrays["lengths"])[:-1]
    keys, mask = (np.split(arrays[name], ends) for name in ("history_keys", "history_mask"))
    return [
        Recent(
            UserFeatures(
                shared_keys=shared_keys,
                shared_mask=shared_mask.astype(np.bool_),
                history_keys=history_keys,
                history_mask=history_mask.astype(np.bool_),
                history_kinds=np.zeros(len(history_keys), np.uint8),
                history_gaps=np.zeros(len(history_keys), np.uint8),
            ),
            int(cluster),
        )
        for shared_keys, shared_mask, history_keys, history_mask, cluster in zip(
            arrays["shared_keys"], arrays["shared_mask"], keys, mask, arrays["clusters"], strict=False
        )
    ]


def _read(folder: Path) -> bytes:
    manifests = Manifests(folder, NAME)
    if not manifests.exist():  # an earlier release wrote one file, without a checksum
        return (folder / f"{NAME}.safetensors").read_bytes()
    for entry in manifests.look():
        return read_file(folder / entry["name"], entry["checksum"])
    raise SnapshotCorrupt(f"{manifests.newest} is torn or flipped")


def _arrays(schema: Schema) -> list[tuple[str, int, type[Any]]]:
    """What a vector is computed from: name, width, kind."""
    shared, past = len(schema.shared_slots), len(schema.history_slots)
    return [
        ("shared_keys", shared, np.int64),
        ("shared_mask", shared, np.bool_),
        ("history_keys", past, np.int64),
        ("history_mask", past, np.bool_),
    ]
