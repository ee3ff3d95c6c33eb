"""Instructions Numba has no name for: prefetch, the search of one line of the index, copies of cache lines, half floats.

Numba's on-disk cache does not see changes of this file: touch `kernels.py` with it.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_FLOATS = ir.VectorType(ir.FloatType(), 16)
_ENTRIES = ir.VectorType(_I64, 8)


@intrinsic
def prefetch(_typing: Any, address: Any) -> Any:
    """Ask for the cache line at this address into the second-level cache; never faults, waits for nothing.

    The second level has more misses in flight than the first: rows arrive in two thirds of the time (EPYC 9004).
    """

    def emit(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        pointer = _I8.as_pointer()
        name = "llvm.prefetch.p0i8" if "i8*" in str(pointer) else "llvm.prefetch.p0"
        kind = ir.FunctionType(ir.VoidType(), [pointer, _I32, _I32, _I32])
        function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
        read, second_level, data = (ir.Constant(_I32, value) for value in (0, 2, 1))
        builder.call(function, [builder.inttoptr(args[0], pointer), read, second_level, data])
        return _context.get_dummy_value()

    return types.void(types.int64), emit


@intrinsic
def search_line(_typing: Any, line: Any, place: Any, key: Any) -> Any:
    """Search the four entries (key, word) of the 64-byte line at an address, all at once.

    0 … 3: the entry of (place, key); 4 … 7: not here, and entry - 4 is the first empty one; 8: neither.
    """

    def emit(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        address, place, key = args
        entries = builder.load(builder.inttoptr(address, _ENTRIES.as_pointer()), align=16, typ=_ENTRIES)
        wanted = ir.Constant(_ENTRIES, ir.Undefined)
        shifted = builder.shl(place, ir.Constant(_I64, 32))
        for lane in range(8):
            wanted = builder.insert_element(wanted, shifted if lane % 2 else key, ir.Constant(_I32, lane))
        masks = ir.Constant(_ENTRIES, [-1, 0xFF << 32] * 4)
        same = builder.icmp_signed("==", builder.and_(entries, masks), wanted)
        zero = builder.icmp_signed("==", entries, ir.Constant(_ENTRIES, [0] * 8))
        same, zero = (builder.zext(builder.bitcast(bits, _I8), _I64) for bits in (same, zero))
        words = ir.Constant(_I64, 0x55)
        one = ir.Constant(_I64, 1)
        empty = builder.and_(builder.lshr(zero, one), words)
        hit = builder.and_(builder.and_(builder.and_(same, builder.lshr(same, one)), words), builder.not_(empty))
        # One number to count the zeros below: hits in bits 0 … 7, empty entries in bits 8 … 15, a stop at bit 16.
        both = builder.or_(builder.or_(hit, builder.shl(empty, ir.Constant(_I64, 8))), ir.Constant(_I64, 1 << 16))
        return builder.lshr(builder.cttz(both, ir.Constant(ir.IntType(1), 1)), one)

    return types.int64(types.int64, types.int64, types.int64), emit


@intrinsic
def above64(_typing: Any, source: Any, limit: Any) -> Any:
    """Which of the 64 bytes (unsigned) at an address are above a limit: bit n for byte n."""

    def emit(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        bytes64 = ir.VectorType(_I8, 64)
        given = builder.load(builder.inttoptr(args[0], bytes64.as_pointer()), align=1, typ=bytes64)
        above = builder.icmp_unsigned(">", given, _all(builder, builder.trunc(args[1], _I8), bytes64))
        return builder.bitcast(above, _I64)

    return types.uint64(types.int64, types.int64), emit


@intrinsic
def lowest_bit(_typing: Any, bits: Any) -> Any:
    """The number of the lowest bit that is set; 64 if none is."""

    def emit(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 0))

    return types.int64(types.uint64), emit


def _copy(nontemporal: bool) -> Any:
    def typed(_typing: Any, target: Any, source: Any) -> Any:
        def emit(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            pointer = _FLOATS.as_pointer()
            line = builder.load(builder.inttoptr(args[1], pointer), align=4, typ=_FLOATS)
            store = builder.store(line, builder.inttoptr(args[0], pointer), align=64 if nontemporal else 4)
            if nontemporal:
                store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(_I32, 1)]))
            return _context.get_dummy_value()

        return types.void(types.int64, types.int64), emit

    return typed


copy_line = intrinsic(_copy(nontemporal=False))
"""Copy 64 bytes; both addresses are multiples of 4."""
stream_line = intrinsic(_copy(nontemporal=True))
"""Copy 64 bytes, leaving no trace of the target in the caches. The target is a multiple of 64, the source of 4."""


@intrinsic
def fence(_typing: Any) -> Any:
    """What was streamed before is seen by whoever sees what is stored after."""

    def emit(_context: Any, builder: Any, _signature: Any, _args: Any) -> Any:
        builder.fence("seq_cst")
        return _context.get_dummy_value()

    return types.void(), emit


@intrinsic
def release(_typing: Any) -> Any:
    """Nobody, not even in another process, sees what is stored after without what was stored before."""

    def emit(_context: Any, builder: Any, _signature: Any, _args: Any) -> Any:
        builder.fence("release")
        return _context.get_dummy_value()

    return types.void(), emit


@intrinsic
def acquire(_typing: Any) -> Any:
    """What is read after is read after what was read before; beside a writer who uses `release`."""

    def emit(_context: Any, builder: Any, _signature: Any, _args: Any) -> Any:
        builder.fence("acquire")
        return _context.get_dummy_value()

    return types.void(), emit


_EIGHT = ir.VectorType(ir.FloatType(), 8)
_DOUBLES = ir.VectorType(ir.DoubleType(), 8)


def _load(builder: Any, address: Any, kind: ir.VectorType) -> Any:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=4, typ=kind)


def _all(builder: Any, number: Any, kind: ir.VectorType) -> Any:
    """A vector of one number."""
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), number, ir.Constant(_I32, 0))
    zeros = ir.Constant(ir.VectorType(_I32, kind.count), [0] * kind.count)
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), zeros)


@intrinsic
def load_float(_typing: Any, source: Any) -> Any:
    """The float32 at an address."""

    def emit(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        place = builder.inttoptr(args[0], ir.FloatType().as_pointer())
        return builder.load(place, align=4, typ=ir.FloatType())

    return types.float32(types.int64), emit


def _function(builder: Any, name: str, *kinds: ir.Type) -> Any:
    """LLVM's function of this name; the first type is the result's."""
    return builder.module.globals.get(name) or ir.Function(builder.module, ir.FunctionType(kinds[0], kinds[1:]), name)


@intrinsic
def squares16(_typing: Any, source: Any) -> Any:
    """The sum of the squares of sixteen float32 at an address, always in the same order."""

    def emit(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        numbers = _load(builder, args[0], _FLOATS)
        sums = builder.fmul(numbers, numbers)
        for width in (8, 4, 2, 1):
            lanes = ir.VectorType(_I32, width)
            parts = [
                builder.shuffle_vector(sums, sums, ir.Constant(lanes, list(range(start, start + width))))
                for start in (0, width)
            ]
            sums = builder.fadd(*parts)
        return builder.extract_element(sums, ir.Constant(_I32, 0))

    return types.float32(types.int64), emit


@intrinsic
def subtract16(_typing: Any, target: Any, factor: Any, source: Any) -> Any:
    """target -= factor * source, rounded once, for sixteen float32 at two addresses."""

    def emit(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        target, factor, source = args
        fused = _function(builder, "llvm.fma.v16f32", _FLOATS, _FLOATS, _FLOATS, _FLOATS)
        down = _all(builder, builder.fneg(builder.fptrunc(factor, ir.FloatType())), _FLOATS)
        moved = builder.call(fused, [down, _load(builder, source, _FLOATS), _load(builder, target, _FLOATS)])
        builder.store(moved, builder.inttoptr(target, _FLOATS.as_pointer()), align=4)
        return _context.get_dummy_value()

    return types.void(types.int64, types.float64, types.int64), emit


@intrinsic
def adagrad8(_typing: Any, target: Any, state: Any, source: Any, rate: Any, epsilon: Any) -> Any:
    """Adagrad's step of eight float32 values with their sums of squares: sums in float64, root and quotient in float32, which
    is a third of the time and moves a step by a ten-millionth of itself."""

    def emit(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        target, state, source, rate, epsilon = args
        gradient = _load(builder, source, _EIGHT)
        wide = builder.fpext(gradient, _DOUBLES)
        sums = builder.fadd(builder.fpext(_load(builder, state, _EIGHT), _DOUBLES), builder.fmul(wide, wide))
        sums = builder.fptrunc(sums, _EIGHT)
        builder.store(sums, builder.inttoptr(state, _EIGHT.as_pointer()), align=4)
        root = builder.call(_function(builder, "llvm.sqrt.v8f32", _EIGHT, _EIGHT), [sums])
        rate, epsilon = (_all(builder, builder.fptrunc(each, ir.FloatType()), _EIGHT) for each in (rate, epsilon))
        change = builder.fdiv(builder.fmul(rate, gradient), builder.fadd(root, epsilon))
        moved = builder.fsub(_load(builder, target, _EIGHT), change)
        builder.store(moved, builder.inttoptr(target, _EIGHT.as_pointer()), align=4)
        return _context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.float64, types.float64), emit


def _float(value: ir.Type) -> Any:
    return ir.Constant(ir.FloatType(), value)


@intrinsic
def decode(_typing: Any, stored: Any) -> Any:
    """A stored value as float32: float32 is itself, uint16 the bits of a float16, int16 those of a bfloat16."""

    def emit(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        if stored == types.float32:
            return args[0]
        if stored == types.uint16:
            return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())
        bits = builder.shl(builder.zext(args[0], _I32), ir.Constant(_I32, 16))
        return builder.bitcast(bits, ir.FloatType())

    return (types.float32(stored), emit) if stored in (types.float32, types.uint16, types.int16) else None


@intrinsic
def encode(_typing: Any, value: Any, like: Any) -> Any:
    """A finite float32 as it is stored in an array of `like`'s type: to nearest even, no larger than the largest half."""

    def emit(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        if like == types.float32:
            return args[0]
        largest = 65504.0 if like == types.uint16 else 2.0**127 * (2 - 2**-7)
        above = builder.fcmp_ordered(">", args[0], _float(largest))
        value = builder.select(above, _float(largest), args[0])
        value = builder.select(builder.fcmp_ordered("<", value, _float(-largest)), _float(-largest), value)
        if like == types.uint16:
            return builder.bitcast(builder.fptrunc(value, ir.HalfType()), _I16)
        bits = builder.bitcast(value, _I32)
        odd = builder.and_(builder.lshr(bits, ir.Constant(_I32, 16)), ir.Constant(_I32, 1))
        rounded = builder.add(builder.add(bits, ir.Constant(_I32, 0x7FFF)), odd)
        return builder.trunc(builder.lshr(rounded, ir.Constant(_I32, 16)), _I16)

    known = value == types.float32 and like in (types.float32, types.uint16, types.int16)
    return (like(value, like), emit) if known else None


@intrinsic
def float_bits(_typing: Any, value: Any) -> Any:
    """The bits of a float32 as int64."""

    def emit(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.zext(builder.bitcast(args[0], _I32), _I64)

    return types.int64(types.float32), emit


@intrinsic
def bits_float(_typing: Any, bits: Any) -> Any:
    """The float32 of the low 32 bits of an int64."""

    def emit(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.bitcast(builder.trunc(args[0], _I32), ir.FloatType())

    return types.float32(types.int64), emit
