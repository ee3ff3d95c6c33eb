"""Our table and FBGEMM's CPU table (TBE) in turns, in one process of an environment of its own: TBE does not install beside
every torch.

`measure` is for the benchmark. Run as a script, in that environment, this file prints the figures.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

PACKAGES = ("fbgemm-gpu-cpu==1.8.0", "torch==2.13.0", "numpy", "numba", "safetensors")
"""The newest pair known to load each other, and what our table needs."""
ROUNDS, ROUND_KEYS = 21, 131_072
ROOT = Path(__file__).resolve().parents[1]


def measure(folder: Path | None, rows: int, dim: int) -> dict[str, float] | None:
    """Keys a second of each side and medians of the rounds' ratios, by batch; None where TBE cannot be had.

    The environment is made in `folder` unless it is there; without one in a temporary folder. It is several GB.
    """
    with tempfile.TemporaryDirectory(prefix="recsys-fbgemm-") as temporary:
        place = folder or Path(temporary)
        python = place / "bin" / "python"
        try:
            if not python.exists():
                venv.create(place, with_pip=True)
                install = [str(python), "-m", "pip", "install", "-q", *PACKAGES]
                subprocess.run(install, check=True, stdout=sys.stderr, timeout=1800)
            command = [str(python), __file__, str(rows), str(dim)]
            environment = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=900, env=environment)
        except (subprocess.SubprocessError, OSError) as error:
            print(f"FBGEMM is not measured: {error}", file=sys.stderr)
            return None
        measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return measured


def tables(rows: int, dim: int) -> tuple[Any, Any, Any]:
    """TBE with so many rows, ours with as many, and ours' keys."""
    import numpy as np
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    from recsys.table.base import Layout, Segment, SlotPolicy
    from recsys.table.cpu import CpuTable

    theirs = SplitTableBatchedEmbeddingBagsCodegen(
        [(rows, dim, EmbeddingLocation.HOST, ComputeDevice.CPU)],
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=0.05,
        eps=1e-8,
    )
    segment = Segment(name="deep", dim=dim, init_scale=0.01)
    ours = CpuTable(Layout(name="measured", segments=(segment,), slots={0: SlotPolicy()}, capacity=rows))
    keys = np.random.default_rng(0).permutation(4 * rows)[:rows] * 7919
    for start in range(0, rows, 4096):
        batch = keys[start : start + 4096]
        ours.lookup_train(np.zeros(len(batch), np.int32), batch, 0)
    return theirs, ours, keys


def sides(theirs: Any, ours: Any, batch: int, dim: int) -> dict[str, Callable[[Any, Any], object]]:
    """What takes turns: each gets row numbers and keys of the same rows."""
    import numpy as np
    import torch

    offsets, slots = torch.arange(batch + 1), np.zeros(batch, np.int32)
    gradient = np.random.default_rng(1).standard_normal((batch, dim), np.float32)
    given = torch.from_numpy(gradient)

    def forward(ids: Any, _: Any) -> None:
        with torch.no_grad():
            theirs(ids, offsets)

    def both(_: Any, asked: Any) -> None:
        ours.lookup_train(slots, asked, 0)
        ours.apply_gradients(slots, asked, gradient, 0)

    return {
        "tbe": forward,
        "find_gather": lambda _, asked: ours.lookup(slots, asked),
        "tbe_train": lambda ids, _: theirs(ids, offsets).backward(given),
        "find_adagrad": lambda _, asked: ours.apply_gradients(slots, asked, gradient, 0),
        "lookup_find_adagrad": both,
    }


def rates(rows: int, dim: int) -> dict[str, float]:
    """Both sides take turns, with the same rows: TBE is given their numbers, ours their keys."""
    import numpy as np
    import torch

    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    theirs, ours, keys = tables(rows, dim)
    figures: dict[str, float] = {}
    for name, batch in (("4k", 4096), ("64k", 65_536)):
        uses = sides(theirs, ours, batch, dim)
        seconds: dict[str, list[float]] = {side: [] for side in uses}
        for _ in range(ROUNDS):
            for side, use in uses.items():
                numbers = rng.permutation(np.unique(rng.integers(0, rows, ROUND_KEYS + ROUND_KEYS // 4)))[:ROUND_KEYS]
                turns = [(torch.from_numpy(part), keys[part]) for part in numbers.reshape(-1, batch)]
                started = time.perf_counter()
                for ids, asked in turns:
                    use(ids, asked)
                seconds[side].append(time.perf_counter() - started)
        for side, times in seconds.items():
            figures[f"{side}_{name}"] = ROUND_KEYS / median(times)
        for side, other in (
            ("find_gather", "tbe"),
            ("find_adagrad", "tbe_train"),
            ("lookup_find_adagrad", "tbe_train"),
        ):
            ratios = [theirs_s / ours_s for theirs_s, ours_s in zip(seconds[other], seconds[side], strict=True)]
            figures[f"{side}_vs_tbe_{name}"] = median(ratios)
    return figures


if __name__ == "__main__":
    print(json.dumps(rates(int(sys.argv[1]), int(sys.argv[2]))))
