"""Copies between the host and a device."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from recsys.types import Int32, Int64

_PINNED_BYTES = 2**22
"""Copies up to this size go by way of memory that the device reads by itself: larger ones would hold on to much of it."""


def to_device(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """A copy on the device; on the CPU it may be the array itself."""
    return torch.from_numpy(np.require(array, None, ["C", "A", "W"])).to(device)


def pairs_to_device(slots: Int32, keys: Int64, device: torch.device) -> tuple[Tensor, Tensor]:
    """Slots and keys on the device, in one copy."""
    count = len(keys)
    start = 8 * count + 15 & ~15  # kernels read from multiples of 16 bytes
    if device.type == "cpu" or start > _PINNED_BYTES:
        given = (slots.astype(np.int32), keys.astype(np.int64))
        return torch.from_numpy(given[0]).to(device), torch.from_numpy(given[1]).to(device)
    buffer = torch.empty(start + 4 * count, dtype=torch.uint8, pin_memory=True)
    array = buffer.numpy()
    array[: 8 * count].view(np.int64)[:] = keys
    array[start:].view(np.int32)[:] = slots
    there = buffer.to(device, non_blocking=True)
    return there[start:].view(torch.int32), there[: 8 * count].view(torch.int64)


def fetched(*tensors: Tensor) -> list[Any]:
    """Copies on the host; waits for the device once."""
    if tensors[0].device.type == "cpu" or tensors[0].nbytes > _PINNED_BYTES:
        return [to_host(tensor) for tensor in tensors]
    copies = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors]
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensors[0].device).synchronize()
    return [copy.numpy() for copy in copies]


def to_host(tensor: Tensor) -> Any:
    """A copy on the host. Waits for the device."""
    return tensor.contiguous().cpu().numpy()
