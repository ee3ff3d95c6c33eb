"""CPU and memory of a tree of processes: each counts once, whether it lives or ended, and two of one kind are two."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from load_tests.processes import Family

BURN = """
import json, os, subprocess, sys, time
def burn(seconds):
    while time.process_time() < seconds: pass
def start(*words):
    return subprocess.Popen([sys.executable, os.environ["BURN"], *words], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)
"""
CHILD = (
    BURN
    + """
burn(float(sys.argv[3]))
helper = start("helper", "", sys.argv[3])  if sys.argv[1] == "serve" else None
if helper: helper.communicate()  # it ended, and was waited for
used = [time.process_time(), sum(os.times()[2:4])]
print(json.dumps(used), flush=True)
if helper and sys.argv[4] == "stay": sys.stdin.read()
"""
)
ROOT = (
    BURN
    + """
ended = start("serve", "ranking", ".3", "end")
told = [json.loads(ended.communicate()[0])]
stay = [start("serve", kind, seconds, "stay") for kind, seconds in (("ranking", ".2"), ("ranking", ".4"), ("trainer", ".1"))]
told += [json.loads(each.stdout.readline()) for each in stay]
nobody_waits = start("helper", "", ".3")  # it stays a zombie
told += [json.loads(nobody_waits.stdout.readline())]
while open(f"/proc/{nobody_waits.pid}/stat").read().rpartition(")")[2].split()[0] != "Z": time.sleep(.01)
print(json.dumps({"told": told, "own": time.process_time()}), flush=True)
sys.stdin.read()
"""
)


@contextmanager
def tree(folder: Path) -> Iterator[tuple[psutil.Process, dict[str, list[list[float]]]]]:
    (folder / "child.py").write_text(CHILD)
    root = subprocess.Popen(
        [sys.executable, "-c", ROOT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=psutil.Process().environ() | {"BURN": str(folder / "child.py")},
    )
    try:
        assert root.stdout is not None
        yield psutil.Process(root.pid), json.loads(root.stdout.readline())
    finally:
        family = psutil.Process(root.pid).children(recursive=True)
        for process in family:
            process.kill()
        root.kill()
        root.communicate()


def test_each_process_counts_once_ended_ones_and_two_of_a_kind_included(tmp_path: Path) -> None:
    with tree(tmp_path) as (root, said):
        found = Family(root)
        used, memory, members = found.cpu_s(), found.memory_bytes(), found.members()
        by_hand = [sum(each) for each in said["told"]]
        assert {kind: len(processes) for kind, processes in members.items()} == {"up": 2, "ranking": 2, "trainer": 1}
        assert used["ranking"] == pytest.approx(by_hand[1] + by_hand[2], abs=0.15)
        assert used["trainer"] == pytest.approx(by_hand[3], abs=0.1)
        # The ranking process that ended is the one's that waited for it; its helper came with it.
        assert sum(used.values()) == pytest.approx(sum(by_hand) + float(said["own"]), abs=0.3)  # type: ignore[arg-type]
        assert sum(used.values()) > 1.8 * (0.3 + 0.2 + 0.4 + 0.1) + 0.3
        rss = sum(p.memory_info().rss for p in [root, *root.children(recursive=True)])
        assert sum(memory.values()) == pytest.approx(rss, rel=0.05)
        assert 0 < found.shared_once_bytes() < rss


def test_a_family_that_ended_says_so() -> None:
    root = subprocess.Popen(["sleep", "60"])
    found = Family(psutil.Process(root.pid))
    assert set(found.members()) == {"up"}
    root.kill()
    root.wait()
    with pytest.raises(psutil.NoSuchProcess):
        found.cpu_s()
