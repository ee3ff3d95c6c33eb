"""FBGEMM's CPU table (TBE), in an environment of its own: it does not install beside every torch.

`measure` is for the benchmark. Run as a script, in that environment, this file prints the rates: it imports nothing of ours.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

PACKAGES = ("fbgemm-gpu-cpu==1.8.0", "torch==2.13.0", "numpy")
"""The newest pair known to load each other."""
ROUNDS, ROUND_KEYS = 21, 131_072


def measure(folder: str, rows: int, dim: int) -> dict[str, float] | None:
    """Keys a second of torch's gather and of TBE, by batch, and of TBE's training step; None where it cannot be had.

    The environment is made in `folder` unless it is there; without one in a temporary folder. It is several GB.
    """
    with tempfile.TemporaryDirectory(prefix="recsys-fbgemm-") as temporary:
        place = Path(folder or temporary)
        python = place / "bin" / "python"
        try:
            if not python.exists():
                venv.create(place, with_pip=True)
                install = [str(python), "-m", "pip", "install", "-q", *PACKAGES]
                subprocess.run(install, check=True, stdout=sys.stderr, timeout=1800)
            command = [str(python), __file__, str(rows), str(dim)]
            done = subprocess.run(
                command, check=True, stdout=subprocess.PIPE, timeout=600, env={"OMP_NUM_THREADS": "1"}
            )
        except (subprocess.SubprocessError, OSError) as error:
            print(f"FBGEMM is not measured: {error}", file=sys.stderr)
            return None
        measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return measured


def rates(rows: int, dim: int) -> dict[str, float]:
    """Gather and TBE take turns, with the same row numbers."""
    import torch
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    torch.set_num_threads(1)
    torch.manual_seed(0)
    table = SplitTableBatchedEmbeddingBagsCodegen(
        [(rows, dim, EmbeddingLocation.HOST, ComputeDevice.CPU)],
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=0.05,
        eps=1e-8,
    )
    weight = table.split_embedding_weights()[0].detach()
    found: dict[str, float] = {}
    for name, batch in (("4k", 4096), ("64k", 65_536)):
        offsets = torch.arange(batch + 1)
        gradient = torch.randn(batch, dim)

        def gather(ids: Any) -> None:
            torch.nn.functional.embedding(ids, weight)

        def forward(ids: Any, offsets: Any = offsets) -> None:
            with torch.no_grad():
                table(ids, offsets)

        def step(ids: Any, offsets: Any = offsets, gradient: Any = gradient) -> None:
            table(ids, offsets).backward(gradient)

        sides: list[Callable[[Any], None]] = [gather, forward, step]
        seconds: list[list[float]] = [[], [], []]
        for _ in range(ROUNDS):
            batches = torch.randperm(rows)[: max(batch, ROUND_KEYS)].reshape(-1, batch)
            for side, times in zip(sides, seconds, strict=True):
                started = time.perf_counter()
                for ids in batches:
                    side(ids)
                times.append(time.perf_counter() - started)
        for side_name, times in zip((f"torch_{name}", f"tbe_{name}", f"tbe_train_{name}"), seconds, strict=True):
            found[side_name] = max(batch, ROUND_KEYS) / median(times)
    return found


if __name__ == "__main__":
    print(json.dumps(rates(int(sys.argv[1]), int(sys.argv[2]))))
