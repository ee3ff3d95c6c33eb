"""Attribute values as they were written, for reasons; those that no item has any more are forgotten."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import orjson

from recsys.types import Bool, Int64, UInt8

_LEAST = 1024
"""New labels before it is worth looking which are still used; then as many as there were."""
_ENTRY_BYTES = 200
"""Of one label beside its text."""


class Labels:
    """(attribute, key) → text. One writer beside many readers, who may find that a value is gone."""

    def __init__(self) -> None:
        self._texts: dict[tuple[str, int], str] = {}
        self._kept = 0
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._texts)

    @property
    def num_bytes(self) -> int:
        return self._bytes + _ENTRY_BYTES * len(self._texts)

    @property
    def overgrown(self) -> bool:
        """Whether as many came since the last `keep` as were kept then."""
        return len(self._texts) > 2 * max(self._kept, _LEAST)

    def get(self, attribute: str, key: int) -> str | None:
        """The value's text; None when no item has had it for a while."""
        return self._texts.get((attribute, key))

    def has(self, attribute: str, key: int) -> bool:
        return (attribute, key) in self._texts

    def add(self, attribute: str, key: int, text: str) -> None:
        self._texts[attribute, key] = text
        self._bytes += len(text)

    def keep(self, used: Mapping[str, Int64]) -> None:
        """Forget the values whose keys are not among those used [n], by attribute."""
        kept = {name: set(np.unique(keys).tolist()) for name, keys in used.items()}
        self._texts = {name: text for name, text in self._texts.items() if name[1] in kept.get(name[0], ())}
        self._kept, self._bytes = len(self._texts), sum(map(len, self._texts.values()))

    def state(self) -> UInt8:
        """Everything, in bytes."""
        rows = [[name, key, text] for (name, key), text in list(self._texts.items())]
        return np.frombuffer(orjson.dumps(rows), np.uint8)

    def restore(self, data: UInt8) -> None:
        """Load what `state` returned."""
        rows: Iterable[Any] = orjson.loads(data.tobytes())
        self._texts = {(name, key): text for name, key, text in rows}
        self._kept, self._bytes = len(self._texts), sum(map(len, self._texts.values()))


def used_keys(keys: Int64, mask: Bool, columns: Mapping[str, slice]) -> dict[str, Int64]:
    """The keys that rows [n, I] have, by attribute."""
    return {name: keys[:, where][mask[:, where]] for name, where in columns.items()}
