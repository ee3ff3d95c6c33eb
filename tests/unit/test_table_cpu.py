"""What the CPU table owes beside the contract: no compiling later, memory only as rows come, bounded times."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import numpy as np

from recsys.table import kernels
from recsys.table.base import Layout, Segment, SlotPolicy
from recsys.table.cpu import CpuTable, warm_up

LAYOUT = Layout(
    name="deep",
    segments=(Segment(name="deep", dim=16, init_scale=0.01),),
    slots={0: SlotPolicy(admission=2, expiry_s=10.0)},
    capacity=50_000,
)


def test_nothing_compiles_after_warm_up() -> None:
    warm_up()
    names = ("find", "insert", "remove", "rebuild", "combine", "step", "mark", "changes")
    before = {name: len(getattr(kernels, name).signatures) for name in names}
    assert set(before.values()) == {1}
    table = CpuTable(LAYOUT)
    slots, keys = np.zeros(5000, np.int32), np.arange(10_000)[::2]
    gradients = np.ones((5000, 32), np.float32)[:, ::2]
    for array in (slots, keys, gradients):
        array.flags.writeable = False
    unaligned = np.frombuffer(b"x" + keys.tobytes(), np.int64, offset=1)
    for each in (keys, unaligned):
        table.lookup_train(slots, each, 0)
        table.apply_gradients(slots, each, gradients, 0)
        table.lookup(slots, each)
    taken = table.touched("publish")
    other = CpuTable(LAYOUT)
    other.restore(table.export(taken.slots, taken.keys))
    other.write(slots, unaligned, gradients, 0)
    other.restore_pending(table.pending())
    other.restore_defaults(table.defaults())
    table.expire(20_000, max_rows=100)
    table.remove(slots[:10], unaligned[:10])
    table.touched("publish")
    assert {name: len(getattr(kernels, name).signatures) for name in names} == before


def test_memory_is_used_as_rows_come() -> None:
    before = _resident_bytes()
    table = CpuTable(Layout(name="big", segments=LAYOUT.segments, slots={0: SlotPolicy()}, capacity=50_000_000))
    table.lookup_train(np.zeros(1000, np.int32), np.arange(1000), 0)
    assert _resident_bytes() - before < 64 * 2**20
    assert 1000 * 64 < table.memory_bytes() < 2**20


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_a_package_without_a_writable_cache_still_works(tmp_path: Path) -> None:
    source = Path(kernels.__file__).read_text().split("@_kernel\ndef find")[0]
    (tmp_path / "lonely.py").write_text(source + "\n\nprint(_home(1, 2, 1023), _kernel.__name__)\n")
    script = (
        "import numba.core.caching as caching\n"
        "caching.CacheImpl._locator_classes = []\n"
        "caching.CodeLibraryCacheImpl._locator_classes = []\n"
        "caching.CompileResultCacheImpl._locator_classes = []\n"
        "import lonely\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={"PYTHONPATH": f"{tmp_path}:{Path(kernels.__file__).parents[2]}", "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == str(kernels._home(1, 2, 1023))
