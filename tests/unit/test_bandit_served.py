"""What the bandit served with, in an impression: read back as written, refused where it cannot be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from recsys.bandit.served import Served, decode
from recsys.errors import BadInput


def served(**changes: Any) -> Served:
    fields: dict[str, Any] = {"clusters": [0], "weights": [1.0], "edges": [1], "vector": [1.0, 0.5]} | changes
    kinds = {"clusters": np.int64, "weights": np.float32, "edges": np.uint64, "vector": np.float32}
    return Served(generation="g1é", **{name: np.array(fields[name], kind) for name, kind in kinds.items()})


def test_what_was_served_is_read_back() -> None:
    sent = served(clusters=[3, 2**40], weights=[0.75, 0.25], edges=[2, 3])
    read = decode(sent.encode(), 2)
    assert read.generation == sent.generation
    for name in ("clusters", "weights", "edges", "vector"):
        np.testing.assert_array_equal(getattr(read, name), getattr(sent, name))


@pytest.mark.parametrize(
    ("data", "items", "reason"),
    [
        (b"\x02" * 20, 1, "version"),
        (b"", 1, "version"),
        (served().encode()[:-1], 1, "cut or padded"),
        (served().encode(), 2, "shows 2"),
        (served(clusters=[0, 0], weights=[0.5, 0.5]).encode(), 1, "twice"),
        (served(weights=[1.5]).encode(), 1, "weights"),
        (served(weights=[0.0]).encode(), 1, "weights"),
        (served(vector=[np.nan]).encode(), 1, "not finite"),
        (served(edges=[2]).encode(), 1, "not active"),
        (served(clusters=[], weights=[], edges=[0]).encode(), 1, "0 active"),
        (served(clusters=range(65), weights=[0.01] * 65).encode(), 1, "65 active"),
        (served().encode()[:-1] + b"\xff", 1, "UTF-8"),
    ],
)
def test_what_cannot_be_is_refused(data: bytes, items: int, reason: str) -> None:
    with pytest.raises(BadInput, match=reason):
        decode(data, items)
