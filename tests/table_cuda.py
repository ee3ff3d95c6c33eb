"""The CUDA table as tests build it: on a device where there is one, otherwise its kernels in Triton's interpreter.

`python -m tests.table_cuda` compiles every kernel for a Hopper GPU, which needs none, and prints the kinds of memory
instructions of each.
"""

from __future__ import annotations

import re

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from recsys.table import triton_index as index_kernels
from recsys.table import triton_kernels as kernels
from recsys.table import triton_steps as steps
from recsys.table.base import Layout
from recsys.table.cuda import CudaTable
from recsys.table.cuda_rows import CHUNK_ROWS

COMPILED = torch.cuda.is_available()
_INDEX, _BATCH = ("*i64", "i32", "*i32"), ("*i32", "*i64")
_SHAPE, _ROWS = (
    (CHUNK_ROWS, 64, 64, kernels.FLOAT32, 4, 1, 1, 1, 32, True),
    (CHUNK_ROWS, 64, 0, 64, 64, kernels.FLOAT32, 32),
)
_ORDER, _CLAIMS = ("*i32", "*i64"), ("*i32", "*i64", "*i64", "*i32")
KERNELS = {
    "find": (_INDEX, _BATCH, "*i32", "i32", (128,)),
    "lookup": (_INDEX, _BATCH, "*i64", ("*i32", "*fp32"), "i32", _SHAPE),
    "gather": ("*i64", "*i32", "*fp32", "i32", _ROWS),
    "scatter": ("*i64", "*i32", "*fp32", "i32", _ROWS),
    "enter": (_INDEX, _BATCH, _CLAIMS, "i32", (1, 128)),
    "settle": (_INDEX, _BATCH, _CLAIMS, ("*i64", "*i64", "*i64", "*fp32", "*fp32"), "i64", "i32", _SHAPE),
    "see": ("*i64", "*i32", "i64", "i32", _SHAPE),
    "rehash": ("*i64", _INDEX, "i32", (128,)),
    "erase": (_INDEX, _BATCH, "*i32", "i32", (128,)),
    "group": (("*i64", "i32"), _BATCH, "*i1", "*i64", "i32", (128,)),
    "refuse": ("*fp32", "*i32", "fp32", "i32", (2048,)),
    "presum": (_ORDER, "*fp32", "*fp64", ("*i32", "*i32"), "i32", (64, 64, 32)),
    "combine": (_ORDER, ("*fp32", "*fp64"), ("*i32", "*i32"), "*fp32", "i32", (64, 64, 8)),
    **{
        f"step {optimizer}": (
            _ORDER,
            ("*fp32", "*fp32", "*i32"),
            ("*i64", "*i64"),
            "*fp64",
            "i64",
            "i32",
            (*_SHAPE, 0, 64, 64, 0, optimizer, steps.NEAREST, optimizer == steps.ROWWISE_ADAGRAD),
        )
        for optimizer in (steps.SGD, steps.ADAGRAD, steps.ROWWISE_ADAGRAD, steps.ADAM, steps.FTRL)
    },
    "step half": (
        (*_ORDER, *_BATCH, "*i64"),
        ("*fp32", "*fp32", "*i32"),
        ("*i64", "*i64"),
        "*fp64",
        "i64",
        "i32",
        (CHUNK_ROWS, 64, 64, kernels.FLOAT16, *_SHAPE[4:], 0, 64, 64, 0, steps.SGD, steps.COUNTED, False),
    ),
    "tally": ("*i32", _BATCH, "*i1", "*i64", "i32", (1000, 128)),
    "least": ("*i32", _BATCH, "*i1", "*i32", "*i64", "i32", (1000, 128)),
}
"""Types of each kernel's arguments; the last is the constant."""


def cuda_table(layout: Layout, chunk_rows: int = 64) -> CudaTable:
    """A table with chunks so small that tests need several."""
    return CudaTable(layout, "cuda" if COMPILED else "cpu", chunk_rows)


def memory_instructions(name: str) -> list[str]:
    """Kinds of memory instructions, and of fused float64 ones, of a kernel compiled for compute capability 9.0."""
    kernel, types = {**vars(index_kernels), **vars(kernels), **vars(steps)}[name.split()[0]], KERNELS[name]
    names = kernel.arg_names
    signature = dict(zip(names, (*types[:-1], "constexpr"), strict=True))
    aligned = {}
    for at, kind in enumerate(types[:-1]):
        parts = [((at,), kind)] if isinstance(kind, str) else [((at, n), part) for n, part in enumerate(kind)]
        aligned |= {place: [["tt.divisibility", 16]] for place, part in parts if part.startswith("*")}
    source = ASTSource(kernel, signature, {(len(names) - 1,): types[-1]}, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False})
    return sorted(set(re.findall(r"\b(?:ld\.global|st\.global|atom|fma\.rn\.f64)[\w.]*", compiled.asm["ptx"])))


if __name__ == "__main__":
    for name in KERNELS:
        print(name.split()[0], *memory_instructions(name))
