"""Which rows make room on a device: the window and the rank of `worth.py`, the choice on the host. All of it waits for the device."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from recsys.table import worth
from recsys.table.cuda_index import DeviceIndex


def least_worth(
    index: DeviceIndex,
    order: int,
    of: tuple[int, int],
    count: int,
    value: Callable[[Tensor], Tensor],
    kept: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Slots, keys and rows of the `count` entries of least `value` of their row in a window of hashes, but rows `kept`."""
    found = [(torch.zeros(0, dtype=torch.int32), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int32))]
    found[0] = tuple(part.to(index.device) for part in found[0])  # type: ignore[assignment]
    start, width = of
    hashed = [torch.zeros(0, dtype=torch.int64, device=index.device)]
    for slots, keys, rows, _ in index.scan():
        mixed = _hashes(order, index.fallback[slots.to(torch.int64)].to(torch.int64), keys)
        inside = (((mixed >> 32) & 0xFFFFFFFF) - start) % 2**32 < width
        if kept is not None:
            inside &= ~torch.isin(rows, kept)
        found.append((slots[inside], keys[inside], rows[inside]))
        hashed.append(mixed[inside])
    slots, keys, rows = (torch.cat(parts) for parts in zip(*found, strict=True))
    values = value(rows).cpu().numpy() if len(rows) else np.zeros(0, np.int64)
    gone = worth.least(values, torch.cat(hashed).cpu().numpy().view(np.uint64), count)
    chosen = torch.from_numpy(gone).to(index.device)
    return slots[chosen], keys[chosen], rows[chosen]


def _hashes(order: int, places: Tensor, keys: Tensor) -> Tensor:
    """`worth.hashes` as int64."""
    x = places * _signed(0xD1342543DE82EF95) + keys + _signed(order % 2**64) + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _down(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _down(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _down(x, 31)


def _down(x: Tensor, bits: int) -> Tensor:
    """A shift that fills with zeros."""
    return x >> bits & 2 ** (64 - bits) - 1


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number
