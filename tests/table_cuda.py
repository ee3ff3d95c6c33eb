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

from recsys.table import triton_kernels as kernels
from recsys.table.base import Layout
from recsys.table.cuda import CudaTable
from recsys.table.cuda_rows import CHUNK_ROWS

COMPILED = torch.cuda.is_available()
_INDEX, _BATCH, _ROW = ("*i64", "i32"), ("*i32", "*i64"), (CHUNK_ROWS, 64, 64, 32)
KERNELS = {
    "find": (_INDEX, _BATCH, "*i32", "*i32", "i32", 128),
    "lookup": (_INDEX, _BATCH, "*i32", "*i64", ("*i32", "*fp32"), "i32", _ROW),
    "gather": ("*i64", "*i32", "*fp32", "i32", _ROW),
    "scatter": ("*i64", "*i32", "*fp32", "i32", _ROW),
    "see": ("*i64", "*i32", "i32", "i64", "i32", "i32", (CHUNK_ROWS, 128)),
    "claim": (_INDEX, _BATCH, "*i32", "i32", 128),
    "erase": (_INDEX, _BATCH, "*i32", "i32", 128),
    "group": (_INDEX, _BATCH, "*i1", "*i64", "i32", 128),
    "initialise": (("*i64", "*i64"), _BATCH, "*i32", ("*i64", "*fp32", "*fp32"), "i32", (*_ROW, 1, 1)),
    "refuse": ("*fp32", "*i32", "fp32", "i32", 2048),
    "presum": (("*i32", "*i64"), "*fp32", "*fp64", "i32", (64, 64, 4)),
    **{
        f"step {optimizer}": (
            ("*i32", "*i64"),
            ("*fp32", "*fp64", "*i32"),
            ("*i64", "*i64"),
            "*fp64",
            "i32",
            (CHUNK_ROWS, 64, 64, 0, 64, 64, 0, optimizer, 32),
        )
        for optimizer in (kernels.SGD, kernels.ADAGRAD, kernels.ROWWISE_ADAGRAD)
    },
}
"""Types of each kernel's arguments; the last is the constant."""


def cuda_table(layout: Layout, chunk_rows: int = 64) -> CudaTable:
    """A table with chunks so small that tests need several."""
    return CudaTable(layout, "cuda" if COMPILED else "cpu", chunk_rows)


def memory_instructions(name: str) -> list[str]:
    """Kinds of memory instructions, and of fused float64 ones, of a kernel compiled for compute capability 9.0."""
    kernel, types = getattr(kernels, name.split()[0]), KERNELS[name]
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
