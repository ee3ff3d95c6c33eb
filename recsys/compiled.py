"""How loops become machine code: Numba, no GIL, kept on disk between processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """The function, compiled at its first call with these options of `numba.njit`."""
    try:
        return numba.njit(nogil=True, cache=True, **options)(function)
    except RuntimeError:  # no folder for the cache is writable: compile in each process
        return numba.njit(nogil=True, **options)(function)
