"""Two instructions Numba has no name for: prefetch, and a copy of a cache line that goes past the caches.

Numba's on-disk cache does not see changes of this file: touch `kernels.py` with it.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_FLOATS = ir.VectorType(ir.FloatType(), 16)


@intrinsic
def prefetch(_typing: Any, address: Any) -> Any:
    """Ask for the cache line at this address; never faults, waits for nothing."""

    def emit(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        name = "llvm.prefetch.p0i8" if "i8*" in str(pointer) else "llvm.prefetch.p0"
        kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
        function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
        read, keep, data = (ir.Constant(number, value) for value in (0, 3, 1))
        builder.call(function, [builder.inttoptr(args[0], pointer), read, keep, data])
        return _context.get_dummy_value()

    return types.void(types.int64), emit


@intrinsic
def stream_line(_typing: Any, target: Any, source: Any) -> Any:
    """Copy 64 bytes, leaving no trace of the target in the caches. The target is a multiple of 64, the source of 4."""

    def emit(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        pointer = _FLOATS.as_pointer()
        line = builder.load(builder.inttoptr(args[1], pointer), align=4, typ=_FLOATS)
        store = builder.store(line, builder.inttoptr(args[0], pointer), align=64)
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
        return _context.get_dummy_value()

    return types.void(types.int64, types.int64), emit


@intrinsic
def fence(_typing: Any) -> Any:
    """What was streamed before is seen by whoever sees what is stored after."""

    def emit(_context: Any, builder: Any, _signature: Any, _args: Any) -> Any:
        builder.fence("seq_cst")
        return _context.get_dummy_value()

    return types.void(), emit
