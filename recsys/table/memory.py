"""Address space that is reserved once and used as it is touched: an array in it never moves when it fills."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Room = Callable[[tuple[int, ...], npt.DTypeLike], npt.NDArray[Any]]
"""Where a table's arrays lie: zeros of a shape and kind that never move."""
_HUGE_PAGE = 2 * 2**20
"""Smaller arrays gain nothing from huge pages, and would occupy a whole one."""
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
"""A reservation may be larger than the memory; Python's mmap names the flag only from 3.12 on (Linux's number)."""


def reserve(shape: tuple[int, ...], kind: npt.DTypeLike) -> npt.NDArray[Any]:
    """Zeros of this shape, in huge pages where there are any; memory is used from the first write to a page."""
    size = math.prod(shape) * np.dtype(kind).itemsize
    if size < _HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return np.zeros(shape, kind)
    area = mmap.mmap(-1, size + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
    with contextlib.suppress(OSError):  # a kernel without huge pages: the same, slower
        area.madvise(mmap.MADV_HUGEPAGE)
    start = -np.frombuffer(area, np.uint8).ctypes.data % _HUGE_PAGE
    return np.frombuffer(area, kind, math.prod(shape), start).reshape(shape)
